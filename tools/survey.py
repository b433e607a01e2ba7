"""What each game rewards: U2 and U3 of every exact expert in all seats of held-out games.

    python -m tools.survey                 # every game x {GE, GEE, GGE} x types x N in 4, 6, 8
    python -m tools.survey --game pgg --stages GE --agents 5 --json pgg.json

A cell is U2 / U3 (see play/metrics.py). `planner` has U3 = 1 by definition; where its U2 is low, the first
best is no equilibrium and somebody gains by leaving it.
"""

import argparse
from itertools import product

import numpy as np
from tqdm import tqdm

from experts import NAMES, Expert, make_expert
from games import GAMES, MAX_AGENTS, Game, check_stages
from play.metrics import METRICS, align
from play.players import expert_player, play_tables
from prompts import PromptStyle
from run.errors import reports_errors
from run.files import refuse_existing, write_json
from run.values import number, positive_int, seed_int
from world.draws import TYPE_PATTERNS, Family, held_out_grid

TYPES = {"homogeneous": TYPE_PATTERNS[:1], "heterogeneous": TYPE_PATTERNS[1:]}


def self_play(games: list[Game], expert: Expert, seed: int) -> list[list[float]]:
    """[U2, U3] of every game, with the expert in all seats."""
    player, seats = expert_player(expert, PromptStyle(), seed), tuple(range(games[0].N))
    played = play_tables(games, [[player] * len(seats)] * len(games), [seats] * len(games), expert, seed)
    return [[METRICS["U2"](p), METRICS["U3"](p)] for p in played]


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="U2 and U3 of exact experts in all seats, in every game.")
    add, agents = parser.add_argument, number(int, 3, MAX_AGENTS)
    add("--game", nargs="+", choices=GAMES, default=list(GAMES), help="games")
    add("--stages", nargs="+", default=["GE", "GEE", "GGE"], help="stages of a round")
    add("--agents", nargs="+", type=agents, default=[4, 6, 8], help="numbers of agents N")
    add("--rounds", type=positive_int, default=1, help="rounds T of a game")
    add("--expert", nargs="+", default=list(NAMES), help="exact experts (see experts.py)")
    add("--seed", type=seed_int, default=0, help="of experts that draw")
    add("--json", metavar="FILE", help="write U2 and U3 of every single game to a new file")
    args = parser.parse_args(argv)
    if args.json:
        refuse_existing(args.json)
    for stages in args.stages:
        check_stages(stages)
    players = {name: make_expert(name) for name in args.expert}
    rows, cells = [["game", "types", "N", "games", *players]], []
    table = list(product(args.game, args.stages, TYPES.items(), args.agents))
    for game, stages, (types, patterns), N in tqdm(table, unit="row", leave=False):
        family = Family(game, stages, args.rounds, patterns)
        grid = held_out_grid(N, family)
        rows.append([family.label, types, str(N), str(len(grid))])
        for name, expert in players.items():
            runs = self_play(grid, expert, args.seed)
            rows[-1].append("{:.2f} / {:.2f}".format(*np.mean(runs, 0)))
            cell = {"game": game, "stages": stages, "types": types, "N": N, "expert": name}
            cells.append(cell | {"U2_U3": runs})
    print(align(rows))
    if args.json:
        write_json(args.json, {"arguments": vars(args), "cells": cells})


if __name__ == "__main__":
    main()

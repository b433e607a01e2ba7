"""What each game rewards: U2 and U3 of every exact expert in all seats of held-out games. No model is needed.

    python -m tools.survey                 # every game x {GE, GEE, GGE} x types x N in 4, 6, 8
    python -m tools.survey --game pgg --stages GE --agents 5 --json pgg.json

A cell is U2 / U3 (see play/metrics.py): U2, mean over all decisions of all seats, is how good they are for
the one who takes them, given what the others do; U3 is welfare against the first best. `planner` has U3 = 1
by definition; where its U2 is low, the first best is no equilibrium and somebody gains by leaving it.
"""

import argparse
from itertools import product

import numpy as np
from tqdm import tqdm

import experts
import world  # noqa: F401  (it registers the games)
from games import GAMES, MAX_AGENTS, Game, State, check_stages
from play.metrics import strategic_efficiency, welfare_bounds
from run.files import number, positive_int, refuse_existing, reports_errors, seed_int, write_json
from world.draws import TYPE_PATTERNS, Family, held_out_grid

TYPES = {"homogeneous": TYPE_PATTERNS[:1], "heterogeneous": TYPE_PATTERNS[1:]}


def self_play(game: Game, expert: experts.Expert, seed: list[int]) -> tuple[float, float]:
    """(U2, U3) of one game with the expert in all seats."""
    state, efficiencies, past = State(game), [], [[] for _ in range(game.N)]
    while not state.done:
        rngs = [np.random.default_rng([*seed, i, len(state.history)]) for i in range(game.N)]
        decisions = experts.decide(expert, [(state, i, rng, past[i]) for i, rng in enumerate(rngs)])
        for own, decision in zip(past, decisions):
            own.append(decision)
        actions = np.array([d.action for d in decisions])
        efficiencies += [strategic_efficiency(state, i, actions) for i in range(game.N)]
        state = state.step(actions)
    welfare = np.mean([payoffs.sum() for _, _, payoffs in state.round_results()])
    return float(np.mean(efficiencies)), float(welfare / welfare_bounds(game)[0])


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="U2 and U3 of exact experts in all seats, in every game.")
    add, agents = parser.add_argument, number(int, 3, MAX_AGENTS)
    add("--game", nargs="+", choices=GAMES, default=list(GAMES), help="games")
    add("--stages", nargs="+", default=["GE", "GEE", "GGE"], help="stages of a round")
    add("--agents", nargs="+", type=agents, default=[4, 6, 8], help="numbers of agents N")
    add("--rounds", type=positive_int, default=1, help="rounds T of a game")
    add("--expert", nargs="+", default=list(experts.NAMES), help="exact experts (see experts.py)")
    add("--seed", type=seed_int, default=0, help="of experts that draw")
    add("--json", metavar="FILE", help="write U2 and U3 of every single game to a new file")
    args = parser.parse_args(argv)
    if args.json:
        refuse_existing(args.json)
    for stages in args.stages:
        check_stages(stages)
    players = {name: experts.make_expert(name) for name in args.expert}
    widths = [max(14, len(name) + 2) for name in players]
    first = max(10, *(len(Family(g, s).label) + 2 for g in args.game for s in args.stages))
    names = "".join(f"{name:>{w}}" for name, w in zip(players, widths))
    print(f"{'game':{first}}{'types':15}{'N':>2}{'games':>7}{names}")
    cells = []
    for game, stages, (types, patterns), N in product(args.game, args.stages, TYPES.items(), args.agents):
        family = Family(game, stages, args.rounds, patterns)
        grid = held_out_grid(N, family)
        line = f"{family.label:{first}}{types:15}{N:>2}{len(grid):>7}"
        for (name, expert), width in zip(players.items(), widths):
            runs = [self_play(g, expert, [args.seed, i]) for i, g in enumerate(tqdm(grid, name, leave=False))]
            u2, u3 = np.mean(runs, 0)
            line += f"{f'{u2:.2f} / {u3:.2f}':>{width}}"
            cell = {"game": game, "stages": stages, "types": types, "N": N, "expert": name}
            cells.append(cell | {"U2_U3": runs})
        print(line, flush=True)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "cells": cells})


if __name__ == "__main__":
    main()

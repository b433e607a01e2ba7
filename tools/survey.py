"""What each game rewards: every exact expert in all seats of the held-out games, U2 and U3. No model is needed.

    python survey.py                                                 # {BCZ, PGG} x {GE, GEE, GGE} x types x N in 4, 6, 8
    python survey.py --game pgg --stages GE --agents 5 --json pgg.json

A cell is U2 / U3 (see metrics.py): U2, mean over all decisions of all seats, is how good they are for the one who takes
them, given what the others do; U3 is welfare against the first best. `planner` has U3 = 1 by definition; where its U2 is
low, the first best is no equilibrium and somebody gains by leaving it.
"""

import argparse

import numpy as np
from tqdm import tqdm

import experts
from games import GAMES, Game, State
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
    parser = argparse.ArgumentParser(
        description="U2 and U3 of every exact expert in every game, in all seats."
    )
    parser.add_argument("--game", nargs="+", choices=GAMES, default=list(GAMES), help="games")
    parser.add_argument("--stages", nargs="+", default=["GE", "GEE", "GGE"], help="stages of a round")
    parser.add_argument(
        "--agents", nargs="+", type=number(int, 3, 12), default=[4, 6, 8], help="numbers of agents N"
    )
    parser.add_argument("--rounds", type=positive_int, default=1, help="rounds T of a game")
    parser.add_argument("--expert", nargs="+", default=list(experts.NAMES), help="experts (see experts.py)")
    parser.add_argument("--seed", type=seed_int, default=0, help="of experts that draw")
    parser.add_argument("--json", metavar="FILE", help="write U2 and U3 of every single game to a new file")
    args = parser.parse_args(argv)
    if args.json:
        refuse_existing(args.json)
    players = {name: experts.make_expert(name) for name in args.expert}
    widths = [max(14, len(name) + 2) for name in players]
    print(
        f"{'game':10}{'types':15}{'N':>2}{'games':>7}"
        + "".join(f"{name:>{w}}" for name, w in zip(players, widths))
    )
    cells = []
    for game, stages, (types, patterns), N in (
        (g, s, t, n) for g in args.game for s in args.stages for t in TYPES.items() for n in args.agents
    ):
        family = Family(game, stages, args.rounds, patterns)
        grid = held_out_grid(N, family)
        line = f"{family.label:10}{types:15}{N:>2}{len(grid):>7}"
        for (name, expert), width in zip(players.items(), widths):
            runs = [self_play(g, expert, [args.seed, i]) for i, g in enumerate(tqdm(grid, name, leave=False))]
            u2, u3 = np.mean(runs, 0)
            line += f"{f'{u2:.2f} / {u3:.2f}':>{width}}"
            cells.append(
                {"game": game, "stages": stages, "types": types, "N": N, "expert": name, "U2_U3": runs}
            )
        print(line, flush=True)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "cells": cells})


if __name__ == "__main__":
    main()

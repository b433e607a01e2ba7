"""Sequential credit (equations 4 to 6 of the paper): `--credit` puts it in the place of the sample
level.

In place of the likeness to the expert stands what the decision earns:

    [source] C_i = discounted return of the agent when decision i is played and experts then play on to the
             end: for an effort the return given the graph, for a graph decision V*(S_t+1) of its next state
    [choice] sample level := 2 max(0, 1 + (C_i - C_expert) / |C_expert|), 2 for what the expert's own earns
    [source] minus zeta |C_G - C_E|; [choice] its form: the distance from the mean credit of the other kind of
             decision in the same round of the same conversation, if the step holds one
"""

import numpy as np

from games import State
from policy import Rollout
from prompts import Decision
from rewards import Target
from run.dataset import expert_of
from world.draws import named_numbers

CREDIT = {"gamma": 1.0, "zeta": 0.0}  # the discount per round, the weight of |C_G - C_E|


def discounted_return(state: State, seat: int, actions: np.ndarray, expert, gamma: float, seed) -> float:
    """sum_k gamma^k pi_seat of the round of `state` and those after it: all agents' `actions` now, then
    experts."""
    finished, rng = len(state.round_results()), np.random.default_rng(seed)
    state = state.step(actions)
    while not state.done:
        state = state.step(np.array([expert(state, i, rng).action for i in range(state.game.N)]))
    return float(sum(gamma**k * pay[seat] for k, (_, _, pay) in enumerate(state.round_results()[finished:])))


def return_credits(
    decisions: list[Decision | None], target: Target, expert, gamma: float, seed: list[int]
) -> list[float | None]:
    """The credit of every rollout of a group before zeta; None for one that is not compliant."""

    def value(actions):
        return discounted_return(target.state, target.seat, actions, expert, gamma, seed)

    baseline = value(target.actions)
    scale = max(abs(baseline), 1e-9)
    return [
        max(0.0, 2 * (1 + (value(target.with_own(d)) - baseline) / scale)) if d else None for d in decisions
    ]


def made_consistent(credits: dict[tuple, list[float | None]], zeta: float) -> dict[tuple, list[float | None]]:
    """credits by (conversation and round, kind): each minus zeta times its distance from the other kind's
    mean."""
    other = {"G": "E", "E": "G"}
    compliant = {key: [c for c in values if c is not None] for key, values in credits.items()}
    means = {key: sum(values) / len(values) for key, values in compliant.items() if values}
    return {
        (place, kind): [
            None if c is None else c - zeta * abs(c - means.get((place, other[kind]), c)) for c in values
        ]
        for (place, kind), values in credits.items()
    }


def step_credits(
    args, batch: list, groups: list[list[Rollout]], step: int
) -> list[list[float | None] | None]:
    """The credit of every rollout of a step, which takes the place of its sample level; None for every group
    without --credit. batch: the prompts (train_rft.Prompt)."""
    if args.credit is None:
        return [None] * len(batch)
    how = CREDIT | named_numbers(args.credit, "--credit")
    expert, credits = expert_of(args), {}
    keys = [((p.record.game, p.record.seat, p.record.round), p.target.kind) for p in batch]
    for key, p, group in zip(keys, batch, groups):
        decisions, seed = [o.decision for o in group], [args.seed, 8, step, p.record.game]
        credits.setdefault(key, []).extend(return_credits(decisions, p.target, expert, how["gamma"], seed))
    remaining = {key: iter(values) for key, values in made_consistent(credits, how["zeta"]).items()}
    return [[next(remaining[key]) for _ in group] for key, group in zip(keys, groups)]

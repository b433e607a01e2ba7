"""Sequential credit (equations 4 to 6 of the paper): `--reward-from credit`.

What the decision earns replaces the likeness to the expert:

    [source] C_i = discounted return of the agent when decision i is played and experts then play on to the
             end: for an effort the return given the graph, for a decision about links V*(S_t+1) of its next
             state
    [choice] likeness := 2 max(0, 1 + (C_i - C_expert) / |C_expert|), 2 for what the expert's own earns
    [source] minus zeta |C_G - C_E|; [choice] its form: the distance from the mean credit of the other kind of
             decision in the same round of the same conversation, if the step contains one
"""

import numpy as np

from experts import Expert
from games import Decision, State
from rewards import Memory, Sample, Target, graph_likeness, group_rewards
from run.seeds import Stream, numpy_generator

WEIGHTS = {"gamma": 1.0, "zeta": 0.0}  # the discount per round, the weight of |C_G - C_E|; see --weights
OTHER = {"G": "E", "E": "G"}


def discounted_return(
    state: State, seat: int, actions: np.ndarray, expert: Expert, gamma: float, rng: np.random.Generator
) -> float:
    """sum_k gamma^k pi_seat of the round of `state` and those after it: all agents' `actions` now, then
    experts."""
    rounds_before = len(state.round_results())
    state = state.step(actions)
    while not state.done:
        state = state.step([expert(state, i, rng).action for i in range(state.game.N)])
    payoffs = [pay[seat] for _, _, pay in state.round_results()[rounds_before:]]
    return float(sum(gamma**k * pay for k, pay in enumerate(payoffs)))


def return_credits(
    decisions: list[Decision | None], target: Target, expert: Expert, gamma: float, seed: int
) -> list[float | None]:
    """The credit of every reply of a group before zeta; None for one that is not compliant."""

    def value(actions):
        rng = numpy_generator(seed, Stream.CREDIT, target.game_index)
        return discounted_return(target.state, target.seat, actions, expert, gamma, rng)

    baseline = value(target.actions)
    scale = max(abs(baseline), 1e-9)
    return [
        max(0.0, 2 * (1 + (value(target.with_own(d)) - baseline) / scale)) if d else None for d in decisions
    ]


def credit_rewards(
    targets: list[Target],
    groups: list[list[Sample]],
    memory: Memory,
    *,
    weights: dict[str, float],
    expert: Expert,
    seed: int,
) -> None:
    """As rewards.expert_rewards, with credits in the place of the likeness."""
    credits = [
        return_credits([o.decision for o in group], target, expert, weights["gamma"], seed)
        for target, group in zip(targets, groups, strict=True)
    ]
    places = [((t.game_index, t.seat, t.state.round), t.kind.letter) for t in targets]
    compliant: dict[tuple, list[float]] = {}
    for place, own in zip(places, credits, strict=True):
        compliant.setdefault(place, []).extend(c for c in own if c is not None)
    means = {place: sum(values) / len(values) for place, values in compliant.items() if values}
    for (place, letter), target, group, own in zip(places, targets, groups, credits, strict=True):
        other = means.get((place, OTHER.get(letter)))
        zeta = 0.0 if other is None else weights["zeta"]
        likenesses = [0.0 if c is None else c - zeta * abs(c - (other or 0.0)) for c in own]
        group_rewards(
            group, target, memory, weights, likenesses, [graph_likeness(o.decision, target) for o in group]
        )

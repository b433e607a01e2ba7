"""The policy in several seats of one graph: `--reward-from joint` [choice].

In the paper only the agent's own row varies within a group; the other rows of the graph are the experts'.
Here every decision about links is asked for in all seats of its game (`--seat all`), and the i-th replies
of these seats form one graph:

    G_i = form(P_expert with the rows of those seats := their i-th replies),  s_i as in rewards.py

A reply that is not compliant proposes no links there. A useless proposal now costs something, because
another seat may accept it; but s_i also depends on the other seats' replies, which adds noise to the
advantage.
"""

import numpy as np

from play import dataset
from play.dataset import Prompt
from rewards import Memory, Sample, Target, group_rewards, hamming_score, likeness


def moment(target: Target) -> tuple[int, int]:
    """What the seats of one graph have in common: the game and its stage."""
    return target.game_index, len(target.state.history)


def next_batch(pool: list[list[Prompt]], counts: dict[str, int], step: int, seed: int) -> list[Prompt]:
    """The prompts of a step, with each decision about links in all trained seats."""
    batch = dataset.next_batch(pool, counts, step, seed)
    seats: dict[tuple[int, int], list[Prompt]] = {moment(p.target): [] for p in batch if is_links(p.target)}
    for p in sum(pool, []):
        seats.get(moment(p.target), []).append(p)
    return sum(seats.values(), []) + [p for p in batch if not is_links(p.target)]


def is_links(target: Target) -> bool:
    return target.kind.letter == "G"


def joint_rewards(
    targets: list[Target], groups: list[list[Sample]], memory: Memory, *, weights: dict[str, float]
) -> None:
    """As rewards.expert_rewards, with s_i of the graph of all seats' i-th replies."""
    proposals: dict[tuple[int, int], list[np.ndarray]] = {}  # of each moment, (N, N) for each i
    for target, group in zip(targets, groups, strict=True):
        if is_links(target):
            graphs = proposals.setdefault(moment(target), [target.actions.copy() for _ in group])
            for P_NN, o in zip(graphs, group, strict=True):
                P_NN[target.seat] = o.decision.action if o.decision else 0
    for target, group in zip(targets, groups, strict=True):
        scores: list[float | None] = [None] * len(group)
        if is_links(target):
            pairs = zip(group, proposals[moment(target)], strict=True)
            scores = [hamming_score(P_NN, target) if o.decision else 0.0 for o, P_NN in pairs]
        likenesses = [likeness(o.decision, target) for o in group]
        group_rewards(group, target, memory, weights, likenesses, scores)

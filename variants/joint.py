"""The policy in several seats of one graph: `--graph-score joint` [choice].

In the paper only the agent's own row varies within a group; the other rows of the graph are the experts'.
Here every graph decision of a step is asked in all seats of its game (`--seat all`), and the i-th replies of
these seats stand in one graph:

    G_i = form(P_expert with the rows of those seats := their i-th replies),  s_i as in rewards.py

A reply that is not compliant proposes no links there. So a useless proposal costs something where another
seat answers it; and s_i tells of the others' rows too, which is noise to one's own.
"""

import numpy as np

from policy import Rollout


def moment(prompt) -> tuple[int, int]:
    """What the seats of one graph have in common."""
    return prompt.record.game, prompt.record.stage


def with_other_seats(args, batch: list, conversations: list[list]) -> list:
    """The prompts of a step (train_rft.Prompt); with `joint`, each graph decision in all trained seats."""
    if args.graph_score != "joint":
        return batch
    seats: dict[tuple[int, int], list] = {moment(p): [] for p in batch if p.target.kind == "G"}
    for p in sum(conversations, []):
        seats.get(moment(p), []).append(p)
    return sum(seats.values(), []) + [p for p in batch if p.target.kind == "E"]


def proposals(args, batch: list, groups: list[list[Rollout]]) -> list[list[np.ndarray] | None]:
    """For every group the proposals (N, N) that each of its replies is a row of; None without `joint`, and
    for effort decisions."""
    if args.graph_score != "joint":
        return [None] * len(batch)
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for p, group in zip(batch, groups):
        if p.target.kind == "G":
            of_replies = found.setdefault(moment(p), [p.target.actions.copy() for _ in group])
            for P_NN, o in zip(of_replies, group):
                P_NN[p.target.seat] = o.decision.action if o.decision else 0
    return [found.get(moment(p)) for p in batch]

"""Rewards of a group of m replies to one prompt (one decision of one agent in an expert game).

[source] is fixed by the paper (arXiv 2509.21134), [choice] by this project. For rollout i of the group:

    compliance   +0.5 if the reply is compliant, else -0.5 and every other term is 0                          [source]
    sample level, graph decision:   F1(row_i, expert row) + accuracy(row_i, expert row)                       [source]
    sample level, effort decision:  2 max(0, 1 - |x_i - x_expert| / max(x_expert, 0.05 cap))                  [choice]
    graph level, graph decisions only:
        G_i = form(P_expert with the agent's row := row_i)                                                    [source]
        s_i = 1 - Hamming(G_i, G_expert) / (N (N-1)), in [0, 1]; 0 if not compliant                           [source]
        R^G_i = s_i + w_local [s_i is the best of the group] + w_global [s_i >= the best so far in memory]
                                                          [source: the terms; choice: w_local = w_global = 0.5]

The two bonuses are terms of the reward and not subtracted baselines, because a baseline that does not depend on the
sampled reply leaves the expected policy gradient unchanged: a subtracted "memory best" could not do anything.
"""

from dataclasses import dataclass

import numpy as np

from games import form_links
from prompts import Decision


@dataclass(frozen=True, eq=False)
class Target:
    """What the expert says at a prompt. proposals_NN: the experts' rows of all agents (graph decisions);
    effort: the expert's effort (effort decisions)."""

    kind: str
    seat: int
    cap: float
    proposals_NN: np.ndarray | None = None
    effort: float | None = None


def compliance(decision: Decision | None) -> float:
    return 0.5 if decision is not None else -0.5


def f1(row_N: np.ndarray, expert_N: np.ndarray, seat: int) -> float:
    """Over the N-1 other entries; 1 for two empty rows."""
    row, expert = np.delete(row_N, seat), np.delete(expert_N, seat)
    if not row.any() and not expert.any():
        return 1.0
    return float(2 * (row & expert).sum() / (row.sum() + expert.sum()))


def accuracy(row_N: np.ndarray, expert_N: np.ndarray, seat: int) -> float:
    """Over the N-1 other entries."""
    return float((np.delete(row_N, seat) == np.delete(expert_N, seat)).mean())


def effort_score(effort: float, expert_effort: float, cap: float) -> float:
    """In [0, 2]: 2 at the expert's effort, 0 at an error as large as that effort (or as 5 % of the cap)."""
    return 2 * max(0.0, 1 - abs(effort - expert_effort) / max(expert_effort, 0.05 * cap))


def sample_level(decision: Decision | None, target: Target) -> float:
    """Compliance apart; 0 for a reply that is not compliant."""
    if decision is None:
        return 0.0
    if target.kind == "E":
        return effort_score(decision.action, target.effort, target.cap)
    expert_N = target.proposals_NN[target.seat]
    return f1(decision.action, expert_N, target.seat) + accuracy(decision.action, expert_N, target.seat)


def graph_score(decision: Decision | None, target: Target) -> float:
    """s_i: how near the graph with this row comes to the expert graph, 1 for the same graph."""
    if decision is None:
        return 0.0
    proposals_NN = target.proposals_NN.copy()
    proposals_NN[target.seat] = decision.action
    N = len(proposals_NN)
    hamming = (form_links(proposals_NN) != form_links(target.proposals_NN)).sum()
    return float(1 - hamming / (N * (N - 1)))


class Memory:
    """The best graph score so far of every game instance, by its key. Empty memory: 0."""

    def __init__(self, best: dict[str, float] | None = None):
        self.best = dict(best or {})

    def get(self, key: str) -> float:
        return self.best.get(key, 0.0)

    def update(self, key: str, scores: list[float]) -> None:
        """To be called after the step: within a step all groups see the same memory."""
        self.best[key] = max(self.get(key), *scores)


def group_rewards(
    decisions: list[Decision | None],
    target: Target,
    memory_best: float = 0.0,
    w_local: float = 0.5,
    w_global: float = 0.5,
) -> list[dict[str, float]]:
    """All terms of every rollout of one group: `compliance`, `sample`, `r_S` (their sum), and for graph decisions
    `s`, `local`, `global`, `R_G` (their sum)."""
    terms = []
    for decision in decisions:
        c, sample = compliance(decision), sample_level(decision, target)
        terms.append({"compliance": c, "sample": sample, "r_S": c + sample})
    if target.kind == "G":
        scores = [graph_score(d, target) for d in decisions]
        for term, decision, s in zip(terms, decisions, scores):
            local = w_local * (decision is not None and s == max(scores))
            globally = w_global * (decision is not None and s >= memory_best)
            term |= {"s": s, "local": local, "global": globally, "R_G": s + local + globally}
    return terms

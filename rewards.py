"""Rewards of a group of m replies to one prompt q (one decision of one agent in an expert game).

[source] is fixed by the paper (arXiv 2509.21134), [choice] by this project. The experts of all agents propose
P_expert at q, which forms G_expert. For reply i of the group:

    compliance   +0.5 if the reply is compliant; else -0.5, and likeness, s and bonuses are 0       [source]
    likeness, links:    F1(row_i, expert row) + accuracy(row_i, expert row)                         [source]
    likeness, efforts:  2 max(0, 1 - |x_i - x_expert| / max(x_expert, 0.05 cap))                    [choice]
    sample level: r^S_i = compliance + likeness + the optional terms below, each times its weight
    graph level, links only:
        G_i = form(P_expert with the agent's row := row_i)                                          [source]
        s_i = 1 - Hamming(G_i, G_expert) / (N (N-1)), in [0, 1]; 0 if not compliant                 [source]
        R^G_i = s_i + (w_local if s_i is the largest of the group)
                    + (w_global if s_i reaches the best so far of this game instance: 0 at first, see Memory)
                                  [source: the terms; choice: that they are added, w_local = w_global = 0.5]

The paper calls the two bonuses prompt_best and memory_best and does not say whether they are added or
subtracted as baselines. They are added here: a number that is subtracted from all rewards of a group
cancels in (r - mean) / std, so as baselines both would do nothing.

To add a term, write a function (sample, target) -> float, which sees the reply's text and the decision (None
where the reply is not compliant), and put it into TERMS; `--weights NAME=WEIGHT` switches it on, and it is
logged under its name. Other reward functions: variants/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from games import Decision, Game, Kind, State, form_links
from prompts import Reply


@dataclass(frozen=True, eq=False)
class Target:
    """What a decision of `seat` in `state` is compared with. actions: what the experts of all agents do
    there, proposals (N, N) or efforts (N,); with --partners (rules that play the other seats in the expert's
    place, docs/others.md), what these do. game_index: which of the expert games it is."""

    state: State
    seat: int
    actions: np.ndarray
    game_index: int = 0

    @property
    def game(self) -> Game:
        return self.state.game

    @property
    def kind(self) -> Kind:
        return self.state.kind

    @property
    def cap(self) -> float:
        return float(self.game.caps[self.seat])

    def with_own(self, decision: Decision) -> np.ndarray:
        """The experts' actions, but for this seat the decision's."""
        actions = list(self.actions)
        actions[self.seat] = decision.action
        return np.array(actions)


@dataclass
class Sample:
    """One sampled reply to a prompt, and what training makes of it. (It does not change the recorded game.)
    decision: what the strict parser reads in the reply, None if it is not compliant; rewards: every term by
    name and, for the log, A^S and A^G; advantage: A_i; weight: w_i, the factor of each of its
    tokens in the objective (train_rft.weigh)."""

    reply: Reply
    decision: Decision | None
    rewards: dict[str, Any] = field(default_factory=dict)
    advantage: float = 0.0
    weight: float = 0.0


# -------------------- likeness to the expert


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


def likeness(decision: Decision | None, target: Target) -> float:
    """0 for a reply that is not compliant. For links it is f1 + accuracy, for efforts effort_score
    (decisions.Links, decisions.Efforts)."""
    return target.kind.likeness(decision, target) if decision else 0.0


def belief_accuracy(decision: Decision | None, target: Target) -> float | None:
    """In [0, 1]; 0 without a compliant reply that states a belief. None for a kind that has no beliefs."""
    if not target.kind.beliefs:
        return None
    belief_N = decision.belief if decision else None
    return 0.0 if belief_N is None else target.kind.belief_accuracy(belief_N, target)


# Optional terms of r^S, for both kinds of decisions. WEIGHTS, which --weights changes, holds their weights (0
# for a term that it does not name) and those of the two bonuses of R^G.
TERMS: dict[str, Callable[[Sample, Target], float | None]] = {
    "belief": lambda sample, target: belief_accuracy(sample.decision, target),
}
WEIGHTS = {"local": 0.5, "global": 0.5, "belief": 0.0}


# -------------------- graph level


def graph_likeness(decision: Decision | None, target: Target) -> float | None:
    """s_i: 1 if the graph with this row is the expert graph; None where no links are chosen."""
    if target.kind.letter != "G":
        return None
    return hamming_score(target.with_own(decision), target) if decision else 0.0


def hamming_score(proposals_NN: np.ndarray, target: Target) -> float:
    """1 - Hamming(G, G_expert) / (N (N-1)) of the graph G that these proposals form."""
    N, wrong = target.game.N, (form_links(proposals_NN) != form_links(target.actions)).sum()
    return float(1 - wrong / (N * (N - 1)))


class Memory:
    """The best graph score so far of every game instance; at the first visit every compliant reply reaches
    it. best: the scores by key; the caller may pass a dictionary that it saves."""

    def __init__(self, best: dict[str, float] | None = None):
        self.best = {} if best is None else best

    def get(self, target: Target) -> float:
        return self.best.get(self.key(target), 0.0)

    @staticmethod
    def key(target: Target) -> str:
        """Efforts have a graph level only in variants/game.py, and there a memory of their own."""
        return target.game.key + ("" if target.kind.letter == "G" else f" {target.kind.letter}")

    def update(self, targets: list[Target], groups: list[list[Sample]]) -> None:
        """To be called after the step: within a step all groups see the same memory."""
        for target, group in zip(targets, groups, strict=True):
            scores = [o.rewards["s"] for o in group if "s" in o.rewards]
            if scores:
                self.best[self.key(target)] = max(self.get(target), *scores)


# -------------------- the reward function


def group_rewards(
    group: list[Sample],
    target: Target,
    memory: Memory,
    weights: dict[str, float],
    likenesses: list[float],
    scores: list[float | None],
) -> None:
    """Writes the rewards of one group into its samples: `compliance`; `sample`, the likeness or what a
    variant puts in its place; the optional terms by name; `r_S`, the sum of the first two and of the weighted
    optional terms; where there is a graph level also `s`, `local`, `global`, `R_G`. likenesses, scores: what
    `sample` and `s` become for each reply."""
    best = max((s for s in scores if s is not None), default=0.0)
    for o, likeness_i, s in zip(group, likenesses, scores, strict=True):
        optional = {name: term(o, target) for name, term in TERMS.items()}
        bonus = sum(weights.get(name, 0.0) * (value or 0.0) for name, value in optional.items())
        o.rewards = {"compliance": compliance(o.decision), "sample": likeness_i} | optional
        o.rewards["r_S"] = o.rewards["compliance"] + likeness_i + bonus
        if s is not None:
            local = weights["local"] * (o.decision is not None and s == best)
            globally = weights["global"] * (o.decision is not None and s >= memory.get(target))
            o.rewards |= {"s": s, "local": local, "global": globally, "R_G": s + local + globally}


def expert_rewards(
    targets: list[Target],
    groups: list[list[Sample]],
    memory: Memory,
    *,
    weights: dict[str, float] = WEIGHTS,
    score: Callable[[Decision | None, Target], float | None] = graph_likeness,
) -> None:
    """Writes the rewards of a step's groups, one for each target, into their samples. score: s_i."""
    for target, group in zip(targets, groups, strict=True):
        likenesses = [likeness(o.decision, target) for o in group]
        scores = [score(o.decision, target) for o in group]
        group_rewards(group, target, memory, weights, likenesses, scores)

"""Rewards of a group of m replies to one prompt (one decision of one agent in an expert game).

[source] is fixed by the paper (arXiv 2509.21134), [choice] by this project. For rollout i of the group:

    compliance   +0.5 if the reply is compliant, else -0.5 and every other term is 0                [source]
    sample level, graph decision:   F1(row_i, expert row) + accuracy(row_i, expert row)             [source]
    sample level, effort decision:  2 max(0, 1 - |x_i - x_expert| / max(x_expert, 0.05 cap))        [choice]
    r^S_i = compliance + sample level + the optional terms below, each times its weight
    graph level, graph decisions only:
        G_i = form(P_expert with the agent's row := row_i)                                          [source]
        s_i = 1 - Hamming(G_i, G_expert) / (N (N-1)), in [0, 1]; 0 if not compliant                 [source]
        or, with `welfare`, s_i = max(0, W(G_i)) / W(efficient graph), both at Nash efforts; in PGG,
        where those are mostly 0 and the empty graph would score best, at planner efforts           [choice]
        R^G_i = s_i + w_local [s_i is the best of the group] + w_global [s_i >= the best so far in memory]
                                                  [source: the terms; choice: w_local = w_global = 0.5]

Why terms of the reward and not subtracted baselines: a baseline that does not depend on the reply that was
sampled leaves the expected policy gradient unchanged, so a subtracted "best so far" could not do anything.

To add a term, write a function (decision, target) -> float and put it into TERMS; `--reward NAME=WEIGHT`
switches it on, and it is logged by its name. Rewards that need the rest of the game played out:
variants/credit.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from games import Game, State, form_links
from prompts import Decision

GRAPH_SCORES = ("hamming", "welfare", "joint")


@dataclass(frozen=True, eq=False)
class Target:
    """What the experts of all agents do in `state`, where `seat` decides: proposals (N, N) or efforts
    (N,)."""

    state: State
    seat: int
    actions: np.ndarray

    @property
    def game(self) -> Game:
        return self.state.game

    @property
    def kind(self) -> str:
        return self.state.kind

    @property
    def cap(self) -> float:
        return float(self.game.caps[self.seat])

    @property
    def place(self) -> tuple[str, int, int, float]:
        """What the parser needs to know: kind, seat, N, cap."""
        return self.kind, self.seat, self.game.N, self.cap

    def with_own(self, decision: Decision) -> np.ndarray:
        """The experts' actions with the agent's own in their place."""
        actions = self.actions.copy()
        actions[self.seat] = decision.action
        return actions


# -------------------- sample level


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
    expert = target.actions[target.seat]
    if target.kind == "E":
        return effort_score(decision.action, expert, target.cap)
    return f1(decision.action, expert, target.seat) + accuracy(decision.action, expert, target.seat)


def belief_accuracy(decision: Decision | None, target: Target) -> float:
    """In [0, 1]: graph: share of the others whose choice of the agent was foreseen; effort: mean over the
    others of max(0, 1 - |belief - effort| / max(effort, 0.05 cap)); 0 without a compliant reply that states a
    belief."""
    if decision is None or decision.belief is None:
        return 0.0
    others = np.arange(target.game.N) != target.seat
    if target.kind == "G":
        return float((decision.belief == target.actions[:, target.seat])[others].mean())
    error_N = np.abs(decision.belief - target.actions) / np.maximum(target.actions, 0.05 * target.game.caps)
    return float(np.maximum(0, 1 - error_N)[others].mean())


# Optional terms of r^S, of both kinds of decisions, and the weights that --reward changes. A term that
# WEIGHTS does not name has weight 0.
TERMS: dict[str, Callable[[Decision | None, Target], float]] = {"belief": belief_accuracy}
WEIGHTS = {"local": 0.5, "global": 0.5, "belief": 0.0}
# Names that a new term must not take: samples.jsonl and metrics.jsonl have them
FIXED_TERMS = ("compliance", "sample", "r_S", "s", "local", "global", "R_G", "A_S", "A_G")
FIXED_TERMS += ("step", "game", "stage", "kind", "seat", "reply", "expert", "broken", "advantage", "reward")


# -------------------- graph level


def graph_score(
    decision: Decision | None, target: Target, score: str = "hamming", proposals_NN: np.ndarray | None = None
) -> float:
    """s_i: how near the graph with this row comes to the expert graph (1: the same), or to the efficient
    one. proposals_NN: of a graph with other rows of the policy too (score `joint`: variants/joint.py)."""
    if decision is None:
        return 0.0
    game = target.game
    links_NN = form_links(target.with_own(decision) if proposals_NN is None else proposals_NN)
    if score == "welfare":
        efforts_N, (_, best) = game.efforts(game.scored_at, links_NN), game.efficient_graph(game.scored_at)
        W = game.welfare(links_NN, efforts_N)
        if best <= 0:  # no graph pays: 1 for one that loses nothing
            return float(W >= best)
        return round(max(0.0, W) / best, 9)  # rounding errors must not decide who gets a bonus
    hamming = (links_NN != form_links(target.actions)).sum()
    return float(1 - hamming / (game.N * (game.N - 1)))


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
    *,
    memory_best: float = 0.0,
    weights: dict[str, float] = WEIGHTS,
    score: str = "hamming",
    credits: list[float | None] | None = None,
    proposals: list[np.ndarray] | None = None,
) -> list[dict[str, float]]:
    """All terms of every rollout of a group: `compliance`, `sample`, the optional ones by name, `r_S` (their
    weighted sum); of graph decisions `s`, `local`, `global`, `R_G` too. Off by default: credits replace
    `sample` (variants/credit.py); proposals, (N, N) for each reply, replace the experts' with its own row
    (variants/joint.py)."""
    groups_terms = []
    for i, decision in enumerate(decisions):
        terms = {"compliance": compliance(decision)}
        terms["sample"] = sample_level(decision, target) if credits is None else credits[i] or 0.0
        optional = {name: term(decision, target) for name, term in TERMS.items()}
        bonus = sum(weights.get(name, 0.0) * value for name, value in optional.items())
        groups_terms.append(terms | optional | {"r_S": terms["compliance"] + terms["sample"] + bonus})
    if target.kind == "G":
        graphs = proposals or [None] * len(decisions)
        scores = [graph_score(d, target, score, P_NN) for d, P_NN in zip(decisions, graphs)]
        for terms, decision, s in zip(groups_terms, decisions, scores):
            local = weights["local"] * (decision is not None and s == max(scores))
            globally = weights["global"] * (decision is not None and s >= memory_best)
            terms |= {"s": s, "local": local, "global": globally, "R_G": s + local + globally}
    return groups_terms

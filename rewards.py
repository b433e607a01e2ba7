"""Rewards of a group of m replies to one prompt (one decision of one agent in an expert game).

[source] is fixed by the paper (arXiv 2509.21134), [choice] by this project. For rollout i of the group:

    compliance   +0.5 if the reply is compliant, else -0.5 and every other term is 0                          [source]
    sample level, graph decision:   F1(row_i, expert row) + accuracy(row_i, expert row)                       [source]
    sample level, effort decision:  2 max(0, 1 - |x_i - x_expert| / max(x_expert, 0.05 cap))                  [choice]
    graph level, graph decisions only:
        G_i = form(P_expert with the agent's row := row_i)                                                    [source]
        s_i = 1 - Hamming(G_i, G_expert) / (N (N-1)), in [0, 1]; 0 if not compliant                           [source]
        or, with `welfare`, s_i = max(0, W(G_i)) / W(efficient graph), both at Nash efforts; in PGG, where
        those are mostly 0 and the empty graph would score best, at planner efforts                           [choice]
        R^G_i = s_i + w_local [s_i is the best of the group] + w_global [s_i >= the best so far in memory]
                                                          [source: the terms; choice: w_local = w_global = 0.5]
    belief       w_belief times how well the Belief line foresees the experts, in [0, 1]; 0 by default        [choice]

Why terms of the reward and not subtracted baselines: a baseline that does not depend on the reply that was sampled
leaves the expected policy gradient unchanged, so a subtracted "best so far" could not do anything.

Sequential credit (equations 4 to 6 of the paper) takes the place of the sample level with `credit = return`:
    C_i = discounted return of the agent when decision i is played and then experts play the game to its end: for an
          effort the return given the graph, for a graph decision the value V*(S_t+1) of the state it leads to  [source]
    sample level := 2 max(0, 1 + (C_i - C_expert) / |C_expert|), 2 for what the expert's own decision earns   [choice]
    minus zeta |C_G - C_E|: the distance from the mean credit of the other kind of decision in the same round of the
    same conversation, if the step holds one                                   [source: the term; choice: its form]
"""

from dataclasses import dataclass

import numpy as np

from games import Game, State, form_links
from prompts import Decision

GRAPH_SCORES = ("hamming", "welfare")


@dataclass(frozen=True, eq=False)
class Target:
    """What the experts of all agents do at a prompt of `seat`: proposals (N, N) or efforts (N,)."""

    game: Game
    kind: str
    seat: int
    actions: np.ndarray

    @property
    def cap(self) -> float:
        return float(self.game.caps[self.seat])


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
        return effort_score(decision.action, target.actions[target.seat], target.cap)
    expert_N = target.actions[target.seat]
    return f1(decision.action, expert_N, target.seat) + accuracy(decision.action, expert_N, target.seat)


def with_own(decision: Decision, target: Target) -> np.ndarray:
    """The experts' actions with the agent's own in their place."""
    actions = target.actions.copy()
    actions[target.seat] = decision.action
    return actions


def graph_score(decision: Decision | None, target: Target, kind: str = "hamming") -> float:
    """s_i: how near the graph with this row comes to the expert graph (1 for the same graph), or to the efficient one."""
    if decision is None:
        return 0.0
    game, links_NN = target.game, form_links(with_own(decision, target))
    if kind == "welfare":
        efforts_N, (_, best) = game.efforts(game.scored_at, links_NN), game.efficient_graph(game.scored_at)
        return max(0.0, game.welfare(links_NN, efforts_N)) / best
    hamming = (links_NN != form_links(target.actions)).sum()
    return float(1 - hamming / (game.N * (game.N - 1)))


def belief_accuracy(decision: Decision | None, game: Game, seat: int, actions: np.ndarray) -> float:
    """In [0, 1]: graph: share of the others whose choice of the agent was foreseen; effort: mean over the others of
    max(0, 1 - |belief - effort| / max(effort, 0.05 cap)); 0 without a compliant reply that states a belief."""
    if decision is None or decision.belief is None:
        return 0.0
    others = np.arange(game.N) != seat
    if decision.kind == "G":
        return float((decision.belief == actions[:, seat])[others].mean())
    error_N = np.abs(decision.belief - actions) / np.maximum(actions, 0.05 * game.caps)
    return float(np.maximum(0, 1 - error_N)[others].mean())


def discounted_return(state: State, seat: int, actions: np.ndarray, expert, gamma: float, seed) -> float:
    """sum_k gamma^k pi_seat of the round of `state` and those after it: all agents' `actions` now, then experts."""
    finished, rng = len(state.round_results()), np.random.default_rng(seed)
    state = state.step(actions)
    while not state.done:
        state = state.step(np.array([expert(state, i, rng).action for i in range(state.game.N)]))
    return float(sum(gamma**k * pay[seat] for k, (_, _, pay) in enumerate(state.round_results()[finished:])))


def return_credits(
    decisions: list[Decision | None], target: Target, state: State, expert, gamma: float, seed
) -> list[float | None]:
    """The credit of every rollout in place of its sample level, before zeta; None for one that is not compliant."""

    def value(actions):
        return discounted_return(state, target.seat, actions, expert, gamma, seed)

    baseline = value(target.actions)
    scale = max(abs(baseline), 1e-9)
    return [max(0.0, 2 * (1 + (value(with_own(d, target)) - baseline) / scale)) if d else None for d in decisions]


def made_consistent(credits: dict[tuple, list[float | None]], zeta: float) -> dict[tuple, list[float | None]]:
    """credits by (conversation and round, kind): each minus zeta times its distance from the mean of the other kind's."""
    other = {"G": "E", "E": "G"}
    compliant = {key: [c for c in values if c is not None] for key, values in credits.items()}
    means = {key: sum(values) / len(values) for key, values in compliant.items() if values}
    return {
        (place, kind): [None if c is None else c - zeta * abs(c - means.get((place, other[kind]), c)) for c in values]
        for (place, kind), values in credits.items()
    }


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
    score: str = "hamming",
    w_belief: float = 0.0,
    credits: list[float | None] | None = None,
) -> list[dict[str, float]]:
    """All terms of every rollout of one group: `compliance`, `sample` (or its credit), `belief`, `r_S` (their sum), and
    for graph decisions `s`, `local`, `global`, `R_G` (their sum)."""
    terms = []
    for i, decision in enumerate(decisions):
        c, belief = compliance(decision), belief_accuracy(decision, target.game, target.seat, target.actions)
        sample = sample_level(decision, target) if credits is None else credits[i] or 0.0
        terms.append({"compliance": c, "sample": sample, "belief": belief, "r_S": c + sample + w_belief * belief})
    if target.kind == "G":
        scores = [graph_score(d, target, score) for d in decisions]
        for term, decision, s in zip(terms, decisions, scores):
            local = w_local * (decision is not None and s == max(scores))
            globally = w_global * (decision is not None and s >= memory_best)
            term |= {"s": s, "local": local, "global": globally, "R_G": s + local + globally}
    return terms

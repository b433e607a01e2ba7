"""What is measured in games that are over. No language model is needed.

Each metric is a function of a Turn (one decision of the policy) or of an Episode (one game); METRICS names
them, and a new one is one entry there. They are a [choice] where the paper only names them; docs/settings.md
explains them at length. A reply that is not compliant plays no links or effort 0, which U2 and U3 measure; in
s, row and belief it counts as 0. Where a metric does not exist, as s for efforts, it is None and left out of
means. The unit of analysis is the game instance: means over instances with 95 % t intervals (U1: the
share of decisions, with a Wilson interval). Where the policy sits in several seats, the value of a game is
the mean over its seats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from decisions import LINKS
from games import KINDS, Decision, Game, State
from play.intervals import mean_interval
from rewards import Target, accuracy, belief_accuracy, graph_likeness


@dataclass(frozen=True, eq=False)
class Turn:
    """One decision of the policy. decision: that of the reply, None if it is not compliant; played: the same,
    or what play/repair.py read in the reply; actions: what all agents play in this stage; expert_actions:
    what the experts of all agents would play, None for kinds that no metric compares with them."""

    state: State
    seat: int
    reply: str
    decision: Decision | None
    played: Decision | None
    actions: np.ndarray
    expert_actions: np.ndarray | None

    @cached_property
    def U2(self) -> float | None:
        """1 - (u_best - u) / (u_best - u_worst): u is the own payoff of the decision given what the others
        play, u_best and u_worst that of the best and the worst choice in its place (decisions.py)."""
        return self.state.kind.efficiency(self.state, self.seat, self.actions)


@dataclass(frozen=True, eq=False)
class Episode:
    """One finished game: the policy's turns, realised welfare by round, all agents' actions by stage. (The
    probe measures turns alone, of many games.)"""

    game: Game
    turns: list[Turn]
    welfares: list[float]
    history: tuple[np.ndarray, ...] = ()


# -------------------- the metrics


def compliant(turn: Turn) -> float:
    """U1: whether the reply is compliant, so the mean is the share of compliant replies."""
    return float(turn.decision is not None)


def graph_score(turn: Turn) -> float | None:
    """s: 1 - Hamming(G, G_expert) / (N (N-1)), where the experts' proposals with the policy's row in them
    form G, as in training (rewards.graph_likeness). Links alone."""
    return graph_likeness(turn.played, Target(turn.state, turn.seat, turn.expert_actions))


def row_agreement(turn: Turn) -> float | None:
    """row: the share of the other agents whom a decision about links treats as the expert does. Unlike s it
    sees proposals that nobody answers. Links alone."""
    if turn.state.kind is not LINKS:
        return None
    return accuracy(turn.played.action, turn.expert_actions[turn.seat], turn.seat) if turn.played else 0.0


efficiency = lambda turn: turn.U2


def welfare_share(episode: Episode) -> float | None:
    """U3: W / W*, the welfare of a round (mean over rounds) as a share of that of the first best."""
    _, first_best = episode.game.efficient_graph("planner")
    return float(np.mean(episode.welfares)) / first_best if first_best > 1e-9 else None


def belief(turn: Turn) -> float | None:
    """How well the Belief line foresees what the others then play, in [0, 1] (rewards.belief_accuracy)."""
    return belief_accuracy(turn.played, Target(turn.state, turn.seat, turn.actions))


def gap(turn: Turn) -> float | None:
    """What the agent would have gained by its best choice, as a share of W* / N. In self-play this is how
    much a best-replying seat exploits the policy."""
    stakes, game = turn.state.kind.stakes(turn.state, turn.seat, turn.actions), turn.state.game
    _, first_best = game.efficient_graph("planner")
    return (stakes.best - stakes.chosen) * game.N / first_best if stakes and first_best > 1e-9 else None


def mean_of(metric: Callable[[Turn], float | None], where=lambda turn: True):
    """The metric of a game that is the mean of a metric of decisions, over the turns that `where` selects."""
    return lambda episode: mean_interval(metric(t) for t in episode.turns if where(t))["mean"]


METRICS: dict[str, Callable[[Episode], float | None]] = {
    "U1": mean_of(compliant),  # its interval is Wilson's
    "s": mean_of(graph_score),
    "row": mean_of(row_agreement),
    "U2": mean_of(efficiency),
    "U3": welfare_share,
    "belief": mean_of(belief),
    "gap": mean_of(gap),
    "U2 | ok": mean_of(efficiency, compliant),
    "U3 | ok": lambda episode: welfare_share(episode) if all(map(compliant, episode.turns)) else None,
}


def per_instance(episode: Episode) -> dict[str, float | None]:
    """The metrics of one game; U2 also for each kind of decision."""
    values = {name: metric(episode) for name, metric in METRICS.items()}
    for kind in (kind for letter, kind in KINDS.items() if letter in episode.game.stages):
        values[f"U2 {kind.name}"] = mean_of(efficiency, lambda t, kind=kind: t.state.kind is kind)(episode)
    return values

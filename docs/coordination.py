"""A third game in one file: weakest-link coordination on a network. your-own-game.md walks through it.

Agents choose links, then efforts. Every link pays its two ends by the smaller of their two efforts:

    payoff   pi_i = alpha_i sum_j g_ij min(x_i, x_j) - x_i^2/2 - c sum_j g_ij,   0 <= x_i <= cap

So nobody gains by giving more than all its partners do, and there are many equilibria: which one is played
depends on what agents expect of each other.

    python -m docs.coordination --game coordination --expert planner --out runs/coordination
"""

import itertools
import json
from dataclasses import dataclass

import numpy as np

from games import Game, GameError, empty_graph, register, solved_once
from prompts import Observation, tell_numbers, tell_partners

MAX_LABELLED = 5  # agents up to which all labelled graphs are enumerated: 1024 at 5


def best_reply(worth: np.ndarray, efforts: np.ndarray) -> float:
    """An agent's best effort if its partners give `efforts`, and a unit of the weaker effort of the link with
    each of them counts `worth`. The sum over the links is concave in the own effort x, and its slope is (the
    worth of the partners who give more than x) - x. So it rises up to the largest x that does not exceed the
    worth of those who give at least x."""
    order = np.argsort(-efforts)
    return max(np.minimum(np.cumsum(worth[order]), efforts[order]), default=0.0)


@register
@dataclass(frozen=True)
class Coordination(Game):
    """alpha: what the weaker effort of a link is worth to each agent (N,); c: cost of a link, paid at both
    ends; cap: the largest allowed effort; stages, rounds, fee: see Game."""

    # The rules.

    name = "coordination"
    alpha: tuple[float, ...]
    c: float
    cap: float
    stages: str = "GE"
    rounds: int = 1
    fee: float = 0.0

    def __post_init__(self):
        self.check()
        if min(self.alpha) <= 0 or min(self.c, self.fee) < 0 or self.cap <= 0:
            raise GameError("alpha and cap must be positive, c and fee must not be negative")

    @property
    def types(self) -> tuple[float, ...]:
        return self.alpha

    @property
    def key(self) -> str:
        return json.dumps([self.name, sorted(self.alpha), self.c, self.cap])

    @property
    def caps(self) -> np.ndarray:
        return np.full(self.N, float(self.cap))

    @property
    def parameters(self) -> dict[str, float]:
        return {"c": self.c}

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        x = np.asarray(efforts_N, float)
        shared_N = (links_NN * np.minimum.outer(x, x)).sum(1)
        return np.array(self.alpha) * shared_N - x**2 / 2 - self.link_cost * links_NN.sum(1)

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        return self.best_replies(np.tile(self.alpha, (self.N, 1)).T, links_NN, efforts_N)

    def planner_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        return self.best_replies(np.add.outer(self.alpha, self.alpha), links_NN, efforts_N)

    def best_replies(self, worth_NN: np.ndarray, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """Where the link ij counts worth_NN[i, j] to i, (N,)."""
        x, partners_NN = np.minimum(self.cap, efforts_N), links_NN == 1
        rows = zip(worth_NN, partners_NN, strict=True)
        return np.array([best_reply(worth_N[row_N], x[row_N]) for worth_N, row_N in rows])

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """The greatest equilibrium. Best replies rise with the others' efforts (the game is supermodular).
        So repeated best replies that start from the cap only fall, and stay above every equilibrium. They
        end in one after finitely many steps, because every effort is 0, the cap or some alpha_i k."""
        x = self.caps
        while True:
            previous, x = x, self.best_response(links_NN, x)
            if (x == previous).all():
                return x

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """Exact. Let S_t be the set of agents who give more than t. Then welfare, without the cost of links,
        is the integral over t from 0 to the cap of

            sum of alpha_i + alpha_j over the links inside S_t  -  t |S_t|.

        The integrand is supermodular in S_t, so the best sets of all t are nested, and therefore belong to
        one profile of efforts, which is optimal. The agents of the densest set (the largest sum per member)
        give the highest effort, which is this density; the next effort is the density of the densest
        addition to that set, and so on. The integral ends at the cap, so no effort exceeds it."""
        sets_SN = np.array(list(itertools.product((0, 1), repeat=self.N)))
        size_S = sets_SN.sum(1)
        value_S = (sets_SN @ (links_NN * np.add.outer(self.alpha, self.alpha)) * sets_SN).sum(1) / 2
        x, now = np.zeros(self.N), 0  # now: the set of the agents whose effort is known, empty at first
        while size_S[now] < self.N:
            larger = np.flatnonzero((sets_SN >= sets_SN[now]).all(1) & (size_S > size_S[now]))
            density = (value_S[larger] - value_S[now]) / (size_S[larger] - size_S[now])
            added = larger[density.argmax()]
            x[sets_SN[added] > sets_SN[now]] = density.max()
            now = added
        return np.minimum(x, self.cap)

    @solved_once
    def efficient_graph(self, solution: str = "nash") -> tuple[np.ndarray, float]:
        """(links_NN, welfare) of the best of all graphs. Raises GameError for more than 5 agents."""
        if self.N > MAX_LABELLED:
            raise GameError(f"the efficient graph of this game is known for at most {MAX_LABELLED} agents")
        pairs = list(itertools.combinations(range(self.N), 2))
        best_links, best_welfare = None, -np.inf
        for chosen in itertools.product((0, 1), repeat=len(pairs)):
            links_NN = empty_graph(self.N)
            for (i, j), linked in zip(pairs, chosen, strict=True):
                links_NN[i, j] = links_NN[j, i] = linked
            W = self.welfare(links_NN, self.solve_efforts(solution, links_NN))
            if W > best_welfare + 1e-9:
                best_links, best_welfare = links_NN, W
        return best_links, best_welfare

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """alpha_i min(x_i, x_j) - c, whatever the other links are."""
        return np.array(self.alpha)[:, None] * np.minimum.outer(efforts_N, efforts_N) - self.link_cost

    # The words.

    payoff_rule = "Payoff: alpha (sum over links of the smaller of the two efforts) - x^2/2 - c (links)."
    type_name = "alpha"

    @classmethod
    def link_hint(cls, seen: Observation) -> str:
        """What each link would earn its two ends on average if all gave half of mean alpha (N-1), in units of
        c."""
        c = seen.parameters["c"]
        if not c or seen.types is None:
            return ""
        effort = min(seen.cap, sum(seen.types) / seen.N * (seen.N - 1) / 2)
        worth = [(seen.own_type + a) / 2 * effort / c for a in seen.types]
        worth[seen.seat] = 0
        return f"If all give {effort:.2f}, a link earns its ends on average {tell_numbers(worth)} c"

    @classmethod
    def effort_facts(cls, seen: Observation) -> str:
        return tell_partners(seen)

    @classmethod
    def effort_hint(cls, seen: Observation) -> str:
        """The best reply if each partner gives its alpha times the number of its links."""
        linked = np.flatnonzero(seen.links[seen.seat])
        if seen.types is None or not len(linked):
            return ""
        efforts = np.array([min(seen.cap, seen.types[j] * seen.links[j].sum()) for j in linked])
        best = best_reply(np.full(len(linked), seen.own_type), efforts)
        return f"Best reply if each gives alpha times its links: {best:.2f}"

    # The draws: u is cap / (mean(alpha) (N-1)), v is c / (mean(alpha)^2 (N-1) / 2). If agents are homogeneous
    # and the cap does not bind, all should link up to v = 1, and nobody above.

    fixable = ("cap", "c")
    ranges = ((0.5, 1.3), (0.2, 1.2))
    grid = ((0.6, 0.9, 1.2), (0.3, 0.5, 0.7, 0.9, 1.1))
    type_levels = (1.0, 3.0, 2.0)

    @classmethod
    def make(cls, types_N, u, v, fixed, stages, rounds) -> "Coordination":
        alpha_N = np.asarray(types_N, float)
        others, mean = len(alpha_N) - 1, alpha_N.mean()
        cap = fixed.get("cap", round(float(u * mean * others), 1))
        c = fixed.get("c", round(float(v * mean**2 * others / 2), 2))
        return cls(tuple(alpha_N.tolist()), c, cap, stages, rounds)


if __name__ == "__main__":
    import train_rft

    train_rft.main()

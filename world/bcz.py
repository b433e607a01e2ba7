"""BCZ, the network game of Ballester, Calvo-Armengol, Zenou (2006): rules and exact solutions.

payoff        pi_i = alpha_i x_i - x_i^2/2 + delta sum_j g_ij x_i x_j - c sum_j g_ij,   0 <= x_i <= cap
best response x_i  = alpha_i + delta (G x)_i
Nash          x    = (I -   delta G)^-1 alpha     exists iff   delta rho(G) < 1   (weighted Katz-Bonacich)
planner       x    = (I - 2 delta G)^-1 alpha     exists iff 2 delta rho(G) < 1   (maximises sum_i pi_i)
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from games import Game, GameError, Observation, complete_graph, empty_graph, register
from prompts import tell_numbers, tell_short
from world.solved import solved_once


@register
@dataclass(frozen=True)
class BCZ(Game):
    """alpha: standalone marginal return of each agent's effort (N,); delta: complementarity; c: cost of a
    link, paid at both ends; cap: the largest allowed effort; stages, rounds: see Game."""

    name = "bcz"
    alpha: tuple[float, ...]
    delta: float
    c: float
    cap: float
    stages: str = "GE"
    rounds: int = 1

    def __post_init__(self):
        self.check()
        if min(self.alpha) <= 0 or self.delta < 0 or self.c < 0 or self.cap <= 0:
            raise GameError("alpha and cap must be positive, delta and c must not be negative")

    @property
    def types(self) -> tuple[float, ...]:
        return self.alpha

    @property
    def key(self) -> str:
        return json.dumps([sorted(self.alpha), self.delta, self.c])

    @property
    def caps(self) -> np.ndarray:
        return np.full(self.N, float(self.cap))

    @property
    def parameters(self) -> dict[str, float]:
        return {"delta": self.delta, "c": self.c}

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        x = np.asarray(efforts_N, float)
        return (
            np.array(self.alpha) * x - x**2 / 2 + self.delta * x * (links_NN @ x) - self.c * links_NN.sum(1)
        )

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        return np.clip(np.array(self.alpha) + self.delta * links_NN @ efforts_N, 0, self.cap)

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        return solve_efforts(self.alpha, self.delta, links_NN, self.cap)

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        return solve_efforts(self.alpha, 2 * self.delta, links_NN, self.cap)

    @solved_once
    def efficient_graph(self, efforts: str = "nash") -> tuple[np.ndarray, float]:
        """Links cost the same everywhere, so some optimum is a threshold graph whose degree order follows
        alpha: 2^(N-1) candidates instead of 2^(N(N-1)/2). (Holds while the cap does not bind, which
        `effort_cap` sees to.)"""
        by_alpha = np.argsort(-np.array(self.alpha), kind="stable")  # equal alphas keep their seat order
        best_links, best_welfare = None, -math.inf
        for graph_NN in threshold_graphs(self.N):
            links_NN = empty_graph(self.N)
            links_NN[np.ix_(by_alpha, by_alpha)] = graph_NN
            W = self.welfare(links_NN, self.efforts(efforts, links_NN))
            if W > best_welfare + 1e-12:
                best_links, best_welfare = links_NN, W
        return best_links, best_welfare

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """delta x_i x_j - c, whatever the other links."""
        return self.delta * np.outer(efforts_N, efforts_N) - self.c

    # words

    payoff_rule = "Payoff: alpha x - x^2/2 + delta x (sum of linked efforts) - c (links)."
    type_name = "alpha"
    parameter_format = ".3f"

    @classmethod
    def link_hint(cls, seen: Observation) -> str:
        """What each link would earn if all link and reply once to efforts alpha, in units of c."""
        delta, c = seen.parameters["delta"], seen.parameters["c"]
        if not c:
            return ""
        reply_N = [a + delta * (sum(seen.types) - a) for a in seen.types]
        worth = [delta * reply_N[seen.seat] * x / c for x in reply_N]
        worth[seen.seat] = 0
        return f". If all link, at best replies to alpha a link earns {tell_numbers(worth)} c"

    @classmethod
    def effort_facts(cls, seen: Observation, hints: bool) -> str:
        """How many links, to which alphas, and the best reply to efforts alpha."""
        linked = np.flatnonzero(seen.links[seen.seat])
        text = f", {len(linked)} links"
        if seen.types is not None and len(linked):
            text += f" to alphas {tell_short(seen.types[j] for j in linked)}"
            if hints:
                response = seen.own_type + seen.parameters["delta"] * sum(seen.types[j] for j in linked)
                text += f". Best reply to efforts alpha: {response:.2f}"
        return text

    # draws: u is p = delta (N-1), v is g = c / (delta mean(alpha)^2)

    fixable = ("delta", "c")
    ranges = ((0.15, 0.33), (0.6, 2.2))
    grid = ((0.2, 0.25, 0.3), (0.75, 1, 1.25, 1.5, 2))
    type_levels = (1.0, 3.0, 1.0)

    @classmethod
    def make(cls, types_N, u, v, fixed, stages, rounds) -> "BCZ":
        alpha_N = np.asarray(types_N, float)
        delta = fixed.get("delta", round(float(u) / (len(alpha_N) - 1), 3))
        c = fixed.get("c", round(float(v * delta * alpha_N.mean() ** 2), 3))
        return cls(tuple(alpha_N.tolist()), delta, c, effort_cap(alpha_N, delta), stages, rounds)


def solve_efforts(alpha_N, coupling: float, links_NN: np.ndarray, cap: float | None = None) -> np.ndarray:
    """The fixed point of x = alpha + coupling G x, or with a cap m of x = min(m, alpha + coupling G x); shape
    (N,).

    Without a cap it exists (with x >= 0) iff I - coupling G is positive definite. That is what is tested:
    `inv` of an indefinite matrix would return negative efforts and absurd welfare without complaint. With a
    cap there is exactly one fixed point for any coupling >= 0. Raises GameError where there is no solution.
    """
    alpha_N = np.asarray(alpha_N, float)
    system_NN = np.eye(len(alpha_N)) - coupling * links_NN
    try:
        # Singular up to rounding is not definite
        np.linalg.cholesky(system_NN - 1e-12 * np.eye(len(alpha_N)))
        x = np.linalg.solve(system_NN, alpha_N)
        if cap is None or x.max() <= cap:
            return x
    except np.linalg.LinAlgError:
        if cap is None:
            raise GameError(
                f"efforts have no finite solution: coupling * rho(G) = "
                f"{coupling * np.linalg.eigvalsh(links_NN).max():.3f} must be below 1; lower delta"
            ) from None
    # From below the iteration rises monotonically to the fixed point, so nobody who reaches the cap leaves it
    # again.
    x = np.minimum(cap, alpha_N)
    while True:
        previous, x = x, np.minimum(cap, alpha_N + coupling * links_NN @ x)
        if (x - previous).max() <= 1e-10 * x.min():
            break
    # Who is at the cap is known now; the others follow exactly.
    free = alpha_N + coupling * links_NN @ x < cap
    pressure = alpha_N[free] + coupling * links_NN[np.ix_(free, ~free)].sum(1) * cap
    x = np.full(len(alpha_N), float(cap))
    x[free] = np.minimum(cap, np.linalg.solve(system_NN[np.ix_(free, free)], pressure))
    return x


# -------------------- the efficient graph


@cache
def threshold_graphs(N: int) -> np.ndarray:
    """All threshold (nested split) graphs on N nodes, (2^(N-1), N, N), nodes ordered by degree from high to
    low.

    A creation sequence adds nodes one by one, each either isolated or linked to all nodes before it
    (dominating)."""
    graphs = []
    for code in range(2 ** (N - 1)):
        dominating = [False] + [bool(code >> k & 1) for k in range(N - 1)]
        built_NN = empty_graph(N)
        for node in range(1, N):
            if dominating[node]:
                built_NN[node, :node] = built_NN[:node, node] = 1
        # Last-added dominating node first, ..., the first node, ..., last-added isolated node last. The order
        # in which they entered looks right and is not: the highest alpha would miss the most links.
        order = [n for n in reversed(range(N)) if dominating[n]] + [n for n in range(N) if not dominating[n]]
        graphs.append(built_NN[np.ix_(order, order)])
    graphs = np.stack(graphs)
    graphs.setflags(write=False)  # every caller gets this same array
    return graphs


def effort_cap(alpha_N, delta: float) -> float:
    """[choice] The smallest integer at least 1.5 times the largest planner effort (on the complete graph,
    where efforts are largest), so that the cap binds at no solution of any graph."""
    alpha_N = np.asarray(alpha_N, float)
    largest = solve_efforts(alpha_N, 2 * delta, complete_graph(len(alpha_N))).max()
    return float(math.ceil(1.5 * largest - 1e-9))  # 1.5 * 2.0000000000000004 is meant to be 3

"""BCZ, the network game of Ballester, Calvo-Armengol and Zenou (2006): the model and its exact solutions.

N agents first choose links, which form by mutual consent: the graph G has g_ij = 1 where i and j are linked.
Then each agent i chooses an effort x_i. A unit of effort earns alpha_i, plus delta times the sum of the
linked agents' efforts; effort x costs x^2 / 2. A link costs both of its ends c:

    payoff         pi_i = alpha_i x_i - x_i^2 / 2 + delta sum_j g_ij x_i x_j - c sum_j g_ij,   0 <= x_i <= cap

The derivative of pi_i in x_i is 0 at the best response. At the Nash efforts all agents respond best to each
other; the planner chooses the efforts that maximise the welfare sum_i pi_i, in which the delta x_i x_j of
every link occurs twice:

    best response  x_i = alpha_i + delta (G x)_i
    Nash           x   = (I -   delta G)^-1 alpha     needs   delta rho(G) < 1   (weighted Katz-Bonacich)
    planner        x   = (I - 2 delta G)^-1 alpha     needs 2 delta rho(G) < 1

rho(G) is the largest eigenvalue of G. Without this condition no efforts x >= 0 solve the equation; with the
cap there is always exactly one solution. The efficient graph has the highest welfare of all graphs, at Nash
or at planner efforts. In the code, `links_NN` is G and `efforts_N` is x. (games.py has Game, the interface;
prompts.py has Observation, what one seat knows.)
"""

import json
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from games import Game, GameError, empty_graph, register, solved_once
from prompts import Observation, tell_numbers, tell_partners
from world.efforts import effort_cap, effort_fixed_point


@register
@dataclass(frozen=True)
class BCZ(Game):
    """One instance: its parameters, in the notation above, and `stages`, `rounds` and `fee`, see
    games.Game."""

    name = "bcz"
    alpha: tuple[float, ...]
    delta: float
    c: float
    cap: float
    stages: str = "GE"
    rounds: int = 1
    fee: float = 0.0

    def __post_init__(self):
        self.check()
        if min(self.alpha) <= 0 or min(self.delta, self.c, self.fee) < 0 or self.cap <= 0:
            raise GameError("alpha and cap must be positive, delta, c and fee must not be negative")

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

    # The rules.

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """pi, (N,). A link costs each end c (1 + fee), see Game.link_cost; fee is 0 in the paper."""
        x = np.asarray(efforts_N, float)
        own = np.array(self.alpha) * x - x**2 / 2
        return own + self.delta * x * (links_NN @ x) - self.link_cost * links_NN.sum(1)

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """The effort with which each agent responds best to the efforts of the others, (N,)."""
        return np.clip(np.array(self.alpha) + self.delta * links_NN @ efforts_N, 0, self.cap)

    def planner_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """The effort of each agent that is best for the welfare, given those of the others, (N,)."""
        return np.clip(np.array(self.alpha) + 2 * self.delta * links_NN @ efforts_N, 0, self.cap)

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """The only efforts that are best responses to each other, (N,)."""
        return effort_fixed_point(self.alpha, self.delta, links_NN, self.cap)

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """The efforts with the highest welfare on this graph, (N,)."""
        return effort_fixed_point(self.alpha, 2 * self.delta, links_NN, self.cap)

    @solved_once
    def efficient_graph(self, solution: str = "nash") -> tuple[np.ndarray, float]:
        """(links_NN, welfare) of the best graph at `nash` or `planner` efforts.

        Where all links cost the same, some best graph is a threshold graph in which agents with a higher
        alpha have at least as many links: 2^(N-1) candidates instead of 2^(N(N-1)/2). (For equal alphas see
        Belhaj, Bervoets and Deroian, "Efficient networks in games with local complementarities", 2016; for
        others tests/world/test_bcz.py compares with all graphs. It holds while the cap does not bind, which
        `effort_cap` ensures.)"""
        by_alpha = np.argsort(-np.array(self.alpha), kind="stable")  # equal alphas stay in the order of seats
        best_links, best_welfare = empty_graph(self.N), -math.inf
        for graph_NN in threshold_graphs(self.N):
            links_NN = empty_graph(self.N)
            links_NN[np.ix_(by_alpha, by_alpha)] = graph_NN
            W = self.welfare(links_NN, self.solve_efforts(solution, links_NN))
            if W > best_welfare + 1e-12:
                best_links, best_welfare = links_NN, W
        return best_links, best_welfare

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """What agent i gains from the link ij at these efforts, delta x_i x_j - link_cost, for all i and j,
        (N, N)."""
        return self.delta * np.outer(efforts_N, efforts_N) - self.link_cost

    # The words, of which prompts.py makes what an agent reads.

    payoff_rule = "Payoff: alpha x - x^2/2 + delta x (sum of linked efforts) - c (links)."
    type_name = "alpha"
    parameter_format = ".3f"

    @classmethod
    def link_hint(cls, seen: Observation) -> str:
        """What each link of the seat earns, delta x_i x_j, in units of its cost c, if all agents link and
        play the best responses to efforts alpha."""
        delta, c = seen.parameters["delta"], seen.parameters["c"]
        if not c or seen.types is None:
            return ""
        response_N = [a + delta * (sum(seen.types) - a) for a in seen.types]
        earned_N = [delta * response_N[seen.seat] * x / c for x in response_N]
        earned_N[seen.seat] = 0
        return f"If all link, at best replies to alpha a link earns {tell_numbers(earned_N)} c"

    @classmethod
    def effort_facts(cls, seen: Observation) -> str:
        return tell_partners(seen)

    @classmethod
    def effort_hint(cls, seen: Observation) -> str:
        """The best response to efforts alpha."""
        linked = np.flatnonzero(seen.links[seen.seat])
        if seen.types is None or not len(linked):
            return ""
        response = seen.own_type + seen.parameters["delta"] * sum(seen.types[j] for j in linked)
        return f"Best reply to efforts alpha: {response:.2f}"

    # The draws: an instance is given by u = delta (N-1) and v = c / (delta mean(alpha)^2); their ranges in
    # training, their values in evaluation, and the lowest, highest and homogeneous alpha.

    fixable = ("delta", "c")
    ranges = ((0.15, 0.33), (0.6, 2.2))
    grid = ((0.2, 0.25, 0.3), (0.75, 1, 1.25, 1.5, 2))
    type_levels = (1.0, 3.0, 1.0)

    @classmethod
    def make(cls, types_N, u, v, fixed, stages, rounds) -> "BCZ":
        """The instance with alpha = types_N, (N,), and delta and c, fixed or from u and v; see Game.make."""
        alpha_N = np.asarray(types_N, float)
        delta = fixed.get("delta", round(float(u) / (len(alpha_N) - 1), 3))
        c = fixed.get("c", round(float(v * delta * alpha_N.mean() ** 2), 3))
        return cls(tuple(alpha_N.tolist()), delta, c, effort_cap(alpha_N, delta), stages, rounds)


# -------------------- the candidates for the efficient graph


@cache
def threshold_graphs(N: int) -> np.ndarray:
    """All threshold graphs (nested split graphs) on N nodes, (2^(N-1), N, N), each with its nodes in the
    order of falling degree. Such a graph is built node by node, and each new node is either isolated or
    dominating, that is, linked to all nodes before it."""
    built = []
    for code in range(2 ** (N - 1)):
        dominating = [False] + [bool(code >> k & 1) for k in range(N - 1)]
        built_NN = empty_graph(N)
        for node in range(1, N):
            if dominating[node]:
                built_NN[node, :node] = built_NN[:node, node] = 1
        # By falling degree: the dominating nodes from the last to the first, then the isolated ones from the
        # first to the last. In the order in which they were added, the highest alpha could get fewest links.
        order = [n for n in reversed(range(N)) if dominating[n]] + [n for n in range(N) if not dominating[n]]
        built.append(built_NN[np.ix_(order, order)])
    graphs = np.stack(built)
    graphs.setflags(write=False)  # all callers share this array
    return graphs

"""PGG, the public goods game on the groups of a network: the model and its exact solutions.

[source]: groups are cliques. [choice], the rest: groups are the maximal cliques with at least 2 members of
the formed graph; an agent with endowment e_i splits its contribution x_i in [0, e_i] evenly over its k_i
groups (without a group it is lost); a group C multiplies what it gets by r |C|^b and shares it evenly; each
of the deg_i links of an agent costs it c:

    pi_i = e_i - x_i + sum_{C containing i} (r |C|^b / |C|) sum_{j in C} x_j / k_j - c deg_i

Payoffs are linear in contributions, pi = e - x + M x - c deg, where M_ij = sum_{C containing i and j}
r |C|^(b-1) / k_j is the return to i of a unit that j contributes. So

    Nash      x_i = e_i where the private return M_ii is above 1, else 0: a dominant strategy
    planner   x_j = e_j where the social return sum_i M_ij is above 1, else 0

b = 0 is the textbook game. With b = 0.5 and r from 1.1 to 1.4, the defaults, contributing pays everybody
together, and nobody alone.
"""

import json
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from games import Game, GameError, complete_graph, empty_graph, register, solved_once
from prompts import Observation, tell_numbers

MAX_CLASSES = 8  # agents up to which all graphs are enumerated up to isomorphism: 12346 at 8


@register
@dataclass(frozen=True)
class PGG(Game):
    """One instance: its parameters, in the notation above, and `stages`, `rounds` and `fee`, see
    games.Game."""

    name = "pgg"
    scored_at = "planner"  # at Nash efforts mostly nobody contributes, and no link is worth anything
    endowment: tuple[float, ...]
    r: float
    b: float
    c: float
    stages: str = "GE"
    rounds: int = 1
    fee: float = 0.0

    def __post_init__(self):
        self.check()
        if min(self.endowment) <= 0 or self.r <= 0 or min(self.c, self.fee) < 0:
            raise GameError("endowments and the factor must be positive, cost and fee not negative")
        if not 0 <= self.b <= 10:  # 12 ** b would overflow for large b
            raise GameError(f"the size exponent must be 0 to 10, got {self.b:g}")

    @property
    def types(self) -> tuple[float, ...]:
        return self.endowment

    @property
    def key(self) -> str:
        return json.dumps(["pgg", sorted(self.endowment), self.r, self.b, self.c])

    @property
    def caps(self) -> np.ndarray:
        return np.array(self.endowment, float)

    @property
    def parameters(self) -> dict[str, float]:
        return {"r": self.r, "b": self.b, "c": self.c}

    # The rules.

    def returns(self, links_NN: np.ndarray) -> np.ndarray:
        """M (N, N) on this graph."""
        return returns(links_NN, self.r, self.b)

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        x = np.asarray(efforts_N, float)
        return self.caps - x + self.returns(links_NN) @ x - self.link_cost * links_NN.sum(1)

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        return self.nash_efforts(links_NN)

    def planner_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        return self.planner_efforts(links_NN)

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        return np.where(self.returns(links_NN).diagonal() > 1 + 1e-12, self.caps, 0.0)

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        return np.where(self.returns(links_NN).sum(0) > 1 + 1e-12, self.caps, 0.0)

    @solved_once
    def efficient_graph(self, solution: str = "nash") -> tuple[np.ndarray, float]:
        """(links_NN, welfare) of the best graph at `nash` or `planner` efforts. Raises GameError for more
        than 8 agents where all graphs would have to be enumerated.

        With L links, welfare is sum_j e_j + sum_j e_j w_j - 2 c L, where w_j is the social return - 1 of an
        agent that contributes, else 0. So on a given graph the agent with the highest endowment belongs to
        the node with the highest w, and so on."""
        N, e = self.N, self.caps
        if solution == "nash" and self.r * max(2.0 ** (self.b - 1), float(N) ** (self.b - 1)) <= 1:
            graphs = [empty_graph(N)]  # no private return is above 1 in any graph: nobody would contribute
        elif solution == "planner" and self.b >= 0.5:
            graphs = partitions(N)  # the best graph has groups of neighbours in the order of endowments
        elif N <= MAX_CLASSES:
            graphs = isomorphism_classes(N)
        else:
            raise GameError(
                f"the efficient graph of this public goods game is known for at most {MAX_CLASSES} agents "
                f"(for more, an exponent of at least 0.5, and a factor with which nobody gives alone)"
            )
        by_endowment = np.argsort(-e, kind="stable")  # equal endowments stay in the order of seats
        best_links, best_welfare = None, -np.inf
        for graph_NN in graphs:
            M = self.returns(graph_NN)
            decisive_N = M.sum(0) if solution == "planner" else M.diagonal()
            w_N = np.where(decisive_N > 1 + 1e-12, M.sum(0) - 1, 0.0)
            order = np.argsort(-w_N, kind="stable")
            W = e.sum() + w_N[order] @ e[by_endowment] - self.link_cost * graph_NN.sum()
            if W > best_welfare + 1e-9:
                links_NN = empty_graph(N)
                links_NN[np.ix_(by_endowment, by_endowment)] = graph_NN[np.ix_(order, order)]
                best_links, best_welfare = links_NN, W
        return best_links, float(best_welfare)

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """What agent i gains from the link ij at these efforts, with the other links as they are, (N, N)."""
        gains_NN, changed_NN = np.zeros((self.N, self.N)), links_NN.copy()
        for i in range(self.N):
            for j in range(i):
                changed_NN[i, j] = changed_NN[j, i] = 1
                linked_N = self.payoffs(changed_NN, efforts_N)
                changed_NN[i, j] = changed_NN[j, i] = 0
                gains_NN[i, j], gains_NN[j, i] = (linked_N - self.payoffs(changed_NN, efforts_N))[[i, j]]
                changed_NN[i, j] = changed_NN[j, i] = links_NN[i, j]
        return gains_NN

    # The words, of which prompts.py makes what an agent reads.

    payoff_rule = (
        "Groups: the largest sets of 2 or more who are all linked. Your effort x is split evenly over your "
        "groups; a group of k pays each member r k^b / k of what it gets. Payoff: e - x + what your groups "
        "pay - c (links)."
    )
    type_name = "e"

    @classmethod
    def link_hint(cls, seen: Observation) -> str:
        """For each other agent: what each member of a group gains by its last member, in units of c, if the
        group is the seat, the other agent and all between them in the order of endowments, and all give
        all."""
        r, b, c = (seen.parameters[name] for name in "rbc")
        if not c or seen.types is None:
            return ""
        e, order = seen.types, sorted(range(seen.N), key=lambda i: -seen.types[i])

        def each_gets(members: list[int]) -> float:  # of the group, without the cost of links
            k = len(members)
            return sum(e[i] for i in members) * (r * k**b - 1) / k if k > 1 else 0.0

        worth = [0.0] * seen.N
        for j in range(seen.N):
            if j != seen.seat:
                first, last = sorted((order.index(seen.seat), order.index(j)))
                group = order[first : last + 1]
                worth[j] = (each_gets(group) - each_gets([i for i in group if i != j])) / c
        rule = "If you and all in riches up to an agent give all in one group, its link earns each"
        return f"{rule} {tell_numbers(worth)} c"

    @classmethod
    def effort_facts(cls, seen: Observation) -> str:
        """The own groups."""
        own = [group for group in groups(seen.links) if seen.seat in group]
        return f"your groups: {', '.join('-'.join(str(i + 1) for i in group) for group in own) or 'none'}"

    @classmethod
    def effort_hint(cls, seen: Observation) -> str:
        """The private and the social return of a unit, if there is a group."""
        if not seen.links[seen.seat].any():
            return ""
        M = returns(seen.links, seen.parameters["r"], seen.parameters["b"])
        own, social = M[seen.seat, seen.seat], M[:, seen.seat].sum()
        return f"A unit you give returns {own:.2f} to you, {social:.2f} to all"

    # The draws: u is r, v is c / mean(e); b is 0.5 unless it is fixed.

    fixable, constant = ("r", "b", "c"), ("b",)
    ranges = ((1.1, 1.4), (0.1, 0.9))  # this r is a dilemma in every group
    grid = ((1.15, 1.25, 1.35), (0.1, 0.3, 0.5, 0.7, 0.9))
    type_levels = (5.0, 15.0, 10.0)

    @classmethod
    def make(cls, types_N, u, v, fixed, stages, rounds) -> "PGG":
        e_N = np.asarray(types_N, float)
        r, c = fixed.get("r", round(float(u), 2)), fixed.get("c", round(float(v * e_N.mean()), 2))
        return cls(tuple(e_N.tolist()), r, fixed.get("b", 0.5), c, stages, rounds)


# -------------------- groups


def groups(links_NN: np.ndarray) -> list[list[int]]:
    """The maximal cliques with at least 2 members, each sorted (Bron and Kerbosch 1973, sets as bits)."""
    N = len(links_NN)
    neighbours = [sum(1 << j for j in range(N) if links_NN[i][j]) for i in range(N)]
    cliques = []

    def grow(clique: int, candidates: int, done: int) -> None:
        if not candidates | done:
            cliques.append([i for i in range(N) if clique >> i & 1])
        while candidates:
            i = candidates.bit_length() - 1
            grow(clique | 1 << i, candidates & neighbours[i], done & neighbours[i])
            candidates ^= 1 << i
            done |= 1 << i

    grow(0, (1 << N) - 1, 0)
    return sorted(clique for clique in cliques if len(clique) > 1)


def returns(links_NN: np.ndarray, r: float, b: float) -> np.ndarray:
    """M: the return to agent i of a unit that j contributes, (N, N)."""
    return _returns(np.asarray(links_NN, int).tobytes(), len(links_NN), r, b)


@lru_cache(maxsize=2**17)
def _returns(links: bytes, N: int, r: float, b: float) -> np.ndarray:
    M = np.zeros((N, N))
    groups_C = groups(np.frombuffer(links, dtype=int).reshape(N, N).tolist())
    if groups_C:
        member_CN = np.array([[i in group for i in range(N)] for group in groups_C], float)
        size_C = member_CN.sum(1)
        M = (member_CN.T * (r * size_C ** (b - 1))) @ member_CN / np.maximum(member_CN.sum(0), 1)
    M.setflags(write=False)  # all callers share this array
    return M


# -------------------- the candidates for the efficient graph


def partitions(N: int) -> list[np.ndarray]:
    """Graphs of disjoint cliques of neighbours in the order 0 .. N-1, one for each of the 2^(N-1) ways to cut
    that order into pieces."""
    graphs = []
    for code in range(2 ** (N - 1)):
        block = np.cumsum([0] + [code >> k & 1 for k in range(N - 1)])
        graphs.append((block[:, None] == block) * complete_graph(N))
    return graphs


@cache
def isomorphism_classes(N: int) -> tuple[np.ndarray, ...]:
    """One graph (N, N) of every isomorphism class: 1, 2, 4, 11, 34, 156, 1044, 12346 for N = 1 .. 8.

    Every graph on N nodes is one on N - 1 nodes and a new node. Two graphs count as isomorphic if their pairs
    of nodes have the same colours, where the colour of a pair is refined by those of the triangles on it
    (two-dimensional Weisfeiler-Leman refinement). This distinguishes all graphs of this size: the smallest
    that it cannot distinguish have 16 nodes."""
    if N == 1:
        return (np.zeros((1, 1), int),)
    rows_RN = (np.arange(2 ** (N - 1))[:, None] >> np.arange(N - 1)) & 1  # the links of the new node
    classes: dict[bytes, np.ndarray] = {}  # by the sorted colours of all pairs
    for smaller_NN in isomorphism_classes(N - 1):
        graphs_RNN = np.zeros((len(rows_RN), N, N), int)
        graphs_RNN[:, :-1, :-1] = smaller_NN
        graphs_RNN[:, -1, :-1] = graphs_RNN[:, :-1, -1] = rows_RN
        colour = (graphs_RNN + 2 * np.eye(N, dtype=int)).astype(np.uint64)
        for _ in range(4):
            triangles = _mix(
                colour[:, :, :, None] * np.uint64(3) + colour[:, None, :, :] * np.uint64(0x9E3779B97F4A7C15)
            )
            colour = _mix(colour + _mix(triangles.sum(2)))
        for graph_NN, colours in zip(graphs_RNN, np.sort(colour.reshape(len(colour), -1), 1), strict=True):
            classes.setdefault(colours.tobytes(), graph_NN)
    return tuple(classes.values())


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers (splitmix64): a sum of hashes identifies a multiset of numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

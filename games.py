"""The BCZ network game (Ballester, Calvo-Armengol, Zenou 2006): rules, exact solutions, instances, states.

Agents first choose links, then efforts. NumPy only: nothing here knows about language models.

Marks: [source] is fixed by the ToMPO paper (arXiv 2509.21134), [choice] is decided by this project.
Shapes: N agents. `links_NN` (the paper's G) and `proposals_NN` (P) are 0/1 integer arrays with a zero diagonal,
`efforts_N` (x) and `alpha_N` are floats. Row i belongs to agent (seat) i, counted from 0.

    payoff        pi_i = alpha_i x_i - x_i^2/2 + delta sum_j g_ij x_i x_j - c sum_j g_ij,   x_i >= 0
    best response x_i  = alpha_i + delta (G x)_i
    Nash          x    = (I -   delta G)^-1 alpha     exists iff   delta rho(G) < 1   (weighted Katz-Bonacich)
    planner       x    = (I - 2 delta G)^-1 alpha     exists iff 2 delta rho(G) < 1   (maximises welfare, sum_i pi_i)
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

ALPHA_KINDS = ("homogeneous", "linear", "half", "hub")
MAX_AGENTS = 12  # 2^(N-1) threshold graphs are enumerated: 2048 at 12


class GameError(ValueError):
    """Game parameters that describe no playable game. The message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# rules


@dataclass(frozen=True)
class Game:
    """One instance. Frozen and hashable, so that solutions can be cached per instance.

    alpha: standalone marginal return of each agent's effort (N,); delta: complementarity; c: cost of a link, paid at
    both ends; cap: the largest allowed effort; stages: the stages of a round, `G` links, `E` efforts; rounds: T.
    """

    alpha: tuple[float, ...]
    delta: float
    c: float
    cap: float
    stages: str = "GE"
    rounds: int = 1

    def __post_init__(self):
        numbers = (*self.alpha, self.delta, self.c, self.cap)
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
            raise GameError("game parameters must be finite numbers")
        if not 2 <= self.N <= MAX_AGENTS:
            raise GameError(f"a game needs 2 to {MAX_AGENTS} agents, got {self.N}")
        if min(self.alpha) <= 0 or self.delta < 0 or self.c < 0 or self.cap <= 0:
            raise GameError("alpha and cap must be positive, delta and c must not be negative")
        if not self.stages.startswith("G") or not self.stages.endswith("E") or set(self.stages) - set("GE"):
            raise GameError(f"stages must be letters G and E that start with G and end with E, got {self.stages!r}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise GameError(f"rounds must be a whole number from 1, got {self.rounds}")

    @property
    def N(self) -> int:
        return len(self.alpha)

    @property
    def key(self) -> str:
        """Names the instance whatever its seat order: instances that differ only in seats are the same instance."""
        return json.dumps([sorted(self.alpha), self.delta, self.c])

    def to_json(self) -> dict:
        return asdict(self) | {"alpha": list(self.alpha)}

    @staticmethod
    def from_json(d: dict) -> "Game":
        try:
            return Game(tuple(d["alpha"]), d["delta"], d["c"], d["cap"], d["stages"], d["rounds"])
        except (KeyError, TypeError, AttributeError, OverflowError) as e:
            raise GameError(f"not a game instance ({type(e).__name__}: {e})") from None


def form_links(proposals_NN: np.ndarray) -> np.ndarray:
    """Links need mutual consent: G = P and P^T."""
    return proposals_NN & proposals_NN.T


def payoffs(game: Game, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
    """pi (N,) of the payoff equation at the top of this file."""
    x = np.asarray(efforts_N, float)
    return np.array(game.alpha) * x - x**2 / 2 + game.delta * x * (links_NN @ x) - game.c * links_NN.sum(1)


def welfare(game: Game, links_NN: np.ndarray, efforts_N: np.ndarray) -> float:
    return float(payoffs(game, links_NN, efforts_N).sum())


# ---------------------------------------------------------------------------------------------------------------------
# solutions for a given graph


def solve_efforts(alpha_N, coupling: float, links_NN: np.ndarray, cap: float | None = None) -> np.ndarray:
    """The fixed point of x = alpha + coupling G x, or with a cap m of x = min(m, alpha + coupling G x); shape (N,).

    Without a cap it exists (with x >= 0) iff I - coupling G is positive definite. That is what is tested: `inv` of an
    indefinite matrix would return negative efforts and absurd welfare without complaint. With a cap there is exactly
    one fixed point for any coupling >= 0. Raises GameError where there is no solution.
    """
    alpha_N = np.asarray(alpha_N, float)
    system_NN = np.eye(len(alpha_N)) - coupling * links_NN
    try:
        np.linalg.cholesky(system_NN - 1e-12 * np.eye(len(alpha_N)))  # singular up to rounding is not definite
        x = np.linalg.solve(system_NN, alpha_N)
        if cap is None or x.max() <= cap:
            return x
    except np.linalg.LinAlgError:
        if cap is None:
            raise GameError(
                f"efforts have no finite solution: coupling * rho(G) = "
                f"{coupling * np.linalg.eigvalsh(links_NN).max():.3f} must be below 1; lower delta or give an effort cap"
            ) from None
    # From below the iteration rises monotonically to the fixed point, so nobody who reaches the cap leaves it again.
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


def best_response(game: Game, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
    """Every agent's best effort against the others' efforts, (N,): alpha + delta G x, clipped to [0, cap]."""
    return np.clip(np.array(game.alpha) + game.delta * links_NN @ efforts_N, 0, game.cap)


def nash_efforts(game: Game, links_NN: np.ndarray) -> np.ndarray:
    return solve_efforts(game.alpha, game.delta, links_NN, game.cap)


def planner_efforts(game: Game, links_NN: np.ndarray) -> np.ndarray:
    return solve_efforts(game.alpha, 2 * game.delta, links_NN, game.cap)


EFFORTS = {"nash": nash_efforts, "planner": planner_efforts}


# ---------------------------------------------------------------------------------------------------------------------
# solutions that choose the graph


def complete_graph(N: int) -> np.ndarray:
    return 1 - np.eye(N, dtype=int)


def empty_graph(N: int) -> np.ndarray:
    return np.zeros((N, N), int)


@lru_cache(maxsize=None)
def threshold_graphs(N: int) -> np.ndarray:
    """All threshold (nested split) graphs on N nodes, (2^(N-1), N, N), nodes ordered by degree from high to low.

    A creation sequence adds nodes one by one, each either isolated or linked to all nodes before it (dominating).
    """
    graphs = []
    for code in range(2 ** (N - 1)):
        dominating = [False] + [bool(code >> k & 1) for k in range(N - 1)]
        built_NN = empty_graph(N)
        for node in range(1, N):
            if dominating[node]:
                built_NN[node, :node] = built_NN[:node, node] = 1
        # Last-added dominating node first, ..., the first node, ..., last-added isolated node last. The order in which
        # they entered looks right and is not: the highest alpha would miss the most links.
        order = [n for n in reversed(range(N)) if dominating[n]] + [n for n in range(N) if not dominating[n]]
        graphs.append(built_NN[np.ix_(order, order)])
    graphs = np.stack(graphs)
    graphs.setflags(write=False)  # every caller gets this same array
    return graphs


@lru_cache(maxsize=4096)
def _efficient_graph(game: Game, efforts: str) -> tuple[bytes, float]:
    by_alpha = np.argsort(-np.array(game.alpha), kind="stable")  # equal alphas keep their seat order
    best_links, best_welfare = None, -math.inf
    for graph_NN in threshold_graphs(game.N):
        links_NN = empty_graph(game.N)
        links_NN[np.ix_(by_alpha, by_alpha)] = graph_NN
        W = welfare(game, links_NN, EFFORTS[efforts](game, links_NN))
        if W > best_welfare + 1e-12:
            best_links, best_welfare = links_NN, W
    return best_links.tobytes(), best_welfare


def efficient_graph(game: Game, efforts: str = "nash") -> tuple[np.ndarray, float]:
    """(links_NN, welfare) of the graph with the highest welfare at `nash` or at `planner` efforts. Exact.

    Links cost the same everywhere, so some optimum is a threshold graph whose degree order follows alpha: 2^(N-1)
    candidates instead of 2^(N(N-1)/2). (Holds while the cap does not bind, which `effort_cap` sees to.)
    """
    links, W = _efficient_graph(game, efforts)
    return np.frombuffer(links, dtype=int).reshape(game.N, game.N).copy(), W


def critical_cost(alpha: float, delta: float, N: int, efforts: str = "nash") -> float:
    """c* of the homogeneous game: the efficient graph is complete iff c < c*, else empty; p = delta (N-1)."""
    p = delta * (N - 1)
    if efforts == "nash":
        return alpha**2 * ((1 - p) ** -2 - 1) / (2 * (N - 1))
    return alpha**2 * delta / (1 - 2 * p)


def nash_graph(game: Game) -> np.ndarray:
    """The greatest equilibrium: from the complete graph, repeat "keep a link iff delta x_i x_j >= c", x at Nash.

    Dropping links lowers efforts, which drops more links, so the iteration only ever removes and ends. It is an
    equilibrium of link choices at given efforts: nobody drops a link for c more than it earns as things stand.
    """
    links_NN = complete_graph(game.N)
    while True:
        x = nash_efforts(game, links_NN)
        kept_NN = links_NN * (game.delta * np.outer(x, x) >= game.c)
        if (kept_NN == links_NN).all():
            return links_NN
        links_NN = kept_NN


def own_rows(N: int, seat: int) -> np.ndarray:
    """All 2^(N-1) rows an agent can propose, (2^(N-1), N): 0/1 with a 0 in its own position."""
    bits = (np.arange(2 ** (N - 1))[:, None] >> np.arange(N - 1)) & 1
    return np.insert(bits, seat, 0, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# instances


def alpha_of_kind(kind: str, N: int) -> np.ndarray:
    if kind == "homogeneous":
        return np.ones(N)
    if kind == "linear":
        return np.round(np.linspace(1, 3, N), 2)
    if kind == "half":
        return np.where(np.arange(N) < (N + 1) // 2, 3.0, 1.0)
    if kind == "hub":
        return np.where(np.arange(N) == 0, 3.0, 1.0)
    raise GameError(f"unknown kind of alpha {kind!r}; choose from {', '.join(ALPHA_KINDS)}")


def effort_cap(alpha_N, delta: float) -> float:
    """[choice] The smallest integer at least 1.5 times the largest planner effort (on the complete graph, where
    efforts are largest), so that the cap binds at no solution of any graph."""
    alpha_N = np.asarray(alpha_N, float)
    largest = solve_efforts(alpha_N, 2 * delta, complete_graph(len(alpha_N))).max()
    return float(math.ceil(1.5 * largest - 1e-9))  # 1.5 * 2.0000000000000004 is meant to be 3


def make_game(alpha_N, p: float, g: float, stages: str = "GE", rounds: int = 1) -> Game:
    """The instance with p = delta (N-1) and g = c / (delta mean(alpha)^2), rounded to the digits the players read
    (and then solved as rounded)."""
    alpha_N = np.asarray(alpha_N, float)
    delta = round(float(p) / (len(alpha_N) - 1), 3)
    c = round(float(g * delta * alpha_N.mean() ** 2), 3)
    return Game(tuple(alpha_N.tolist()), delta, c, effort_cap(alpha_N, delta), stages, rounds)


@lru_cache(maxsize=None)
def held_out_grid(N: int, stages: str = "GE", rounds: int = 1) -> tuple[Game, ...]:
    """[choice] The fixed evaluation grid: p x g x the four kinds of alpha, in a fixed random seat order; 60 games."""
    rng = np.random.default_rng(0)
    return tuple(
        make_game(rng.permutation(alpha_of_kind(kind, N)), p, g, stages, rounds)
        for kind in ALPHA_KINDS
        for p in (0.2, 0.25, 0.3)
        for g in (0.75, 1, 1.25, 1.5, 2)
    )


@lru_cache(maxsize=None)
def _grid_keys(N: int) -> frozenset[str]:
    return frozenset(game.key for game in held_out_grid(N))


def split_of(game: Game) -> str:
    """`held-out` or `train`: a tenth of all instances, by a hash of the instance, and the whole grid are held out."""
    return "held-out" if game.key in _grid_keys(game.N) or zlib.crc32(game.key.encode()) % 10 == 0 else "train"


def draw_game(
    rng: np.random.Generator, N: int, split: str = "train", kinds=ALPHA_KINDS, stages: str = "GE", rounds: int = 1
) -> Game:
    """[choice] One random instance of a split: p in 0.15..0.33, g in 0.6..2.2, a kind of alpha, a seat order.
    No instance is ever drawn in both splits, in any seat order."""
    if split not in ("train", "held-out"):
        raise GameError(f"unknown split {split!r}; choose train or held-out")
    while True:
        kind = kinds[rng.integers(len(kinds))]
        alpha_N = rng.permutation(alpha_of_kind(kind, N))
        game = make_game(alpha_N, rng.uniform(0.15, 0.33), rng.uniform(0.6, 2.2), stages, rounds)
        if split_of(game) == split:
            return game


# ---------------------------------------------------------------------------------------------------------------------
# play


@dataclass(frozen=True, eq=False)
class State:
    """What has happened so far: for each finished stage the actions, proposals (N, N) or efforts (N,).

    [choice] A later stage of the same kind revises the earlier one; the round pays once, at its end.
    """

    game: Game
    history: tuple[np.ndarray, ...] = ()

    @property
    def done(self) -> bool:
        return len(self.history) == self.game.rounds * len(self.game.stages)

    @property
    def round(self) -> int:
        """Counted from 1."""
        return len(self.history) // len(self.game.stages) + 1

    @property
    def kind(self) -> str:
        """`G` or `E`: what is chosen next."""
        return self.game.stages[len(self.history) % len(self.game.stages)]

    def last(self, kind: str) -> np.ndarray | None:
        """The latest actions of a kind, None before there were any."""
        for actions in reversed(self.history):
            if (actions.ndim == 2) == (kind == "G"):
                return actions
        return None

    @property
    def links(self) -> np.ndarray | None:
        proposals_NN = self.last("G")
        return None if proposals_NN is None else form_links(proposals_NN)

    @property
    def efforts(self) -> np.ndarray | None:
        return self.last("E")

    def before(self, stage: int) -> "State":
        """The state in which the stage-th decision of the game (from 0) was taken."""
        return State(self.game, self.history[:stage])

    def step(self, actions: np.ndarray) -> "State":
        """All agents act at once. Raises ValueError for actions that the rules do not allow."""
        if self.done:
            raise ValueError("the game is over")
        N, actions = self.game.N, np.asarray(actions)
        if self.kind == "G":
            if actions.shape != (N, N) or not np.isin(actions, (0, 1)).all() or actions.diagonal().any():
                raise ValueError(f"proposals must be {N} x {N} entries in {{0, 1}} with a zero diagonal")
            actions = actions.astype(int)
        elif actions.shape != (N,) or not ((actions >= 0) & (actions <= self.game.cap)).all():
            raise ValueError(f"efforts must be {N} numbers in [0, {self.game.cap:g}]")
        else:
            actions = actions.astype(float)  # a copy: the caller's array may change later, history must not
        return State(self.game, (*self.history, actions))

    def round_results(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(links_NN, efforts_N, payoffs_N) at the end of every finished round."""
        per_round = len(self.game.stages)
        ends = [self.before(k) for k in range(per_round, len(self.history) + 1, per_round)]
        return [(s.links, s.efforts, payoffs(self.game, s.links, s.efforts)) for s in ends]


@dataclass(frozen=True, eq=False)
class Observation:
    """What one seat knows when it decides: a function of (state, seat) and of nothing else."""

    N: int
    seat: int
    own_alpha: float
    alpha: tuple[float, ...] | None  # everybody's, None under `local` information
    delta: float
    c: float
    cap: float
    stages: str
    rounds: int
    round: int
    kind: str
    previous: str | None  # the kind of the stage before, whose result is news
    links: np.ndarray | None
    efforts: np.ndarray | None
    last_payoff: float | None  # own, of the last finished round


def observe(state: State, seat: int, information: str = "full") -> Observation:
    """`full`: everyone's alpha is known; `local`: only one's own. The results of finished stages are public.
    (c and the cap were set with everybody's alpha in view, so even `local` tells a little of the others.)"""
    if information not in ("full", "local"):
        raise ValueError(f"information must be full or local, got {information!r}")
    game, results = state.game, state.round_results()
    return Observation(
        N=game.N,
        seat=seat,
        own_alpha=game.alpha[seat],
        alpha=game.alpha if information == "full" else None,
        delta=game.delta,
        c=game.c,
        cap=game.cap,
        stages=game.stages,
        rounds=game.rounds,
        round=state.round,
        kind=state.kind,
        previous=game.stages[(len(state.history) - 1) % len(game.stages)] if state.history else None,
        links=state.links,
        efforts=state.efforts,
        last_payoff=float(results[-1][2][seat]) if results else None,
    )

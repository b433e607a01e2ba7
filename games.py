"""What all games have in common: rules, stages, states, what a seat observes. NumPy only, no language models.

Agents choose links, then efforts. A game is one file with a `@register`ed subclass of Game: world/bcz.py, the
default, is the network game of Ballester, Calvo-Armengol and Zenou; docs/your-own-game.md writes another.
[source] is fixed by the ToMPO paper (arXiv 2509.21134), [choice] by this project.

Shapes: N agents. `links_NN` (the paper's G) and `proposals_NN` (P) are 0/1 integer arrays with a zero
diagonal, `efforts_N` (x) are floats. Row i belongs to agent (seat) i, counted from 0.
"""

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import numpy as np

LARGEST = 1e6  # of a game's parameters: beyond it, payoffs would overflow or lose their digits
MAX_AGENTS = 12  # 2^(N-1) candidates for the efficient graph are enumerated: 2048 at 12


class GameError(ValueError):
    """Game parameters that describe no playable game. The message is one line."""


def form_links(proposals_NN: np.ndarray) -> np.ndarray:
    """Links need mutual consent: G = P and P^T."""
    return proposals_NN & proposals_NN.T


def complete_graph(N: int) -> np.ndarray:
    return 1 - np.eye(N, dtype=int)


def empty_graph(N: int) -> np.ndarray:
    return np.zeros((N, N), int)


def own_rows(N: int, seat: int) -> np.ndarray:
    """All 2^(N-1) rows an agent can propose, (2^(N-1), N): 0/1 with a 0 in its own position."""
    bits = (np.arange(2 ** (N - 1))[:, None] >> np.arange(N - 1)) & 1
    return np.insert(bits, seat, 0, axis=1)


# -------------------- rules


class Game:
    """One instance of a game: a frozen, hashable dataclass, so that its solutions can be kept.

    A subclass has its parameters, `c` (cost of a link, paid at both ends), `stages` and `rounds` as fields,
    and defines what the comments "Each game, ..." announce. [choice] A later stage of the same kind revises
    the earlier one; the round pays once, at its end, from the last graph and the last efforts."""

    # Each game, its rules. Shapes of the methods' results: see above; efforts and payoffs are (N,).
    name: ClassVar[str]  # as in --game
    scored_at: ClassVar[str] = "nash"  # the efforts at which the welfare score of a graph is counted
    c: float
    stages: str  # of a round: `G` links, `E` efforts
    rounds: int  # T
    types: tuple[float, ...]  # what tells agents apart, (N,): BCZ's alpha, PGG's endowments
    key: str  # names the instance: instances that differ only in seat order and stages are the same
    caps: np.ndarray  # the largest allowed effort of each agent, (N,)
    parameters: dict[str, float]  # what the rules tell every player, apart from types and caps

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """pi (N,)."""
        raise NotImplementedError

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """Every agent's best effort against the others' efforts, (N,)."""
        raise NotImplementedError

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """The efforts with the highest welfare on this graph, (N,)."""
        raise NotImplementedError

    def efficient_graph(self, efforts: str = "nash") -> tuple[np.ndarray, float]:
        """(links_NN, welfare) of the graph of highest welfare at `nash` or `planner` efforts. Exact; see
        world/solved.py."""
        raise NotImplementedError

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """[i, j]: what i gains from the link ij at these efforts, all other links as they are; (N, N)."""
        raise NotImplementedError

    # Each game, its words: what an agent reads is made of these by prompts.py, from what the seat observes
    # alone.
    payoff_rule: ClassVar[str]  # one sentence
    type_name: ClassVar[str]  # what `types` are called, such as alpha
    parameter_format: ClassVar[str] = "g"

    @classmethod
    def link_hint(cls, seen: "Observation") -> str:
        """A worked number beside the question about links, "" for none."""
        return ""

    @classmethod
    def effort_facts(cls, seen: "Observation", hints: bool) -> str:
        """What the links mean for the agent, beside the question about efforts; with a worked number if
        `hints`."""
        return ""

    # Each game, its draws: two free numbers u and v and the agents' types make an instance (world/draws.py).
    fixable: ClassVar[tuple[str, ...]]  # parameters that --fix can hold fixed
    ranges: ClassVar[tuple[tuple[float, float], tuple[float, float]]]  # of u and v in training, both uniform
    grid: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # their values in evaluation
    type_levels: ClassVar[tuple[float, float, float]]  # lowest, highest, and that of homogeneous agents

    @classmethod
    def make(cls, types_N, u: float, v: float, fixed: dict[str, float], stages: str, rounds: int) -> "Game":
        """The instance, rounded to the digits that players read. fixed: by name. Raises GameError."""
        raise NotImplementedError

    # all games

    def check(self) -> None:
        """GameError for what no game allows; every game's __post_init__ calls it."""
        values = [getattr(self, f.name) for f in fields(self) if f.name not in ("stages", "rounds")]
        numbers = [v for value in values for v in np.atleast_1d(value)]
        if not all(isinstance(v, (int, float, np.number)) and abs(v) <= LARGEST for v in numbers):
            raise GameError(f"game parameters must be finite numbers, of at most {LARGEST:g}")
        if not 2 <= self.N <= MAX_AGENTS:
            raise GameError(f"a game needs 2 to {MAX_AGENTS} agents, got {self.N}")
        check_stages(self.stages)
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise GameError(f"rounds must be a whole number from 1, got {self.rounds}")

    @property
    def N(self) -> int:
        return len(self.types)

    @property
    def label(self) -> str:
        """The game and its stages, such as BCZ-GE."""
        return f"{self.name.upper()}-{self.stages}"

    def to_json(self) -> dict:
        fields_of = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"game": self.name} | fields_of

    def welfare(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> float:
        return float(self.payoffs(links_NN, efforts_N).sum())

    def efforts(self, solution: str, links_NN: np.ndarray) -> np.ndarray:
        """solution: `nash` or `planner`."""
        return {"nash": self.nash_efforts, "planner": self.planner_efforts}[solution](links_NN)

    def nash_graph(self) -> np.ndarray:
        """From the complete graph, repeat "keep a link iff neither end gains without it", efforts at Nash. It
        only removes, so it ends, and nobody drops a link that is left. In BCZ it is the greatest such graph:
        dropping links lowers efforts, which drops more links."""
        links_NN = complete_graph(self.N)
        while True:
            keeps_NN = self.link_gains(links_NN, self.nash_efforts(links_NN)) >= 0
            kept_NN = links_NN * (keeps_NN & keeps_NN.T)
            if (kept_NN == links_NN).all():
                return links_NN
            links_NN = kept_NN


GAMES: dict[str, type[Game]] = {}  # by name, as in --game


def register(game: type[Game]) -> type[Game]:
    """Class decorator: from now on --game, data sets and prompts know this game by its name."""
    GAMES[game.name] = game
    return game


def game_from_json(d: dict) -> Game:
    """The instance that `to_json` wrote. Raises GameError."""
    try:
        game = GAMES[d["game"]]
        values = {f.name: d[f.name] for f in fields(game)}
        return game(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise GameError(f"not a game instance ({type(e).__name__}: {e})") from None


def check_stages(stages: str) -> None:
    if not isinstance(stages, str) or set(stages) != {"G", "E"}:
        raise GameError(f"stages must be a string of G (links) and E (efforts), such as GE, got {stages!r}")


# -------------------- play


@dataclass(frozen=True, eq=False)
class State:
    """What has happened so far: for each finished stage the actions, proposals (N, N) or efforts (N,)."""

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
    def links(self) -> np.ndarray:
        """The graph as it stands, (N, N): nobody is linked before the first links."""
        proposals_NN = self.last("G")
        return empty_graph(self.game.N) if proposals_NN is None else form_links(proposals_NN)

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
        elif actions.shape != (N,) or not ((actions >= 0) & (actions <= self.game.caps)).all():
            raise ValueError(f"efforts must be {N} numbers from 0 to the cap of the seat")
        else:
            actions = actions.astype(float)  # a copy: the caller's array may change later, history must not
        return State(self.game, (*self.history, actions))

    def round_results(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(links_NN, efforts_N, payoffs_N) at the end of every finished round."""
        per_round = len(self.game.stages)
        ends = [self.before(k) for k in range(per_round, len(self.history) + 1, per_round)]
        return [(s.links, s.efforts, self.game.payoffs(s.links, s.efforts)) for s in ends]


@dataclass(frozen=True, eq=False)
class Observation:
    """What one seat knows when it decides: a function of (state, seat) and of nothing else."""

    game: str
    N: int
    seat: int
    own_type: float
    types: tuple[float, ...] | None  # everybody's, None under `local` information
    parameters: dict[str, float]
    cap: float
    stages: str
    rounds: int
    round: int
    stage: int  # of the round, from 0
    kind: str
    previous: str | None  # the kind of the stage before, whose result is news
    links: np.ndarray
    efforts: np.ndarray | None
    last_payoff: float | None  # own, of the last finished round


def observe(state: State, seat: int, information: str = "full") -> Observation:
    """`full`: everyone's type is known; `local`: only one's own. The results of finished stages are public.
    (c and BCZ's cap were set with all types in view, so even `local` tells a little of the others.)"""
    if information not in ("full", "local"):
        raise ValueError(f"information must be full or local, got {information!r}")
    game, per_round = state.game, len(state.game.stages)
    ended = state.before(len(state.history) // per_round * per_round)  # the end of the last finished round
    return Observation(
        game=game.name,
        N=game.N,
        seat=seat,
        own_type=game.types[seat],
        types=game.types if information == "full" else None,
        parameters=game.parameters,
        cap=float(game.caps[seat]),
        stages=game.stages,
        rounds=game.rounds,
        round=state.round,
        stage=len(state.history) % len(game.stages),
        kind=state.kind,
        previous=game.stages[(len(state.history) - 1) % len(game.stages)] if state.history else None,
        links=state.links,
        efforts=state.efforts,
        last_payoff=float(game.payoffs(ended.links, ended.efforts)[seat]) if ended.history else None,
    )

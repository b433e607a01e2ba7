"""What all games have in common, in NumPy alone. Read world/bcz.py first: it is one whole game.

A round is a string of stages, such as `GE`; in each of them all agents decide at once, in G about links and
in E about efforts. Below are a Game, its rules and solutions (docs/your-own-game.md adds one); a Kind of
decision (decisions.py defines links and efforts); and the State of a game that is played. [source] is fixed
by the ToMPO paper (arXiv 2509.21134), [choice] by this project.

Shapes: N agents. An agent's row says whom it proposes a link to; the rows of all are `proposals_NN` (the
paper's P). The links that form are the graph, `links_NN` (G). Both are 0/1 integer arrays with a zero
diagonal; `efforts_N` (x) are floats. Row i belongs to agent (seat) i, counted from 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, wraps
from typing import Any, ClassVar, NamedTuple

import numpy as np

from run.errors import InputError

LARGEST_PARAMETER = 1e6  # with larger game parameters, payoffs overflow or lose precision
MAX_AGENTS = 12  # 2^(N-1) candidates for the efficient graph are enumerated: 2048 at 12


class GameError(InputError):
    """Game parameters that describe no playable game. The message is one line."""


def form_links(proposals_NN: np.ndarray) -> np.ndarray:
    """Links need mutual consent: G = P and P^T."""
    return proposals_NN & proposals_NN.T


def complete_graph(N: int) -> np.ndarray:
    return 1 - np.eye(N, dtype=int)


def empty_graph(N: int) -> np.ndarray:
    return np.zeros((N, N), int)


# -------------------- rules


class Game:
    """One instance of a game: a frozen, hashable dataclass, so that its solutions can be cached.

    A subclass declares its parameters, `c`, `stages`, `rounds` and `fee` as fields, and defines all that has
    no default under the three headings "Each game". [choice] A later stage of the same kind revises the
    earlier one (in GEE the second efforts replace the first); the round pays once, at its end."""

    # Each game: its rules. Efforts and payoffs are (N,).
    name: ClassVar[str]  # as in --game
    scored_at: ClassVar[str] = "nash"  # or "planner": the efforts at which links are valued
    c: float  # cost of a link, paid at both ends
    fee: float = 0.0  # [choice] what a proposal costs, answered or not, as a share of c; 0 in the paper
    stages: str  # the stages of a round, by the letters of their kinds: `G` links, `E` efforts
    rounds: int  # T
    __dataclass_fields__: ClassVar[dict[str, Any]]  # every game is a dataclass

    @property
    def types(self) -> tuple[float, ...]:
        """What tells agents apart, (N,): BCZ's alpha, PGG's endowments."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """The same for all orders of seats, stages, rounds and fees; for Memory and the held-out split."""
        raise NotImplementedError

    @property
    def seated_key(self) -> str:
        """One name for all stages of an instance in this order of the seats."""
        return f"{self.key} {self.types}"

    @property
    def caps(self) -> np.ndarray:
        """The largest allowed effort of each agent, (N,)."""
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, float]:
        """What the rules tell every player, apart from types and caps."""
        raise NotImplementedError

    def payoffs(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """pi (N,), where every proposal is answered, so that each end of a link pays `link_cost`."""
        raise NotImplementedError

    def best_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """Every agent's best effort against the others' efforts, (N,)."""
        raise NotImplementedError

    def planner_response(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """Of every agent the effort that is best for the welfare, given the others' efforts, (N,)."""
        raise NotImplementedError

    def nash_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """Efforts that are best responses to each other on this graph, (N,)."""
        raise NotImplementedError

    def planner_efforts(self, links_NN: np.ndarray) -> np.ndarray:
        """The efforts with the highest welfare on this graph, (N,)."""
        raise NotImplementedError

    def efficient_graph(self, solution: str = "nash") -> tuple[np.ndarray, float]:
        """(links_NN, welfare) of the graph of highest welfare at `nash` or `planner` efforts. Exact. Decorate
        it with `solved_once`."""
        raise NotImplementedError

    def link_gains(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """[i, j]: what i gains from the link ij at these efforts, all other links as they are; (N, N)."""
        raise NotImplementedError

    # Each game: its words, of which prompts.py makes what an agent reads. seen: a prompts.Observation.
    link_rule: ClassVar[str] = "A link forms if both choose it, at cost c each"  # prompts.py adds the fee
    payoff_rule: ClassVar[str]  # one sentence
    type_name: ClassVar[str]  # what `types` are called, such as alpha
    parameter_format: ClassVar[str] = "g"

    @classmethod
    def link_hint(cls, seen) -> str:
        """A worked number beside the question about links, "" for none."""
        return ""

    @classmethod
    def effort_facts(cls, seen) -> str:
        """What the links mean for the agent, beside the question about efforts."""
        raise NotImplementedError

    @classmethod
    def effort_hint(cls, seen) -> str:
        """A worked number beside the question about efforts, "" for none."""
        return ""

    # Each game: its draws. An instance is made of the agents' types and of two free numbers u and v; in BCZ
    # u = delta (N-1) and v = c / (delta mean(alpha)^2). See world/draws.py.
    fixable: ClassVar[tuple[str, ...]]  # parameters that --fix can hold fixed
    constant: ClassVar[tuple[str, ...]] = ()  # those of them that are never drawn
    ranges: ClassVar[tuple[tuple[float, float], tuple[float, float]]]  # of u and v in training, both uniform
    grid: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # their values in evaluation
    type_levels: ClassVar[tuple[float, float, float]]  # lowest, highest, and that of homogeneous agents

    @classmethod
    def make(cls, types_N, u: float, v: float, fixed: dict[str, float], stages: str, rounds: int) -> "Game":
        """The instance, rounded to the digits that players read. fixed: by name. Raises GameError."""
        raise NotImplementedError

    # All games

    def check(self) -> None:
        """GameError for what no game allows; every game's __post_init__ calls it."""
        values = [getattr(self, f.name) for f in fields(self) if f.name not in ("stages", "rounds")]
        numbers = [v for value in values for v in np.atleast_1d(value)]
        if not all(isinstance(v, (int, float, np.number)) and abs(v) <= LARGEST_PARAMETER for v in numbers):  # type: ignore
            raise GameError(f"game parameters must be finite numbers, of at most {LARGEST_PARAMETER:g}")
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
        values = {k: v for k, v in asdict(self).items() if k != "fee" or v}
        return {"game": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def link_cost(self) -> float:
        """What a link costs each of its ends: the link itself, and the proposal."""
        return self.c * (1 + self.fee)

    def unanswered_costs(self, proposals_NN: np.ndarray) -> np.ndarray:
        """What each agent pays for its proposals that are not answered, (N,)."""
        return self.fee * self.c * (proposals_NN & (1 - proposals_NN.T)).sum(1)

    def round_payoffs(self, proposals_NN: np.ndarray, efforts_N: np.ndarray) -> np.ndarray:
        """pi (N,) of a round with these proposals, answered or not."""
        return self.payoffs(form_links(proposals_NN), efforts_N) - self.unanswered_costs(proposals_NN)

    def welfare(self, links_NN: np.ndarray, efforts_N: np.ndarray) -> float:
        return float(self.payoffs(links_NN, efforts_N).sum())

    def solve_efforts(self, solution: str, links_NN: np.ndarray) -> np.ndarray:
        """Nash or planner efforts on this graph, (N,). solution: `nash` or `planner`."""
        return {"nash": self.nash_efforts, "planner": self.planner_efforts}[solution](links_NN)


def solved_once(efficient_graph):
    """Decorator of a game's efficient_graph: every instance is solved once, and each caller gets a copy."""
    solve = lru_cache(maxsize=4096)(efficient_graph)

    @wraps(efficient_graph)
    def cached(game: Game, solution: str = "nash") -> tuple[np.ndarray, float]:
        links_NN, W = solve(game, solution)
        return links_NN.copy(), W

    return cached


GAMES: dict[str, type[Game]] = {}  # by name, as in --game


def register(game: type[Game]) -> type[Game]:
    """Class decorator: --game, data sets and prompts know this game by its name."""
    GAMES[game.name] = game
    return game


def game_from_json(d: dict) -> Game:
    """The instance that `to_json` wrote. Raises GameError."""
    try:
        game = GAMES[d["game"]]
        values = {f.name: d[f.name] for f in fields(game) if f.name != "fee" or "fee" in d}
        # Someone else's file may have 3 for 3.0, which would be another `key`.
        real = {f.name for f in fields(game) if f.type in (float, tuple[float, ...])}
        number = lambda name, v: float(v) if name in real and type(v) is int else v
        for name, v in values.items():
            values[name] = tuple(number(name, x) for x in v) if isinstance(v, list) else number(name, v)
        return game(**values)
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise GameError(f"not a game instance ({type(e).__name__}: {e})") from None


# -------------------- decisions


@dataclass(frozen=True, eq=False)
class Decision:
    """Of one agent. action: for links a row (N,) of {0, 1}, for efforts a float. belief: what is expected of
    the others, (N,), with 0 in the own position; None where nothing is stated."""

    kind: "Kind"
    action: Any
    belief: np.ndarray | None = None


class Stakes(NamedTuple):
    """What a choice is worth, and what the best and the worst choice would be worth in its place."""

    chosen: float
    best: float
    worst: float

    @property
    def share(self) -> float:
        """1 - (best - chosen) / (best - worst), from 0 to 1; 1 where the choice makes no difference."""
        spread = self.best - self.worst
        return 1.0 if spread < 1e-12 else 1 - (self.best - self.chosen) / spread


class Kind:
    """A kind of decision: how it is asked for, answered, played, rewarded and measured. The two kinds of the
    paper are in decisions.py; docs/your-own-stage.md adds a third in one file.

    actions: those of all agents in one stage, an array of N rows; seen: a prompts.Observation; style: a
    prompts.PromptStyle; target: a rewards.Target."""

    letter: str  # in --stages and in files
    name: str  # in logs and flags
    noun: str  # in prompts: what is chosen
    answer: str  # in prompts: the form of what follows `Decision:`
    beliefs = True  # whether a reply states what is expected of the others

    # The rules.

    def check(self, actions, game: Game) -> np.ndarray:
        """The actions as an array of its own. Raises ValueError for actions that the rules do not allow."""
        raise NotImplementedError

    def fallback(self, N: int) -> Decision:
        """What a reply that is not compliant plays."""
        raise NotImplementedError

    def random(self, game: Game, seat: int, rng: np.random.Generator) -> Decision:
        """A random decision that the rules allow, with random beliefs."""
        raise NotImplementedError

    # The text.

    def result(self, seen) -> str:
        """What the agent reads when the next stage begins: the result of this one. "" if nothing is said."""
        return ""

    def question(self, seen, style) -> str:
        raise NotImplementedError

    def write(self, action) -> str:
        """The action as the text that follows `Decision:`."""
        raise NotImplementedError

    def read(self, text: str, seat: int, N: int, cap: float) -> tuple[Any, str | None]:
        """(action, None), or (None, the rule that the text after `Decision:` breaks)."""
        raise NotImplementedError

    def write_belief(self, belief_N: np.ndarray) -> str:
        return self.write(belief_N)

    def allows_belief(self, belief_N: np.ndarray) -> bool:
        """Whether these N finite numbers can be a belief."""
        return True

    def to_text(self, actions: np.ndarray) -> str:
        """All agents' actions as one line of a file; `from_text` reads exactly the same actions again."""
        raise NotImplementedError

    def from_text(self, text: str) -> np.ndarray:
        raise NotImplementedError

    # Experts, rewards, metrics.

    def expert_actions(self, expert: str, state: "State") -> np.ndarray:
        """What an exact expert without a rule for this kind (experts.RULES) plays in all seats."""
        raise NotImplementedError

    def expert_decision(self, actions: np.ndarray, game: Game, seat: int) -> Decision:
        """The decision of one seat, which believes that all others play these actions."""
        raise NotImplementedError

    def likeness(self, decision: Decision, target) -> float:
        """The likeness to the expert's decision within r^S, for a compliant decision, in [0, 2]."""
        raise NotImplementedError

    def belief_accuracy(self, belief_N: np.ndarray, target) -> float | None:
        """How well the belief predicts the target's actions, in [0, 1]."""
        return None

    def stakes(self, state: "State", seat: int, actions: np.ndarray, common: bool = False) -> Stakes | None:
        """With all others' actions fixed: what `seat` (if `common`: all together) earns with its own action,
        with its best and with its worst one. None for a kind that pays nothing."""
        return None

    def efficiency(self, state: "State", seat: int, actions: np.ndarray) -> float | None:
        """U2 of the decision of `seat`: the share of its own stakes."""
        stakes = self.stakes(state, seat, actions)
        return stakes.share if stakes else None


KINDS: dict[str, Kind] = {}  # by letter, in the order of --prompts; decisions.py puts them in


def check_stages(stages: str) -> None:
    """GameError for stages that no game can have: a round needs links and efforts."""
    if not isinstance(stages, str) or not {"G", "E"} <= set(stages) <= set(KINDS):
        letters = ", ".join(f"{kind.letter} ({kind.noun})" for kind in KINDS.values())
        raise GameError(f"stages must be a string of {letters}, such as GE, got {stages!r}")


# -------------------- play


@dataclass(frozen=True, eq=False)
class State:
    """A game that is played. history: the actions of every finished stage, such as proposals (N, N)."""

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
    def kind(self) -> Kind:
        """What is chosen next."""
        return self.kind_of(len(self.history))

    def kind_of(self, stage: int) -> Kind:
        """The kind of a stage, counted from 0 over the whole game."""
        return KINDS[self.game.stages[stage % len(self.game.stages)]]

    def last(self, letter: str) -> np.ndarray | None:
        """The latest actions of a kind, None before there were any."""
        stages = reversed(range(len(self.history)))
        return next((self.history[k] for k in stages if self.kind_of(k).letter == letter), None)

    @property
    def links(self) -> np.ndarray:
        """The latest graph, (N, N): nobody is linked before the first links."""
        proposals_NN = self.last("G")
        return empty_graph(self.game.N) if proposals_NN is None else form_links(proposals_NN)

    @property
    def efforts(self) -> np.ndarray | None:
        return self.last("E")

    def before(self, stage: int) -> "State":
        """The state at the beginning of a stage, counted from 0 over the whole game."""
        return State(self.game, self.history[:stage])

    def step(self, actions: Sequence | np.ndarray) -> "State":
        """All agents act at once. Raises ValueError for actions that the rules do not allow."""
        if self.done:
            raise ValueError("the game is over")
        return State(self.game, (*self.history, self.kind.check(actions, self.game)))

    def round_results(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(links_NN, efforts_N, payoffs_N) at the end of every finished round."""
        per_round = len(self.game.stages)
        ends = [self.before(k) for k in range(per_round, len(self.history) + 1, per_round)]
        return [(s.links, s.efforts, s.game.round_payoffs(s.last("G"), s.efforts)) for s in ends]  # type: ignore

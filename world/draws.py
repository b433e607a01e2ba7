"""Which instances are played: families of games, random draws, the held-out grid, and the flags that say so.

[choice] Instances are drawn from these ranges, rounded to the digits the players read, and solved as rounded:
    BCZ   p = delta (N-1) uniform in 0.15..0.33, g = c / (delta mean(alpha)^2) uniform in 0.6..2.2; alpha 1, or 1 to 3
    PGG   r uniform in 1.1..1.4 (a dilemma in every group), b = 0.5, c / mean(e) uniform in 0.1..0.9; e 10, or 5 to 15
Types (alpha, e) are homogeneous, linear, half high and half low, or one hub above the rest, in random seat order.
Homogeneous alone is nearly a yes/no question; the others have interior optima.
"""

import argparse
import math
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from world.bcz import BCZ, effort_cap
from games import Game, GameError, check_stages
from world.pgg import PGG
from run.files import InputError, number, positive_int

GAMES = {game.name: game for game in (BCZ, PGG)}
KINDS = ("homogeneous", "linear", "half", "hub")  # of types


@dataclass(frozen=True)
class Family:
    """A game with its stages and rounds, and what of its instances is not drawn but fixed.

    kinds: those of the types that are drawn; types: the numbers themselves (one for all agents, or N of them, by seat);
    fixed: parameters by name: delta, c (BCZ); r, b, c (PGG).
    """

    game: str = "bcz"
    stages: str = "GE"
    rounds: int = 1
    kinds: tuple[str, ...] = KINDS
    types: tuple[float, ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.game.upper()}-{self.stages}"

    @property
    def single(self) -> bool:
        """Is nothing left to draw?"""
        return bool(self.types) and len(self.fixed) == (2 if self.game == "bcz" else 3)

    def make(self, types_N, a: float, b: float) -> Game:
        """The instance with two free numbers: BCZ p and g, PGG r and c / mean(e). Raises GameError."""
        types_N = np.asarray(types_N, float)
        N, fixed, end = len(types_N), dict(self.fixed), (self.stages, self.rounds)
        if self.game == "bcz":
            delta = fixed.get("delta", round(float(a) / (N - 1), 3))
            c = fixed.get("c", round(float(b * delta * types_N.mean() ** 2), 3))
            return BCZ(tuple(types_N.tolist()), delta, c, effort_cap(types_N, delta), *end)
        r, c = fixed.get("r", round(float(a), 2)), fixed.get("c", round(float(b * types_N.mean()), 2))
        return PGG(tuple(types_N.tolist()), r, fixed.get("b", 0.5), c, *end)

    def given_types(self, N: int) -> np.ndarray:
        if len(self.types) not in (1, N):
            raise GameError(f"{len(self.types)} types are given for {N} agents; give one number for all, or {N}")
        return np.resize(self.types, N)


def types_of_kind(kind: str, N: int, game: str = "bcz") -> np.ndarray:
    """(N,): alpha of BCZ, or endowments of PGG."""
    if kind not in KINDS:
        raise GameError(f"unknown kind of types {kind!r}; choose from {', '.join(KINDS)}")
    low, high = (1.0, 3.0) if game == "bcz" else (5.0, 15.0)
    if kind == "homogeneous":
        return np.full(N, 1.0 if game == "bcz" else 10.0)
    if kind == "linear":
        return np.round(np.linspace(low, high, N), 2)
    return np.where(np.arange(N) < ((N + 1) // 2 if kind == "half" else 1), high, low)


def draw_game(rng: np.random.Generator, N: int, split: str = "train", family: Family = Family()) -> Game:
    """One random instance of a split. No instance is ever drawn in both splits, in any seat order or with any stages
    (but one that is given whole is what it is). Raises GameError."""
    if split not in ("train", "held-out"):
        raise GameError(f"unknown split {split!r}; choose train or held-out")
    ranges = ((0.15, 0.33), (0.6, 2.2)) if family.game == "bcz" else ((1.1, 1.4), (0.1, 0.9))
    for _ in range(10_000):
        if family.types:
            types_N = family.given_types(N)
        else:
            kind = family.kinds[rng.integers(len(family.kinds))]
            types_N = rng.permutation(types_of_kind(kind, N, family.game))
        game = family.make(types_N, *(rng.uniform(*bounds) for bounds in ranges))
        if family.single or split_of(game) == split:
            return game
    raise GameError(f"the given parameters leave no {split} instance of {family.label} to draw; give fewer of them")


@lru_cache(maxsize=None)
def held_out_grid(N: int, family: Family = Family()) -> tuple[Game, ...]:
    """The fixed evaluation grid: kinds of types x the two free numbers, in a fixed random seat order; 60 games, fewer
    where parameters are given. BCZ: p in {0.2, 0.25, 0.3} x g in {0.75, 1, 1.25, 1.5, 2}; PGG: r in {1.15, 1.25, 1.35}
    x c / mean(e) in {0.1, 0.3, 0.5, 0.7, 0.9}."""
    rng = np.random.default_rng(0)
    if family.game == "bcz":
        values = [(p, g) for p in (0.2, 0.25, 0.3) for g in (0.75, 1, 1.25, 1.5, 2)]
    else:
        values = [(r, c) for r in (1.15, 1.25, 1.35) for c in (0.1, 0.3, 0.5, 0.7, 0.9)]
    games: dict[str, Game] = {}  # instances that differ in nothing but seats are one game
    for kind in KINDS:
        for a, b in values:
            types_N = rng.permutation(types_of_kind(kind, N, family.game))
            if kind in family.kinds:
                game = family.make(family.given_types(N) if family.types else types_N, a, b)
                games.setdefault(game.key, game)
    return tuple(games.values())


@lru_cache(maxsize=None)
def _grid_keys(N: int, game: str) -> frozenset[str]:
    return frozenset(game.key for game in held_out_grid(N, Family(game)))


def split_of(game: Game) -> str:
    """`held-out` or `train`: a tenth of all instances, by a hash of the instance, and the whole grid are held out."""
    held_out = game.key in _grid_keys(game.N, game.name) or zlib.crc32(game.key.encode()) % 10 == 0
    return "held-out" if held_out else "train"


def game_from_json(d: dict) -> Game:
    """What `to_json` wrote. Raises GameError."""
    try:
        values = {f.name: d[f.name] for f in fields(GAMES[d["game"]])}
        return GAMES[d["game"]](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise GameError(f"not a game instance ({type(e).__name__}: {e})") from None


# ---------------------------------------------------------------------------------------------------------------------
# command line


def add_game_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("game")
    group.add_argument("--game", nargs="+", choices=GAMES, default=["bcz"], help="several games take turns")
    group.add_argument("--stages", nargs="+", default=["GE"], help="of a round, such as GE GEE GGE; several take turns")
    group.add_argument("--rounds", type=positive_int, default=1, help="rounds T of a game")
    types = dict(nargs="+", metavar="TYPES", help="kinds ({}) or numbers, one for all or one per seat")
    types["help"] = types["help"].format(", ".join(KINDS))
    group.add_argument("--alpha", **types | {"help": "BCZ: alpha, " + types["help"]})
    group.add_argument("--delta", type=number(float, 0), help="BCZ: complementarity (else drawn)")
    group.add_argument("--endowment", **types | {"help": "PGG: endowments, " + types["help"]})
    group.add_argument("--factor", type=number(float, 0), help="PGG: multiplication factor r (else drawn)")
    group.add_argument("--size-exponent", type=number(float, 0), help="PGG: exponent b of the group size (else 0.5)")
    group.add_argument("--cost", type=number(float, 0), help="cost c of a link (else drawn)")


def families(args: argparse.Namespace) -> tuple[Family, ...]:
    """The families that the flags name: every game with every string of stages. Raises InputError."""
    for flag, game in (("alpha", "bcz"), ("delta", "bcz"), ("endowment", "pgg"), ("factor", "pgg"), ("size_exponent", "pgg")):
        if getattr(args, flag) is not None and game not in args.game:
            raise InputError(f"--{flag.replace('_', '-')} belongs to --game {game}")
    found = []
    for game in dict.fromkeys(args.game):
        given = args.alpha if game == "bcz" else args.endowment
        kinds, types = _types(given, "--alpha" if game == "bcz" else "--endowment")
        fixed = {"delta": args.delta} if game == "bcz" else {"r": args.factor, "b": args.size_exponent}
        fixed = tuple((name, value) for name, value in (fixed | {"c": args.cost}).items() if value is not None)
        for stages in dict.fromkeys(args.stages):
            check_stages(stages)
            found.append(Family(game, stages, args.rounds, kinds, types, fixed))
    return tuple(found)


def _types(given: list[str] | None, flag: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if not given:
        return KINDS, ()
    if all(text in KINDS for text in given):
        return tuple(kind for kind in KINDS if kind in given), ()
    try:
        types = tuple(float(text) for text in given)
    except ValueError:
        types = (math.nan,)
    if not all(math.isfinite(v) and v > 0 for v in types):
        raise InputError(f"{flag} takes kinds ({', '.join(KINDS)}) or positive numbers, got {' '.join(given)}")
    return KINDS, types

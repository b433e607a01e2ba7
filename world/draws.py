"""Which instances are played: families of games, random draws, the held-out grid, and the flags that say so.

[choice] An instance is made of two free numbers, drawn from ranges that its game names, and of the agents'
types; it is rounded to the digits the players read, and solved as rounded. Types (BCZ's alpha, PGG's
endowments) are homogeneous, linear, half high and half low, or one hub above the rest, in random seat order.
Homogeneous alone is nearly a yes/no question; the others have interior optima.
"""

import argparse
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from games import GAMES, Game, GameError, check_stages
from run.files import InputError, number

TYPE_PATTERNS = ("homogeneous", "linear", "half", "hub")


@dataclass(frozen=True)
class Family:
    """A game with its stages and rounds, and what of its instances is not drawn but fixed.

    patterns: those of the types that are drawn; types: the numbers themselves (one for all agents, or N, by
    seat); fixed: parameters by name, of those that the game calls fixable."""

    game: str = "bcz"
    stages: str = "GE"
    rounds: int = 1
    patterns: tuple[str, ...] = TYPE_PATTERNS
    types: tuple[float, ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()

    @property
    def rules(self) -> type[Game]:
        return GAMES[self.game]

    @property
    def label(self) -> str:
        return f"{self.game.upper()}-{self.stages}"

    @property
    def single(self) -> bool:
        """Is nothing left to draw?"""
        return bool(self.types) and len(self.fixed) == len(self.rules.fixable)

    def make(self, types_N: np.ndarray, u: float, v: float) -> Game:
        """The instance with these free numbers. Raises GameError."""
        return self.rules.make(types_N, u, v, dict(self.fixed), self.stages, self.rounds)

    def given_types(self, N: int) -> np.ndarray:
        if len(self.types) not in (1, N):
            raise GameError(
                f"{len(self.types)} types are given for {N} agents; give one number for all, or {N}"
            )
        return np.resize(self.types, N)


def types_of(pattern: str, N: int, game: str = "bcz") -> np.ndarray:
    """The types of a pattern before they are shuffled over the seats, (N,)."""
    low, high, same = GAMES[game].type_levels
    if pattern == "homogeneous":
        return np.full(N, same)
    if pattern == "linear":
        return np.round(np.linspace(low, high, N), 2)
    return np.where(np.arange(N) < {"half": (N + 1) // 2, "hub": 1}[pattern], high, low)


def draw_game(rng: np.random.Generator, N: int, split: str = "train", family: Family = Family()) -> Game:
    """One random instance of a split, `train` or `held-out`. No instance is ever drawn in both, in any seat
    order or with any stages (but one that is given whole is what it is). Raises GameError."""
    for _ in range(10_000):
        if family.types:
            types_N = family.given_types(N)
        else:
            pattern = family.patterns[rng.integers(len(family.patterns))]
            types_N = rng.permutation(types_of(pattern, N, family.game))
        game = family.make(types_N, *(rng.uniform(*bounds) for bounds in family.rules.ranges))
        if family.single or split_of(game) == split:
            return game
    raise GameError(
        f"the given parameters leave no {split} instance of {family.label} to draw; give fewer of them"
    )


@lru_cache
def held_out_grid(N: int, family: Family = Family()) -> tuple[Game, ...]:
    """The fixed evaluation grid: patterns of types x the game's grid of the two free numbers, in a fixed
    random seat order; 60 games in BCZ and PGG, fewer where parameters are given."""
    rng = np.random.default_rng(0)
    us, vs = family.rules.grid
    games: dict[str, Game] = {}  # instances that differ in nothing but seats are one game
    for pattern in TYPE_PATTERNS:
        for u, v in ((u, v) for u in us for v in vs):
            types_N = rng.permutation(types_of(pattern, N, family.game))
            if pattern in family.patterns:
                game = family.make(family.given_types(N) if family.types else types_N, u, v)
                games.setdefault(game.key, game)
    return tuple(games.values())


@lru_cache
def _grid_keys(N: int, game: str) -> frozenset[str]:
    return frozenset(game.key for game in held_out_grid(N, Family(game)))


def split_of(game: Game) -> str:
    """`held-out` or `train`: a tenth of all instances, by a hash of the instance, and the whole grid are held
    out."""
    held_out = game.key in _grid_keys(game.N, game.name) or zlib.crc32(game.key.encode()) % 10 == 0
    return "held-out" if held_out else "train"


# -------------------- command line


def add_game_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("game", "Which games are drawn. Several games or stages take turns.")
    add = group.add_argument
    add("--game", nargs="+", choices=GAMES, default=["bcz"], help="bcz: network game; pgg: public goods game")
    add("--stages", nargs="+", default=["GE"], help="of a round, such as GE GEE GGE: G links, E efforts")
    add("--rounds", type=number(int, 1, 100), default=1, help="rounds T of a game")
    told = (
        f"alpha, endowments: {', '.join(TYPE_PATTERNS)}, or numbers, one for all or one per seat (else drawn)"
    )
    add("--types", nargs="+", help=told)
    known = "; ".join(f"{name}: {', '.join(game.fixable)}" for name, game in GAMES.items())
    add("--fix", nargs="+", metavar="NAME=VALUE", help=f"parameters that are not drawn ({known})")


def families(args: argparse.Namespace) -> tuple[Family, ...]:
    """The families that the flags name: every game with every string of stages. Raises InputError."""
    patterns, types = _types(args.types)
    fixed = named_numbers(args.fix, "--fix")
    names = dict.fromkeys(args.game)
    for name in names:
        if name not in GAMES:  # a run of a game from elsewhere is resumed by the script that knows the game
            raise InputError(f"there is no game {name!r} here, only {', '.join(GAMES)}")
    for parameter in fixed:
        if not any(parameter in GAMES[name].fixable for name in names):
            raise InputError(
                f"--fix {parameter}: {' and '.join(names)} cannot fix it; see --help for what can be"
            )
    found = []
    for name in names:
        own = tuple((p, fixed[p]) for p in GAMES[name].fixable if p in fixed)
        for stages in dict.fromkeys(args.stages):
            check_stages(stages)
            found.append(Family(name, stages, args.rounds, patterns, types, own))
    return tuple(found)


def named_numbers(given: list[str] | None, flag: str, known: Iterable[str] | None = None) -> dict[str, float]:
    """["delta=0.1", ...] -> {"delta": 0.1, ...}: finite numbers from 0. Raises InputError, also for a
    name that is not among the known ones."""
    numbers = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not name or not 0 <= numbers[name] < math.inf:
            raise InputError(f"{flag} {text}: write NAME=VALUE with a finite number from 0, as in delta=0.1")
        if known is not None and name not in known:
            raise InputError(f"{flag} {name}: no such name; there are {', '.join(known)}")
    return numbers


def _types(given: list[str] | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if not given:
        return TYPE_PATTERNS, ()
    if all(text in TYPE_PATTERNS for text in given):
        return tuple(pattern for pattern in TYPE_PATTERNS if pattern in given), ()
    try:
        types = tuple(float(text) for text in given)
    except ValueError:
        types = (math.nan,)
    # With a third decimal PGG's cap, which is the type, is below the effort that an expert writes for it
    if not all(math.isfinite(v) and v > 0 and v == round(v, 2) for v in types):
        allowed = f"{', '.join(TYPE_PATTERNS)} or positive numbers with at most two decimals"
        raise InputError(f"--types takes {allowed}, got {' '.join(given)}")
    return TYPE_PATTERNS, types

"""Which instances are played: families of games, random draws, and the held-out grid.

[choice] An instance is made of two free numbers, drawn from ranges that its game names, and of the agents'
types; it is rounded to the digits that the players read, and solved as rounded. The types (BCZ's alpha, PGG's
endowments) are homogeneous, linear, half high and half low, or one hub above the rest, in a random order of
seats. With homogeneous types alone the efficient graph is almost always empty or complete; the other patterns
have efficient graphs in between.
"""

import itertools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from games import GAMES, Game, GameError

TYPE_PATTERNS = ("homogeneous", "linear", "half", "hub")


@dataclass(frozen=True)
class Family:
    """A game with its stages and rounds, and what of its instances is fixed.

    patterns: from which types are drawn; types: given in their place, one number for all agents or N, by
    seat; fixed: values of parameters that are not drawn, by name (Game.fixable); fee: see games.Game."""

    game: str = "bcz"
    stages: str = "GE"
    rounds: int = 1
    patterns: tuple[str, ...] = TYPE_PATTERNS
    types: tuple[float, ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()
    fee: float = 0.0

    @property
    def rules(self) -> type[Game]:
        return GAMES[self.game]

    @property
    def label(self) -> str:
        return f"{self.game.upper()}-{self.stages}"

    @property
    def nothing_drawn(self) -> bool:
        """The flags give all numbers of an instance."""
        drawn = set(self.rules.fixable) - set(self.rules.constant)
        return bool(self.types) and drawn <= dict(self.fixed).keys()

    def make(self, types_N: np.ndarray, u: float, v: float) -> Game:
        """The instance with these free numbers and, unless the family's types are fixed, these types. Raises
        GameError."""
        if self.types and len(self.types) not in (1, len(types_N)):
            advice = f"give one number for all, or {len(types_N)}"
            raise GameError(f"{len(self.types)} types are given for {len(types_N)} agents; {advice}")
        types_N = np.resize(self.types or types_N, len(types_N))
        game = self.rules.make(types_N, u, v, dict(self.fixed), self.stages, self.rounds)
        return replace(game, fee=self.fee) if self.fee else game


def types_of(pattern: str, N: int, game: str = "bcz") -> np.ndarray:
    """The types of a pattern before they are shuffled over the seats, (N,)."""
    low, high, same = GAMES[game].type_levels
    if pattern == "homogeneous":
        return np.full(N, same)
    if pattern == "linear":
        return np.round(np.linspace(low, high, N), 2)
    highest = (N + 1) // 2 if pattern == "half" else 1  # how many have the highest type
    return np.where(np.arange(N) < highest, high, low)


def draw_game(rng: np.random.Generator, N: int, split: str = "train", family: Family = Family()) -> Game:
    """One random instance of a split, `train` or `held-out`. No instance of a family is drawn in both splits,
    in any order of seats or with any stages, except where flags give all its numbers. Raises GameError."""
    for _ in range(10_000):
        types_N = np.ones(N)
        if not family.types:
            pattern = family.patterns[rng.integers(len(family.patterns))]
            types_N = rng.permutation(types_of(pattern, N, family.game))
        game = family.make(types_N, *(rng.uniform(*bounds) for bounds in family.rules.ranges))
        if family.nothing_drawn or split_of(game, family) == split:
            return game
    raise GameError(
        f"the given parameters leave no {split} instance of {family.label} to draw; give fewer of them"
    )


@lru_cache
def held_out_grid(N: int, family: Family = Family()) -> tuple[Game, ...]:
    """The fixed evaluation grid: patterns of types x the game's grid of the two free numbers, in a fixed
    random order of seats. 60 games in BCZ and PGG, fewer where parameters are fixed: then some differ in the
    order of seats alone."""
    rng = np.random.default_rng(0)
    us, vs = family.rules.grid
    games: list[Game] = []
    for pattern in TYPE_PATTERNS:
        for u, v in itertools.product(us, vs):
            types_N = rng.permutation(types_of(pattern, N, family.game))  # drawn for patterns left out, too
            if pattern in family.patterns:
                games.append(family.make(types_N, u, v))
    return tuple(dict.fromkeys(games))


def held_out_games(families: Iterable[Family], N: int, count: int) -> list[Game]:
    """`count` games of these families' grids, evenly spread, or all of them if there are fewer."""
    return spread([game for family in families for game in held_out_grid(N, family)], count)


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread from the first to the last, or all of them if there are fewer."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in chosen]


@lru_cache
def _grid_keys(N: int, family: Family) -> frozenset[str]:
    """The instances of a family's grid, but none where --fix leaves only the types to be drawn: then the
    grid is all that there is."""
    grid = held_out_grid(N, family)
    keys, types = {game.key for game in grid}, {tuple(sorted(game.types)) for game in grid}
    return frozenset(keys if not family.fixed or len(keys) > len(types) else ())


def split_of(game: Game, family: Family | None = None) -> str:
    """`held-out` or `train`. Held out are the whole grid of the game, that of its family where flags make it
    another one, and, by a hash of the instance, a tenth of all instances."""
    grids = _grid_keys(game.N, Family(game.name)), _grid_keys(game.N, family or Family(game.name))
    held_out = any(game.key in keys for keys in grids) or zlib.crc32(game.key.encode()) % 10 == 0
    return "held-out" if held_out else "train"

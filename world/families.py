"""The families of games that flags name: --game, --stages, --rounds, --types and --fix."""

import math
from collections.abc import Iterable, Sequence

from games import GAMES, GameError, check_stages
from world.draws import TYPE_PATTERNS, Family


def families_of(
    games: Iterable[str],
    stages: Iterable[str],
    rounds: int,
    patterns: tuple[str, ...] = TYPE_PATTERNS,
    types: tuple[float, ...] = (),
    fixed: dict[str, float] | None = None,
) -> tuple[Family, ...]:
    """Every game with every string of stages; of `fixed` each game takes what it can fix, and `fee`. Raises
    GameError."""
    fixed, families = fixed or {}, []
    fee = fixed.get("fee", 0.0)
    if float(f"{fee:g}") != fee:
        raise GameError(f"--fix fee={fee}: agents would read {fee:g}; give no more digits")
    for name in dict.fromkeys(games):
        own = tuple((p, fixed[p]) for p in GAMES[name].fixable if p in fixed)
        for p, value in own:
            if (read := f"{value:{GAMES[name].parameter_format}}") and float(read) != value:
                raise GameError(f"--fix {p}={value:g}: agents would read {read}; give no more decimals")
        for string in dict.fromkeys(stages):
            check_stages(string)
            families.append(Family(name, string, rounds, patterns, types, own, fee))
    return tuple(families)


def patterns_and_types(words: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What --types says: (the patterns of types that are drawn, the types themselves where they are given).
    Raises GameError."""
    if not words:
        return TYPE_PATTERNS, ()
    if all(word in TYPE_PATTERNS for word in words):
        return tuple(pattern for pattern in TYPE_PATTERNS if pattern in words), ()
    try:
        types = tuple(float(word) for word in words)
    except ValueError:
        types = (math.nan,)
    # With a third decimal, PGG's cap, which is the type, would be below the effort that an expert writes. Of
    # seven digits agents would read six.
    if not all(math.isfinite(v) and v > 0 and v == round(v, 2) == float(f"{v:g}") for v in types):
        allowed = f"{', '.join(TYPE_PATTERNS)} or positive numbers of at most two decimals and six digits"
        raise GameError(f"--types takes {allowed}, got {' '.join(words)}")
    return TYPE_PATTERNS, types

"""Data as it stands in the page: texts that can be shown, short numbers, JSON that is safe in HTML."""

import json
import math
from collections.abc import Callable

import numpy as np

from games import Game

LONGEST = 2_000  # characters of a reply that are shown


def clean(text: str, longest: int = LONGEST) -> str:
    """A text that can be shown: cut, control characters visible, halves of surrogate pairs replaced."""
    cut = f" [... {len(text):,} characters, cut here]" if len(text) > longest else ""
    text = text[:longest].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text) + cut


def escaped(value) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII, so that U+2028 and U+2029 are escaped already
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def rounded(value, digits: int = 6):
    """Floats with few digits, in lists and dicts too; what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), digits) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def tell_game(game: Game) -> str:
    parameters = ", ".join(f"{name} {value:g}" for name, value in game.parameters.items())
    fee = f", fee {game.fee:g}" if game.fee else ""
    rounds = f", {game.rounds} rounds" if game.rounds > 1 else ""
    types = ", ".join(f"{v:g}" for v in game.types)
    return f"{game.label}{rounds}; {game.type_name} {types}; {parameters}{fee}"


def thinned(n: int, size: Callable[[list[int]], int], budget: int) -> list[int]:
    """Which of n items fit, by number: all, or the newest quarter and every k-th older one, or every k-th and
    the last. size: of these items together."""
    for newest in (n - n // 4, n - 1):
        for k in range(1, n + 1):
            chosen = [i for i in range(n) if i >= newest or i % k == 0]
            if size(chosen) <= budget:
                return chosen
    return []

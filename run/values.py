"""Types of the values of flags, for argparse: each checks the text of one value, and returns what it says."""

import argparse
import json
import math
import os
from collections.abc import Iterable
from typing import Any

from run.errors import InputError


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An int or float from low (or, with `above`, larger than low) to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            least = f"{'above' if above else 'at least'} {low}"
            bounds = least if high == math.inf else f"from {low} to {high}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
seed_int = number(int, 0, 2**32 - 1)  # one word of a random seed, see run/seeds.py
non_negative = number(float, 0)
positive = number(float, 0, above=True)
share = number(float, 0, 1)


def number_or_range(least: int, most: int):
    """`4` -> (4, 4), `4-8` -> (4, 8): whole numbers from least to most."""

    def parse(text: str) -> tuple[int, int]:
        low, dash, high = text.partition("-")
        words = [low, high if dash else low]
        a, b = map(int, words) if all(map(str.isdecimal, words)) else (most, least)
        if not least <= a <= b <= most:
            kinds = "a number such as 4, or a range that rises such as 4-8"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kinds}, from {least} to {most}")
        return a, b

    return parse


def number_or_word(*words: str):
    """A whole number from 0, or one of the words."""
    return lambda text: text if text in words else seed_int(text)


def number_or_path(text: str) -> int | str:
    """A whole number from 1, or the whole path of a file, so that a run can be resumed from another
    folder."""
    return positive_int(text) if text.lstrip("+-").isdigit() else os.path.abspath(text)


def named_values(given: Iterable[str] | None, flag: str) -> dict[str, Any]:
    """["a=true", "b=0.5", "c=word", ...] -> {"a": True, ...}: values are JSON where they can be, else
    words. Raises InputError."""
    values: dict[str, Any] = {}
    for pair in given or ():
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InputError(f"{flag} {pair}: write NAME=VALUE, as in {name or 'name'}=true")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def named_numbers(given: Iterable[str] | None, flag: str, known: Iterable[str]) -> dict[str, float]:
    """["delta=0.1", ...] -> {"delta": 0.1, ...}: finite numbers from 0. Raises InputError."""
    numbers, known = {}, list(known)
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not name or not 0 <= numbers[name] < math.inf:
            raise InputError(
                f"{flag} {text}: write NAME=VALUE with a finite number from 0, as in {known[0]}=0.1"
            )
        if name not in known:
            raise InputError(f"{flag} {name}: no such name; there are {', '.join(known)}")
    return numbers

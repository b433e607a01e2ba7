"""The value of an arithmetic expression that a language model wrote: numbers, + - * / ( ) and minus signs, nothing else.

A text is data. It is read by the grammar below, character by character, and never handed to Python's own evaluator:

    sum      product, then any number of  + product  or  - product
    product  factor, then any number of  * factor  or  / factor
    factor   a number, ( sum ), or - factor

There are no names, calls, powers, comparisons, commas or signs of equality, and there is no plus sign before a number.
"""

import math
import re

MAX_LENGTH = 200  # characters
MAX_DEPTH = 20  # brackets and minus signs inside each other
_TOKEN = re.compile(r"[ \t]*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[-+*/()])", re.ASCII)


class _Refused(Exception):
    """The text is no expression of this grammar, or one without a finite value."""


def arithmetic(text: str) -> float | None:
    """The value, None for a text that is anything else, is too long or too deep, divides by zero, or overflows
    anywhere on the way."""
    try:
        tokens = _tokens(text)
        value = _sum(tokens, 0)
        return value + 0.0 if not tokens else None  # + 0.0: -0 becomes 0
    except _Refused:
        return None


def _tokens(text: str) -> list[str]:
    """In reverse, so that the next one is at the end."""
    text = text.rstrip(" \t")
    if len(text) > MAX_LENGTH:
        raise _Refused
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _Refused
        tokens.append(match[1])
        at = match.end()
    return tokens[::-1]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _Refused
    return value


def _sum(tokens: list[str], depth: int) -> float:
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        value = _finite(value + sign * _product(tokens, depth))
    return value


def _product(tokens: list[str], depth: int) -> float:
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in "*/":
        divides = tokens.pop() == "/"
        other = _factor(tokens, depth)
        if divides and other == 0:
            raise _Refused
        value = _finite(value / other if divides else value * other)
    return value


def _factor(tokens: list[str], depth: int) -> float:
    if not tokens or depth > MAX_DEPTH:
        raise _Refused
    token = tokens.pop()
    if token == "-":
        return -_factor(tokens, depth + 1)
    if token == "(":
        value = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise _Refused
        return value
    if token in "+*/)":
        raise _Refused
    return _finite(float(token))

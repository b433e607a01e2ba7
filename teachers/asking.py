"""How language models are asked, and what a question is."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from games import State
from prompts import PromptStyle
from run.errors import InputError


@dataclass(frozen=True)
class Asking:
    """How language models are asked: the values of --ask."""

    style: PromptStyle = PromptStyle()
    temperature: float | None = None  # None: the server's own; 1 for a local model
    max_tokens: int | None = None  # None: chat_client.MAX_TOKENS; style.reply_limit for a local model
    attempts: int = 3  # times that a question is asked
    concurrency: int = 8  # questions under way at a time
    timeout: float = 180.0  # seconds that a server may be silent
    retries: int = 6  # further tries after one that failed (429, 5xx, time limit, ...)
    record: str = "expert_answers.jsonl"  # the file of a server's answers, see record.py
    price_in: float | None = None  # USD per million tokens
    price_out: float | None = None
    budget: float | None = None  # USD, for all answers in the record


# The lowest value of each name of --ask but `record`; the value has the same type.
LOWEST = {"temperature": 0.0, "max-tokens": 1, "attempts": 1, "concurrency": 1, "timeout": 0.01, "retries": 0}
LOWEST |= {"price-in": 0.0, "price-out": 0.0, "budget": 0.0}


def asking(pairs: Sequence[str] | None, style: PromptStyle) -> Asking:
    """The NAME=VALUE pairs of --ask; the last one of each name counts. Raises InputError."""
    record, *others = with_record(pairs)
    values = {"record": record.removeprefix("record=")}
    for pair in others:
        name, _, text = pair.partition("=")
        try:
            value = type(LOWEST[name])(text)
            if not LOWEST[name] <= value < math.inf:
                raise ValueError
        except (KeyError, ValueError):
            names = ", ".join(f"{name} (from {lowest:g})" for name, lowest in LOWEST.items())
            raise InputError(f"--ask {pair!r}: write NAME=VALUE, of {names}, record (a file)") from None
        values[name.replace("-", "_")] = value
    money = {"price_in", "price_out", "budget"} & set(values)
    if money and not {"price_in", "price_out"} <= money:
        raise InputError("--ask: a budget needs price-in and price-out, the USD per million tokens")
    return Asking(style, **values)


def with_record(pairs: Sequence[str] | None) -> list[str]:
    """The pairs with the whole path of the record, so that a run can be resumed from another folder."""
    records = [Asking.record] + [p.removeprefix("record=") for p in pairs or () if p.startswith("record=")]
    others = [p for p in pairs or () if not p.startswith("record=")]
    return [f"record={os.path.abspath(records[-1])}", *others]


@dataclass(frozen=True, eq=False)
class Question:
    """A decision that is asked for. chat: the messages; draw: which sample of the model's distribution."""

    chat: list[dict]
    draw: str
    state: State
    seat: int

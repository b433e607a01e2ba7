"""Experts by name, and several in one. Besides the rules of experts.py there are

    switch:A:B               the exact expert A in the first half of the rounds, then B
    openai:MODEL / hf:PATH   a language model on a server, a local one: see teachers/language.py
    noisy:EXPERT:RATE        any of them, with that share of its decisions replaced by `random`

and partners, whose rules are drawn from a list."""

import copy
import zlib
from collections.abc import Callable

import numpy as np

from experts import RULES, Exact, Expert, Random
from games import Decision, Game, State
from run.errors import InputError
from run.seeds import Stream, numpy_generator


class Switch(Expert):
    """Plays `first` in the first half of the rounds, then `then`."""

    def __init__(self, first: Expert, then: Expert):
        self.first, self.then, self.name = first, then, f"switch:{first.name}:{then.name}"

    def __call__(self, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
        rule = self.first if 2 * state.round <= state.game.rounds else self.then
        return rule(state, seat, rng, past)


class Partners(Expert):
    """Several rules. Which one a seat follows is drawn for every seat of every instance, and depends on
    nothing else, so all policies meet the same partners in evaluation."""

    def __init__(self, rules: list[Expert]):
        self.rules, self.name = rules, " or ".join(rule.name for rule in rules)

    def rule(self, game: Game, seat: int) -> Expert:
        drawn = numpy_generator(Stream.PARTNERS, zlib.crc32(game.seated_key.encode()), seat)
        return self.rules[drawn.integers(len(self.rules))]

    def __call__(self, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
        return self.rule(state.game, seat)(state, seat, rng, past)


class Noisy(Expert):
    """An expert of whose decisions a share, `rate`, is replaced by `random`."""

    def __init__(self, inner: Expert, rate: float):
        self.inner, self.rate, self.language = inner, rate, inner.language
        self.name = f"noisy:{inner.name}:{rate:g}"

    def decide_all(self, calls: list[tuple]) -> list[Decision]:
        """Draws call by call, in order. The questions that are left for a language model are asked together,
        each with the generator as it was at its turn."""
        decisions: list[Decision | None] = []
        rest = []
        for state, seat, rng, past in calls:
            if rng.random() < self.rate:
                decisions.append(state.kind.random(state.game, seat, rng))
            elif self.language:
                decisions.append(None)
                rest.append((state, seat, copy.deepcopy(rng), past))
            else:
                decisions.append(self.inner(state, seat, rng, past))
        answers = iter(self.inner.decide_all(rest))
        return [decision or next(answers) for decision in decisions]

    def stand_in(self) -> Expert:
        return Noisy(self.inner.stand_in(), self.rate)


def decide_together(experts: list[Expert], calls: list[tuple]) -> list[Decision]:
    """The decisions of several calls, each of its own expert, in order; those of one expert are asked for
    together."""
    decisions: dict[int, Decision] = {}
    for expert in dict.fromkeys(experts):
        own = [k for k, other in enumerate(experts) if other is expert]
        decisions |= zip(own, expert.decide_all([calls[k] for k in own]), strict=True)
    return [decisions[k] for k in range(len(calls))]


def make_expert(name: str, language: Callable[[str], Expert] | None = None) -> Expert:
    """The expert of a name. language: makes those of openai: and hf: names (teachers/language.py). Raises
    InputError for a name that is none, or for a language model that is not available."""
    inner, rate = split_noisy(name) if name.startswith("noisy:") else (name, None)
    if inner.startswith(("openai:", "hf:")):
        if language is None:
            raise InputError(f"{name}: a language model cannot be used here; choose an exact expert")
        expert = language(inner)
    elif inner == "random":
        expert = Random()
    elif inner.startswith("switch:") and inner.count(":") == 2:
        expert = Switch(*(make_expert(part) for part in inner.split(":")[1:]))
    elif inner in RULES:
        expert = Exact(inner)
    else:
        known = f"{', '.join(RULES)}, random, switch:A:B, openai:MODEL, hf:PATH or noisy:EXPERT:RATE"
        raise InputError(f"unknown expert {inner!r}; choose from {known}")
    return expert if rate is None else Noisy(expert, rate)


def split_noisy(name: str) -> tuple[str, float]:
    """noisy:EXPERT:RATE -> (EXPERT, RATE)."""
    inner, _, text = name.removeprefix("noisy:").rpartition(":")
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise InputError(f"{name!r} is not noisy:EXPERT:RATE, rate 0 to 1, for example noisy:nash:0.15")
    return inner, rate

"""Experts that are language models: a model on a server (`openai:MODEL`) or a local one (`hf:PATH`).

    OPENAI_BASE_URL=http://localhost:8000/v1 python -m tools.expert_games --expert openai:MODEL --games 126
    python -m tools.expert_games --expert hf:runs/tompo/adapter

Both are asked in the conversation of the seat they sit in, which is the policy's own (prompts.messages), and
are read by the same strict parser. [choice] A reply that is not compliant is asked for again, as the same
question, up to `attempts` times; then no links / effort 0 is played, which is also the label, and counted. A
reply without a readable Belief line becomes a label without one. Efforts are rounded as labels are.

A question's `draw` names which sample of the model's law is meant. [choice] It is the state of the random
stream that is given to the expert, which is not advanced: so a decision belongs to (seed, game, seat, stage),
equal prompts of different games are asked independently, and the players that evaluation compares meet the
same answers. At temperature 0 equal prompts are one question, whoever asks it.
"""

import copy
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from games import State
from prompts import EFFORT_DIGITS, Decision, PromptStyle, fallback, format_reply, messages, parse_reply
from run.files import InputError, read_json

MAX_TOKENS = 4096  # of a server's answer: models that reason at length need them, and others do not use them
LARGEST_BELIEF = 1e6  # a belief beyond it is none: it would stand in the label in full
BATCH = 64  # questions that a local model answers in one go


@dataclass(frozen=True)
class Asking:
    """How language models are asked: what --ask says."""

    style: PromptStyle = PromptStyle()
    device: str | None = None  # None: CUDA where there is one
    temperature: float | None = None  # None: the server's own; of a local model 1
    max_tokens: int | None = None  # None: MAX_TOKENS; of a local model what two lines need
    attempts: int = 3  # times a decision is asked for before it is given up
    concurrency: int = 8  # questions under way at a time
    timeout: float = 180.0  # seconds to wait for an answer
    retries: int = 6  # tries after one that failed (429, 5xx, time-outs, ...)
    record: str = "expert_answers.jsonl"  # a server's answers; none that it holds is asked for again
    price_in: float | None = None  # USD per million tokens
    price_out: float | None = None
    budget: float | None = None  # USD; no more is asked once the answers in the record cost this


# What --ask takes beside record=FILE: the lowest values, whose types are those of the settings.
LOWEST = {"temperature": 0.0, "max-tokens": 1, "attempts": 1, "concurrency": 1, "timeout": 0.01, "retries": 0}
LOWEST |= {"price-in": 0.0, "price-out": 0.0, "budget": 0.0}


def asking(pairs: list[str] | None, style: PromptStyle, device: str | None = None) -> Asking:
    """Of the NAME=VALUE pairs of --ask, of which the last of a name counts. Raises InputError."""
    values = {}
    for pair in with_record(pairs):
        name, _, text = pair.partition("=")
        lowest = LOWEST.get(name, "")
        try:
            value = type(lowest)(text)
            good = name == "record" or (name in LOWEST and lowest <= value < math.inf)
        except ValueError:
            good = False
        if not good:
            known = ", ".join(f"{name} (from {lowest:g})" for name, lowest in LOWEST.items())
            raise InputError(f"--ask {pair!r}: write NAME=VALUE, of {known}, record (a file)")
        values[name.replace("-", "_")] = value
    prices = len({"price_in", "price_out"} & set(values))
    if prices == 1 or (prices == 0 and "budget" in values):
        raise InputError("--ask: a budget needs price-in and price-out, the USD per million tokens")
    return Asking(style, device, **values)


def with_record(pairs: list[str] | None) -> list[str]:
    """The same with the record's whole path: what a run keeps that may be resumed from another folder."""
    split = [pair.partition("=") for pair in [f"record={Asking.record}", *(pairs or ())]]
    return [f"record={os.path.abspath(v)}" if (n, e) == ("record", "=") else n + e + v for n, e, v in split]


@dataclass(frozen=True, eq=False)
class Question:
    """A decision that is asked for. chat: the messages; draw: which sample of the model's law."""

    chat: list[dict]
    draw: str
    state: State
    seat: int

    @property
    def key(self) -> tuple[str, str]:
        return json.dumps(self.chat), self.draw


def read(text: str, question: Question) -> Decision | None:
    """The decision of a compliant answer, exactly as its label will say it; None for any other."""
    game, kind, seat = question.state.game, question.state.kind, question.seat
    decision = parse_reply(text, kind, seat, game.N, game.caps[seat])
    if decision is None:
        return None
    belief_N, action = decision.belief, decision.action
    if belief_N is not None and np.abs(belief_N).max() > LARGEST_BELIEF:
        belief_N = None
    if kind == "E":
        action = round(action, EFFORT_DIGITS)
        if action > game.caps[seat]:
            action = math.floor(game.caps[seat] * 10**EFFORT_DIGITS) / 10**EFFORT_DIGITS
    return Decision(kind, action, belief_N)


class LocalModel:
    """A Hugging Face model folder or id, an adapter's folder, or a chain FOLDER+FOLDER of adapters."""

    def __init__(self, name: str, ask: Asking):
        import torch  # here and below: exact experts, and those on a server, do without

        from models.load import load_policy, put_adapter

        adapter = Path(name if os.path.isdir(name) else name.split("+")[0], "adapter_config.json")
        base = read_json(adapter).get("base_model_name_or_path") if adapter.exists() else name
        if not base:
            raise InputError(f"{adapter} does not name its base model")
        self.policy = load_policy(base, device=ask.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if adapter.exists():
            put_adapter(self.policy, name)
        self.temperature = 1.0 if ask.temperature is None else ask.temperature
        self.max_tokens, self.asked, self.tokens = ask.max_tokens, 0, [0, 0]

    def ask_all(self, questions: list[Question], attempt: int) -> list[str]:
        import torch

        texts, starts = [], range(0, len(questions), BATCH)
        for start in tqdm(starts, "asking the expert", leave=False, disable=len(questions) < 10):
            part = questions[start : start + BATCH]
            prompts = [self.policy.encode_prompt(q.chat) for q in part]
            limit = self.max_tokens or 20 + 7 * max(q.state.game.N for q in part)
            hashes = [hashlib.sha256(f"{q.draw} {attempt}".encode()).hexdigest() for q in part]
            # Each question has its own generator: an answer does not depend on what else is in the batch.
            generators = [torch.Generator().manual_seed(int(h[:15], 16)) for h in hashes]
            replies = [r for (r,) in self.policy.sample(prompts, 1, limit, self.temperature, generators)]
            texts += [reply.text for reply in replies]
            self.asked += len(part)
            self.tokens[0] += sum(map(len, prompts))
            self.tokens[1] += sum(len(reply.reply_ids) for reply in replies)
        return texts

    def report(self) -> str:
        return f"{self.asked} answers sampled, {self.tokens[0]} tokens in and {self.tokens[1]} out"


class LanguageExpert:
    """An Expert, see experts.py. `make` makes it."""

    def __init__(self, name: str, ask: Asking):
        kind, _, model = name.partition(":")
        if not model or not model.isprintable():
            raise InputError(f"{name!r} names no model; write openai:MODEL or hf:PATH")
        self.name, self.ask, self.model = name, ask, None
        self.rates: list[float] = []  # of noisy:...:RATE around it, the outermost first
        self.known: dict[tuple[str, str], Decision | None] = {}  # None: no attempt could be read
        self.counts = Counter()
        self.attempts = 1 if kind == "hf" and ask.temperature == 0 else ask.attempts  # greedy: the same again
        if os.environ.get("RANK", "0") != "0":  # of several processes only the first one asks
            return
        if kind == "hf":
            self.model = LocalModel(model, ask)
        else:
            try:
                from teachers.chat_client import ChatClient  # here, since all else does without `openai`
            except ModuleNotFoundError:
                advice = "pip install -r requirements-experts.txt"
                raise InputError(f"{name} needs the package openai: {advice}") from None
            sampling = ask.temperature, ask.max_tokens or MAX_TOKENS
            price = None if ask.price_in is None else (ask.price_in, ask.price_out)
            how = ask.concurrency, ask.timeout, ask.retries, price, ask.budget
            self.model = ChatClient(model, ask.record, *sampling, *how)

    def __call__(self, state: State, seat: int, rng: np.random.Generator | None, past=()) -> Decision:
        return self.decide_all([(state, seat, rng, past)])[0]

    def decide_all(self, calls: list[tuple]) -> list[Decision]:
        """All questions are asked together; before, call by call, `noisy` draws as with exact experts."""
        begun = [self._begin(*call) for call in calls]
        answers = iter(self._answer_all_ranks([d for d in begun if isinstance(d, Question)]))
        return [next(answers) if isinstance(d, Question) else d for d in begun]

    def _begin(self, state: State, seat: int, rng, past=()) -> Decision | Question:
        """past: what the agent answered in the stages before, as texts or as decisions."""
        from experts import _random  # here, since experts imports this file

        if any(rng.random() < rate for rate in self.rates):
            return _random(state, seat, rng, past)
        draw, style = "", self.ask.style
        if self.ask.temperature != 0 and rng is not None:
            draw = hashlib.sha256(repr(rng.bit_generator.state).encode()).hexdigest()[:16]
        replies = [format_reply(p, style) if isinstance(p, Decision) else p for p in past]
        return Question(messages(state, seat, replies, style), draw, state, seat)

    def _answer_all_ranks(self, questions: list[Question]) -> list[Decision]:
        """The first of several processes asks, and all get its answers, or its error."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return self._answer(questions)
        from run import ranks  # here, since it imports torch, which experts on a server do without

        result = None
        if ranks.first():
            try:
                result = self._answer(questions)
            except InputError as e:
                result = e
        result = ranks.exchange(result)[0]
        if isinstance(result, InputError):
            raise result
        return result

    def _answer(self, questions: list[Question]) -> list[Decision]:
        left = {q.key: q for q in questions if q.key not in self.known}
        for attempt in range(1, self.attempts + 1):
            if left:
                self.counts["repeated"] += len(left) if attempt > 1 else 0
                texts = self.model.ask_all(list(left.values()), attempt)
                found = {key: read(text, q) for (key, q), text in zip(left.items(), texts)}
                self.known |= {key: decision for key, decision in found.items() if decision}
                left = {key: q for key, q in left.items() if not found[key]}
        self.known |= dict.fromkeys(left)
        decisions = [self.known[q.key] for q in questions]
        self.counts["decisions"] += len(decisions)
        self.counts["fallbacks"] += decisions.count(None)
        if self.ask.style.belief:
            self.counts["no belief"] += sum(d is not None and d.belief is None for d in decisions)
        return [d or fallback(q.state.kind, q.state.game.N) for d, q in zip(decisions, questions)]

    def report(self) -> str:
        c = self.counts
        lost = f", {c['no belief']} without a belief" if c["no belief"] else ""
        return (
            f"{self.name}: {c['decisions']} decisions{lost}, {c['repeated']} answers asked for again, "
            f"{c['fallbacks']} decisions not compliant in any attempt (played as no links / effort 0); "
            + self.model.report()
        )


_made: dict[tuple[str, Asking], LanguageExpert] = {}  # a model is loaded, and its answers counted, once


def make(name: str, ask: Asking | None = None) -> LanguageExpert:
    """The expert of openai:MODEL, hf:PATH or noisy:...:RATE around one. Raises InputError for what can be
    known to be wrong before the first question."""
    from experts import split_noisy  # here, since experts imports this file

    rates, ask = [], ask or asking(None, PromptStyle())
    while name.startswith("noisy:"):
        name, rate = split_noisy(name)
        rates.append(rate)
    if (name, ask) not in _made:
        _made[name, ask] = LanguageExpert(name, ask)
    expert = copy.copy(_made[name, ask])  # shares the model, what is known, and the counts
    expert.rates = rates
    return expert


def print_report() -> None:
    """One line for each language model that has been asked in this process."""
    for expert in _made.values():
        if expert.counts["decisions"]:
            print(expert.report())

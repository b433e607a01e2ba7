"""Experts that are language models: a model on a server (`openai:MODEL`) or a local one (`hf:PATH`).

    OPENAI_BASE_URL=http://localhost:8000/v1 python experts.py --expert openai:MODEL --games 126 --dry-run
    python experts.py --expert hf:runs/tompo/adapter

Both are asked in the conversation of the seat they sit in, which is the policy's own (prompts.messages), and are read by
the same strict parser. [choice] A reply that is not compliant is asked for again, as the same question, up to
--expert-attempts times; then no links / effort 0 is played, which is also the label, and counted. A reply without a
readable Belief line becomes a label without one. Efforts are rounded to the two decimals that labels have.

Such an expert returns a Question, not a Decision: `settle` asks all questions of a stage together, over all seats and
games. A question's `draw` names which sample of the model's law is meant. [choice] It is the state of the random
stream that is given to the expert, which is not advanced: so a decision belongs to (seed, game, seat, stage), as with
the exact experts, equal prompts of different games are asked independently, and the players that evaluation compares
meet the same answers. At temperature 0 there is nothing to draw: equal prompts are one question, whoever asks it.

--expert-program: the answer to an effort may be an arithmetic expression, whose value is the effort (arithmetic.py).
"""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from teachers.arithmetic import arithmetic
from teachers.chat_client import ChatClient, estimated_tokens
from games import State
from prompts import EFFORT_DIGITS, Decision, PromptStyle, fallback, format_reply, last_line, messages, parse_reply
from run.files import InputError, number, positive_int

KINDS = ("openai:", "hf:")
PROGRAM = (
    " You may write an effort as a calculation, of numbers and + - * / ( ) alone, for example Decision: 1 + 0.095 * 3"
)
MAX_TOKENS = 4096  # of a server's answer: models that reason at length need them, and others do not use them
LARGEST_BELIEF = 1e6  # a belief beyond it is none: it would stand in the label in full


@dataclass(frozen=True)
class Asking:
    """How experts that are language models are asked: the --expert-... flags."""

    style: PromptStyle = PromptStyle()
    program: bool = False
    temperature: float | None = None  # None: the server's own; of a local model 1
    max_tokens: int | None = None  # None: MAX_TOKENS; of a local model what two lines need
    attempts: int = 3
    concurrency: int = 8
    timeout: float = 180.0
    retries: int = 6
    record: str = "expert_answers.jsonl"
    price: tuple[float, float] | None = None  # USD per million tokens, in and out
    budget: float | None = None  # USD
    cache: str | None = None  # folder of the default model
    device: str | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """A decision that is still to be asked for. chat: the messages; draw: which sample of the model's law."""

    expert: "LanguageExpert"
    chat: list[dict]
    draw: str
    kind: str
    seat: int
    N: int
    cap: float

    @property
    def key(self) -> tuple[str, str]:
        return json.dumps(self.chat), self.draw


def conversation(state: State, seat: int, past: list, asking: Asking) -> list[dict]:
    """The prompt of the expert. past: what the agent answered in the stages before, as texts or as decisions."""
    replies = [format_reply(p, asking.style) if isinstance(p, Decision) else p for p in past]
    chat = messages(state, seat, replies, asking.style)
    if asking.program:
        chat[0] = chat[0] | {"content": chat[0]["content"] + PROGRAM}
    return chat


def read(text: str, question: Question, program: bool) -> Decision | None:
    """The decision of a compliant answer, exactly as its label will say it; None for any other."""
    place = question.kind, question.seat, question.N, question.cap
    decision = parse_reply(text, *place)
    if decision is None and program and question.kind == "E":
        value = arithmetic(last_line(text, "Decision:") or "")
        decision = None if value is None else parse_reply(f"{text}\nDecision: {value!r}", *place)
    if decision is None:
        return None
    belief_N, action = decision.belief, decision.action
    if belief_N is not None and (np.abs(belief_N) > LARGEST_BELIEF).any():
        belief_N = None
    if question.kind == "E":
        action = round(action, EFFORT_DIGITS)
        if action > question.cap:
            action = np.floor(question.cap * 10**EFFORT_DIGITS) / 10**EFFORT_DIGITS
    return Decision(question.kind, action if question.kind == "G" else float(action), belief_N)


def settle(decisions: list[Decision | Question]) -> list[Decision]:
    """Asks the questions among them (all of one expert) and returns decisions alone. Several processes: the first one
    asks, and all get its answers."""
    questions = [d for d in decisions if isinstance(d, Question)]
    if not questions:
        return decisions
    answers = iter(_asked_by_the_first_process(questions))
    return [next(answers) if isinstance(d, Question) else d for d in decisions]


def _asked_by_the_first_process(questions: list[Question]) -> list[Decision]:
    expert = questions[0].expert
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return expert.answer(questions)
    from run import ranks  # here, since it imports torch, which exact experts do without

    result = None
    if ranks.first():
        try:
            result = expert.answer(questions)
        except InputError as e:
            result = e
    result = ranks.exchange(result)[0]
    if isinstance(result, InputError):
        raise result
    return result


# ---------------------------------------------------------------------------------------------------------------------
# the two kinds of model: `ask_all` answers (messages, draw, N) with texts


class LocalModel:
    """A Hugging Face model folder or id, or an adapter's folder."""

    BATCH = 64

    def __init__(self, name: str, asking: Asking):
        import torch  # here and below: exact experts, and those on a server, do without

        import policy

        base, adapter = name, Path(name) / "adapter_config.json"
        if adapter.exists():
            try:
                base = json.loads(adapter.read_text())["base_model_name_or_path"]
            except (OSError, ValueError, LookupError, TypeError):
                base = None
            if not isinstance(base, str):
                raise InputError(f"{adapter} does not name its base model")
        device = asking.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = policy.load_policy(base, asking.cache, device=device)
        if adapter.exists():
            policy.put_adapter(self.policy, name)
        self.temperature = 1.0 if asking.temperature is None else asking.temperature
        self.max_tokens, self.program, self.asked, self.tokens = asking.max_tokens, asking.program, 0, [0, 0]

    def ask_all(self, questions: list[tuple[list[dict], str, int]], attempt: int) -> list[str]:
        import torch

        texts = []
        starts = range(0, len(questions), self.BATCH)
        for start in tqdm(starts, "asking the expert", leave=False, disable=len(questions) < 10):
            part = questions[start : start + self.BATCH]
            prompts = [self.policy.encode_prompt(chat) for chat, _, _ in part]
            limit = self.max_tokens or 20 + (7 + 10 * self.program) * max(N for _, _, N in part)
            seeds = [int(hashlib.sha256(f"{draw} {attempt}".encode()).hexdigest()[:15], 16) for _, draw, _ in part]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # not one: a batch may differ, a draw not
            groups = self.policy.sample(prompts, 1, limit, self.temperature, generators)
            texts += [group[0].text for group in groups]
            self.asked += len(part)
            self.tokens[0] += sum(map(len, prompts))
            self.tokens[1] += sum(len(group[0].reply_ids) for group in groups)
        return texts

    def report(self) -> str:
        return f"{self.asked} answers sampled, {self.tokens[0]} tokens in and {self.tokens[1]} out"


class ServerModel:
    def __init__(self, name: str, asking: Asking):
        limit = asking.max_tokens or MAX_TOKENS
        how = asking.concurrency, asking.timeout, asking.retries, asking.price, asking.budget
        self.client = ChatClient(name, asking.record, asking.temperature, limit, *how)
        self.report = self.client.report

    def ask_all(self, questions: list[tuple[list[dict], str, int]], attempt: int) -> list[str]:
        return self.client.ask_all([(chat, draw) for chat, draw, _ in questions], attempt)


# ---------------------------------------------------------------------------------------------------------------------
# the expert


@dataclass
class Counts:
    decisions: int = 0
    repeated: int = 0
    fallbacks: int = 0
    no_belief: int = 0


@dataclass(eq=False)
class LanguageExpert:
    """An Expert (see experts.py) that returns Questions."""

    name: str
    asking: Asking
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self):
        kind, _, model = self.name.partition(":")
        self.known: dict[tuple[str, str], Decision | None] = {}  # None: it was fallen back
        self.model = None
        if os.environ.get("RANK", "0") == "0":  # of several processes only the first one asks
            self.model = (LocalModel if kind == "hf" else ServerModel)(model, self.asking)

    def __call__(self, state: State, seat: int, rng: np.random.Generator | None, past=()) -> Question:
        draw = ""
        if self.asking.temperature != 0 and rng is not None:
            draw = hashlib.sha256(repr(rng.bit_generator.state).encode()).hexdigest()[:16]
        chat = conversation(state, seat, list(past), self.asking)
        return Question(self, chat, draw, state.kind, seat, state.game.N, float(state.game.caps[seat]))

    def answer(self, questions: list[Question]) -> list[Decision]:
        left = {q.key: q for q in questions if q.key not in self.known}
        attempts = self.asking.attempts
        if isinstance(self.model, LocalModel) and self.asking.temperature == 0:
            attempts = 1  # it would say the same again
        for attempt in range(1, attempts + 1):
            if not left:
                break
            texts = self.model.ask_all([(q.chat, q.draw, q.N) for q in left.values()], attempt)
            self.counts.repeated += len(left) if attempt > 1 else 0
            read_now = {key: read(text, q, self.asking.program) for (key, q), text in zip(left.items(), texts)}
            self.known |= {key: decision for key, decision in read_now.items() if decision is not None}
            left = {key: q for key, q in left.items() if read_now[key] is None}
        self.known |= dict.fromkeys(left)
        return [self._decision(q) for q in questions]

    def _decision(self, question: Question) -> Decision:
        decision = self.known[question.key]
        self.counts.decisions += 1
        self.counts.fallbacks += decision is None
        self.counts.no_belief += decision is not None and decision.belief is None and self.asking.style.belief
        return decision or fallback(question.kind, question.N)

    def report(self) -> str:
        c, lost = self.counts, f", {self.counts.no_belief} without a belief" if self.counts.no_belief else ""
        return (
            f"{self.name}: {c.decisions} decisions{lost}, {c.repeated} answers asked for again, {c.fallbacks} decisions not "
            f"compliant in any attempt (played as no links / effort 0); {self.model.report()}"
        )


_made: dict[tuple[str, Asking], LanguageExpert] = {}  # so that a model is loaded, and answers are counted, once


def make(name: str, asking: Asking) -> LanguageExpert:
    """Raises InputError: what can be known to be wrong before the first question is."""
    if (name, asking) not in _made:
        _made[name, asking] = LanguageExpert(name, asking)
    return _made[name, asking]


def check_name(name: str) -> None:
    if name in KINDS or not name.isprintable():
        raise InputError(f"{name!r} names no model; write openai:MODEL or hf:PATH")


def print_report() -> None:
    """One line for each language model that has been asked in this process."""
    for expert in _made.values():
        if expert.counts.decisions:
            print(expert.report())


def is_language(name: str) -> bool:
    while name.startswith("noisy:"):
        name = name[len("noisy:") :].rpartition(":")[0]
    return name.startswith(KINDS)


# ---------------------------------------------------------------------------------------------------------------------
# estimates, and the flags


class Rehearsal:
    """Sits in for a language model, plays an exact expert, and notes what the model would have been asked."""

    def __init__(self, expert, asking: Asking):
        self.expert, self.asking = expert, asking
        self.requests, self.characters_in, self.characters_out = 0, 0, 0

    def __call__(self, state: State, seat: int, rng, past=()) -> Decision:
        decision = self.expert(state, seat, rng)
        self.requests += 1
        self.characters_in += sum(len(m["content"]) for m in conversation(state, seat, list(past), self.asking))
        self.characters_out += len(format_reply(decision, self.asking.style))
        return decision

    def report(self, name: str) -> str:
        limit, price = self.asking.max_tokens or MAX_TOKENS, self.asking.price
        tokens_in, tokens_out = estimated_tokens(self.characters_in, self.characters_out)
        text = f"dry run, nothing was asked: {name} would get {self.requests} questions (and some of them again), about "
        text += f"{tokens_in} tokens in and {tokens_out} out (as many as {limit * self.requests} if it reasons at length)"
        if price:
            low, high = ((tokens_in * price[0] + out * price[1]) / 1e6 for out in (tokens_out, limit * self.requests))
            text += f", about ${low:.2f} (at most ${high:.2f}, without repetitions)"
        return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts that are language models")
    add = group.add_argument
    add("--expert-program", action="store_true", help="an effort may be an expression, such as 1 + 0.095 * 3")
    add("--expert-temperature", type=number(float, 0), help="0 is greedy (default: the server's own; hf: 1)")
    add("--expert-max-tokens", type=positive_int, help=f"longest answer (default: {MAX_TOKENS}; hf: as for the policy)")
    add("--expert-attempts", type=positive_int, default=3, help="times to ask before a decision is given up")
    add("--expert-concurrency", type=positive_int, default=8, help="questions under way at a time")
    add("--expert-timeout", type=number(float, 0.01), default=180.0, help="seconds to wait for an answer")
    add("--expert-retries", type=number(int, 0), default=6, help="tries after one that failed (429, 5xx, time-outs, ...)")
    record = "record of a server's answers; none that it holds is asked for again"
    add("--expert-cache", default="expert_answers.jsonl", metavar="FILE", help=record)
    price = "USD per million tokens, to report what was spent"
    add("--expert-price", nargs=2, type=number(float, 0), metavar=("IN", "OUT"), help=price)
    add("--expert-budget", type=number(float, 0), metavar="USD", help="ask no more once the answers in the record cost this")


def asking_of(args: argparse.Namespace, style: PromptStyle) -> Asking:
    """Of the parsed flags. Raises InputError."""
    if args.expert_budget is not None and args.expert_price is None:
        raise InputError("--expert-budget needs --expert-price IN OUT, the USD per million tokens")
    price = tuple(args.expert_price) if args.expert_price else None
    how = args.expert_attempts, args.expert_concurrency, args.expert_timeout, args.expert_retries, args.expert_cache
    sampling = args.expert_program, args.expert_temperature, args.expert_max_tokens
    cache, device = getattr(args, "cache", None), getattr(args, "device", None)
    return Asking(style, *sampling, *how, price, args.expert_budget, cache, device)

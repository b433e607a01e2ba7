"""Experts that are language models: a model on a server (`openai:MODEL`) or a local one (`hf:PATH`). How they
are asked, and what happens to bad answers, is in docs/language-model-experts.md.

A question's `draw` names a sample of the model's distribution. [choice] It is a hash of the state of the
random generator that the expert is given, and does not advance it. So a decision belongs to (seed, game,
seat, stage), equal prompts of different games are asked independently, and the players that evaluation
compares get the same answers. At temperature 0 equal prompts are one question, whoever asks it.
"""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from decisions import EFFORTS
from experts import Exact, Expert
from games import Decision, State
from models.adapters import chain
from models.load import default_device, load_policy, put_adapter
from prompts import EFFORT_DIGITS, messages, parse_reply
from run import ranks
from run.errors import InputError
from run.files import read_json
from teachers.asking import Asking, Question

BATCH = 64  # questions that a local model answers in one pass


def read(text: str, question: Question) -> Decision | None:
    """The decision of a compliant answer, exactly as its label will state it; None for any other answer."""
    decision = parse_reply(text, question.state, question.seat)
    if decision and decision.kind is EFFORTS:
        cap, digits = question.state.game.caps[question.seat], 10**EFFORT_DIGITS
        action = round(decision.action, EFFORT_DIGITS)
        action = math.floor(cap * digits) / digits if action > cap else action
        decision = replace(decision, action=action)
    return decision


class LocalModel:
    """A Hugging Face model folder or id, an adapter's folder, or a chain FOLDER+FOLDER of adapters."""

    def __init__(self, name: str, asking: Asking):
        adapter = Path(chain(name)[0], "adapter_config.json")
        base = read_json(adapter).get("base_model_name_or_path") if adapter.exists() else name
        self.policy = load_policy(base or name, device=default_device())
        if adapter.exists():
            put_adapter(self.policy, name)
        self.temperature = 1.0 if asking.temperature is None else asking.temperature
        self.asking, self.asked = asking, 0

    def ask_all(self, questions: list[Question], attempt: int) -> list[str]:
        texts, parts = [], [questions[i : i + BATCH] for i in range(0, len(questions), BATCH)]
        for part in tqdm(parts, "asking the expert", leave=False, disable=len(questions) < 10):
            prompts = [self.policy.encode_prompt(q.chat) for q in part]
            limit = max(self.asking.max_tokens or self.asking.style.reply_limit(q.state.game.N) for q in part)
            # Each question has its own generator, so that an answer does not depend on the rest of the batch.
            seeds = [hashlib.sha256(f"{q.draw} {attempt}".encode()).hexdigest()[:15] for q in part]
            generators = [torch.Generator().manual_seed(int(seed, 16)) for seed in seeds]
            uniforms_PMS = torch.stack([torch.rand(1, limit, generator=g) for g in generators])
            groups = self.policy.sample(prompts, uniforms_PMS, self.temperature)
            texts += [reply.text for (reply,) in groups]
        self.asked += len(questions)
        return texts

    def report(self) -> str:
        return f"{self.asked} answers sampled"


class LanguageExpert(Expert):
    language = True

    def __init__(self, name: str, asking: Asking):
        kind, _, model = name.partition(":")
        if not model or not model.isprintable():
            raise InputError(f"{name!r} names no model; write openai:MODEL or hf:PATH")
        self.name, self.asking, self.model, self.counts = name, asking, None, Counter()
        self.known: dict[tuple[str, str], str | None] = {}  # compliant answers; None: no attempt had one
        greedy = kind == "hf" and asking.temperature == 0  # it would give the same answer again
        self.attempts = 1 if greedy else asking.attempts
        if os.environ.get("RANK", "0") != "0":  # of several processes only the first one asks
            return
        if kind == "hf":
            self.model = LocalModel(model, asking)
            return
        try:
            from teachers.chat_client import ChatClient  # only here: nothing else needs `openai`
        except ModuleNotFoundError:
            raise InputError(f"{name} needs: pip install -r requirements-experts.txt") from None
        self.model = ChatClient(model, asking)

    def stand_in(self) -> Expert:
        return Exact("second-best")

    def decide_all(self, calls: list[tuple]) -> list[Decision]:
        """The decisions of several calls, whose questions are asked together."""
        questions = [self.question(*call) for call in calls]
        try:  # the first of several processes asks, and all get its answers, or its error
            result = self._answers(questions) if ranks.first() else None
        except InputError as e:
            result = e
        result = ranks.exchange(result)[0]
        if isinstance(result, InputError):
            raise result
        self.counts.update(decisions=len(result), fallbacks=result.count(None))
        both = zip(result, questions, strict=True)
        return [read(text, q) if text else q.state.kind.fallback(q.state.game.N) for text, q in both]

    def question(self, state: State, seat: int, rng: np.random.Generator | None, past=()) -> Question:
        """past: the texts that the agent answered in the stages before."""
        draw, style = "", self.asking.style
        if self.asking.temperature != 0 and rng is not None:
            draw = hashlib.sha256(repr(rng.bit_generator.state).encode()).hexdigest()[:16]
        return Question(messages(state, seat, past, style), draw, state, seat)

    def _answers(self, questions: list[Question]) -> list[str | None]:
        """The first compliant answer to each question; None where no attempt has one."""
        keys = [(json.dumps(q.chat), q.draw) for q in questions]
        left = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.known}
        for attempt in range(1, self.attempts + 1):
            self.counts["repeated"] += len(left) * (attempt > 1)
            answers = dict(zip(left, self.model.ask_all(list(left.values()), attempt), strict=True))
            self.known |= {key: text for key, text in answers.items() if read(text, left[key])}
            left = {key: q for key, q in left.items() if key not in self.known}
        self.known |= dict.fromkeys(left)
        return [self.known[key] for key in keys]

    def report(self) -> str:
        c = self.counts
        text = f"{self.name}: {c['decisions']} decisions, {c['repeated']} answers asked for again, "
        text += f"{c['fallbacks']} decisions not compliant in any attempt (played as no links / effort 0); "
        return text + self.model.report()


_made: dict[tuple[str, Asking], LanguageExpert] = {}  # a model is loaded, and its answers counted, once


def make(name: str, asking: Asking) -> LanguageExpert:
    """The expert openai:MODEL or hf:PATH. Raises InputError for what is wrong before the first question."""
    if (name, asking) not in _made:
        _made[name, asking] = LanguageExpert(name, asking)
    return _made[name, asking]


def print_report() -> None:
    """Prints one line for each language model that this process has asked."""
    for expert in _made.values():
        if expert.model and expert.counts["decisions"]:
            print(expert.report())

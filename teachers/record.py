"""The record of a server's answers: a JSON line per answer, on the disk before the answer is used.

So a run that is killed loses no answer that was paid for, and the same command goes on where it stopped. What
has an answer here is never asked again; only what is under way at a kill, or is answered after the time-out,
is. An answer is found by (model, messages, sampling settings, draw, attempt), and not by the server it came
from. `draw` names which sample of the model's law it is, see language.py; `attempt` counts how often the
question was repeated because the answer could not be read.
"""

import hashlib
import json
import os

from run.files import InputError, lock

LARGEST_COUNT = 10**9  # of tokens; a server that claims more is not believed
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 2.3, 1.3  # per token, by SmolLM2's tokenizer; for estimates alone


def question_key(model: str, messages: list[dict], settings: dict, draw: str, attempt: int) -> str:
    return hashlib.sha256(
        json.dumps([model, messages, settings, draw, attempt], sort_keys=True).encode()
    ).hexdigest()


def are_counts(usage) -> bool:
    """Whether it is [tokens in, tokens out] of one answer."""
    good = isinstance(usage, list) and len(usage) == 2 and all(type(n) is int for n in usage)
    return good and 0 <= min(usage) and max(usage) <= LARGEST_COUNT


def tokens_of(answer: dict) -> tuple[int, int]:
    """Of a line of the record: in and out, as the server counted them, or an estimate."""
    if are_counts(answer.get("usage")):
        return tuple(answer["usage"])
    characters = sum(len(m["content"]) for m in answer.get("messages", ()))
    return round(characters / PROMPT_CHARACTERS), round(len(answer["text"]) / ANSWER_CHARACTERS)


class AnswerFile:
    """An append-only file of answers, one JSON object per line. One process at a time may have it open."""

    _open: dict[str, "AnswerFile"] = {}  # by path: several clients of this process share one

    def __init__(self, path: str):
        self.path = path
        advice = "wait, or name another with --ask record=FILE"
        try:
            self.held = lock(f"{path}.lock", f"another run is writing answers to {path}; {advice}")
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            with open(self.file, "rb", closefd=False) as f:
                lines = f.read().split(b"\n")
        except OSError as e:
            raise InputError(f"cannot open the record of answers {path}: {e.strerror}") from None
        self.answers: dict[str, dict] = {}
        for line in lines:
            try:
                answer = json.loads(line)
                if isinstance(answer["text"], str) and isinstance(answer["model"], str):
                    self.answers.setdefault(answer["key"], answer)
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # the half line of a run that was killed
        if len(lines) > 2 and not self.answers:
            raise InputError(f"{path} is no record of answers; name another with --ask record=FILE")
        self.torn = bool(lines[-1])  # a half line at the end: the next answer begins a new one

    @classmethod
    def open(cls, path: str) -> "AnswerFile":
        path = os.path.abspath(path)
        if path not in cls._open:
            cls._open[path] = cls(path)
        return cls._open[path]

    def close(self) -> None:
        AnswerFile._open.pop(os.path.abspath(self.path), None)
        os.close(self.file)
        self.held.lock.release()

    def append(self, answer: dict) -> None:
        """On the disk when it returns."""
        data = ("\n" * self.torn + json.dumps(answer) + "\n").encode()
        self.torn = True
        try:
            while data:
                data = data[os.write(self.file, data) :]
            os.fsync(self.file)
        except OSError as e:
            raise InputError(f"cannot write to the record of answers {self.path}: {e.strerror}") from None
        self.torn = False
        self.answers[answer["key"]] = answer

    def of_model(self, model: str) -> list[dict]:
        return [a for a in self.answers.values() if a["model"] == model]

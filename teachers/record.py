"""The record of a server's answers: one JSON line for each answer, on the disk before the answer is used. An
answer is found by (model, messages, sampling settings, draw, attempt). `draw` names a sample of the model's
distribution, see language.py; `attempt` counts how often the question was asked, for want of a compliant one.
"""

import hashlib
import json
import os
from pathlib import Path

from run.errors import InputError, library_errors
from run.files import lock, read_lines

PROMPT_CHARACTERS, ANSWER_CHARACTERS = 2.3, 1.3  # per token, by SmolLM2's tokenizer; for estimates alone


def new_line(model: str, messages: list[dict], settings: dict, draw: str, attempt: int) -> dict:
    """The line of a question, still without its answer."""
    question = json.dumps([model, messages, settings, draw, attempt], sort_keys=True)
    line = {"key": hashlib.sha256(question.encode()).hexdigest(), "model": model, "messages": messages}
    return line | {"settings": settings, "draw": draw, "attempt": attempt}


def tokens_of(answer: dict) -> tuple[int, int]:
    """Tokens in and out of a line of the record: as the server counted them, else an estimate."""
    if answer.get("usage"):
        return tuple(answer["usage"])
    characters = sum(len(m["content"]) for m in answer.get("messages", ()))
    return round(characters / PROMPT_CHARACTERS), round(len(answer["text"]) / ANSWER_CHARACTERS)


class AnswerFile:
    """An append-only file of answers, one JSON object per line. One process at a time may have it open."""

    def __init__(self, path: str):
        """Raises InputError where the file cannot be read and written, or holds something else."""
        self.path, advice = path, "name another with --ask record=FILE"
        self.lock = lock(f"{path}.lock", f"another run is writing answers to {path}; wait, or {advice}")
        with library_errors(f"cannot open the record of answers {path}"):
            self.file = open(path, "ab", buffering=0)
            rows, data = read_lines(Path(path)), Path(path).read_bytes()
        rows = [row for row in rows if all(isinstance(row.get(k), str) for k in ("key", "model", "text"))]
        self.answers: dict[str, dict] = {row["key"]: row for row in rows[::-1]}
        if data.count(b"\n") > 1 and not rows:
            raise InputError(f"{path} is no record of answers; {advice}")
        self.half_line = not data.endswith(b"\n") and data != b""  # the next answer begins a new one

    def append(self, answer: dict) -> None:
        """Writes an answer, which is on the disk when this returns."""
        data = ("\n" * self.half_line + json.dumps(answer) + "\n").encode()
        self.half_line = True
        with library_errors(f"cannot write to the record of answers {self.path}"):
            while data:  # a disk that is almost full takes a part
                data = data[self.file.write(data) :]
            os.fsync(self.file)
        self.half_line = False
        self.answers[answer["key"]] = answer


_open: dict[str, AnswerFile] = {}  # by path


def open_record(path: str) -> AnswerFile:
    """The record at this absolute path, which all clients of this process share."""
    if path not in _open:
        _open[path] = AnswerFile(path)
    return _open[path]

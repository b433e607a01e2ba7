"""Questions to a server that speaks the chat-completions protocol, and the record of its answers.

The server's address and key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY). They are written
nowhere: not into the record, not into a log, and the key is taken out of whatever a server says before that
is shown or kept.

The record is the cache: a JSON line per answer, on the disk before the answer is used, so a run that is
killed loses no answer that was paid for, and the same command goes on where it stopped. What has an answer
there is never asked again; only what is under way at a kill, or is answered after the time-out, is.
An answer is found by (model, messages, sampling settings, draw, attempt), and not by the server it came from.
`draw` names which sample of the model's law it is, see language.py; `attempt` counts how often the question
was repeated because the answer could not be read.

NumPy and torch are not needed here, nor anything else outside the standard library.
"""

import email.utils
import hashlib
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm

from run.files import InputError, lock, one_line

BACKOFF = 1.0  # seconds before the first repetition; doubles with each, and is spread by half of itself
LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 600.0  # a server that asks for more patience (Retry-After) ends the run
LARGEST_BODY = 2**24
LARGEST_COUNT = 10**9  # of tokens; a server that claims more is not believed
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 2.3, 1.3  # per token, by SmolLM2's tokenizer; for estimates alone


# -------------------- the record


def question_key(model: str, messages: list[dict], settings: dict, draw: str, attempt: int) -> str:
    return hashlib.sha256(
        json.dumps([model, messages, settings, draw, attempt], sort_keys=True).encode()
    ).hexdigest()


class AnswerFile:
    """An append-only file of answers, one JSON object per line. One process at a time may have it open."""

    _open: dict[str, "AnswerFile"] = {}  # by path: several clients of this process share one

    def __init__(self, path: str):
        self.path, self.lock = path, threading.Lock()
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
        with self.lock:
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
        with self.lock:
            return [a for a in self.answers.values() if a["model"] == model]


# -------------------- the server


@dataclass
class Server:
    """Where to ask. Never printed."""

    url: str
    key: str

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.url).netloc

    def clean(self, text: str) -> str:
        """Without the key (those of local servers, such as `EMPTY`, are words and no secrets)."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text


def server_from_environment() -> Server:
    """Raises InputError, which does not quote what is wrong: it may be a key in the wrong place."""
    base = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    try:
        parts = urllib.parse.urlsplit(base)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        good = good and not (parts.username or parts.query or parts.fragment)
        good = good and base.isascii() and base.isprintable() and " " not in base
    except ValueError:
        good = False
    if not good:
        raise InputError(
            "OPENAI_BASE_URL must be an address such as http://localhost:8000/v1, without user name or query"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("OPENAI_API_KEY holds characters that no key has")
    if not key and parts.hostname == "api.openai.com":
        raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL to the address of another server (…/v1)")
    return Server(base.rstrip("/") + "/chat/completions", key)


class _Again(Exception):
    """This try failed; another may not. wait: seconds the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Stopped(Exception):
    """Another question has failed for good."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # the key goes to the host it is meant for and to no other
        return None


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or a date."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, AttributeError, OverflowError):
        return 0.0


def _read(response, deadline: float) -> bytes:
    """The body; a server that only drips is left at the deadline."""
    data = b""
    while chunk := response.read1(2**16):
        data += chunk
        if len(data) > LARGEST_BODY:
            raise _Again("a body without end")
        if time.monotonic() > deadline:
            raise _Again("no whole answer in time")
    return data


def post(server: Server, body: dict, timeout: float) -> dict:
    """One try. Raises _Again for what may pass, InputError for what will not."""
    headers = {"Content-Type": "application/json", "User-Agent": "tompo"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    request = urllib.request.Request(server.url, json.dumps(body).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=timeout) as response:
            data = _read(response, time.monotonic() + timeout)
    except urllib.error.HTTPError as e:
        raise _refusal(server, e, body["model"]) from None
    except ssl.SSLCertVerificationError as e:
        raise InputError(f"{server.host}: {e.verify_message}") from None
    except (OSError, http.client.HTTPException) as e:
        # (URLError, time-outs and broken connections are of these.)
        cause = getattr(e, "reason", e)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise InputError(f"{server.host}: {cause.verify_message}") from None
        raise _Again(server.clean(" ".join(str(cause).split())) or type(cause).__name__) from None
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        content = choice["message"].get("content")
        if content is not None and not isinstance(content, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Again("an answer that is no chat completion, or half of one") from None
    usage = answer.get("usage")
    counts = [
        usage.get(name) if isinstance(usage, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    good = all(type(n) is int and 0 <= n <= LARGEST_COUNT for n in counts)
    # (No content: a refusal, or all tokens were spent on reasoning. It was paid for, and it cannot be read.)
    finish = choice.get("finish_reason")
    finish = server.clean(finish) if isinstance(finish, str) else None
    return {"text": server.clean(content or ""), "finish": finish, "usage": counts if good else None}


def _refusal(server: Server, error: urllib.error.HTTPError, model: str) -> Exception:
    status, code, detail = error.code, None, ""
    try:
        detail = error.read(2**16).decode(errors="replace")
        inner = json.loads(detail)["error"]
        detail = inner if isinstance(inner, str) else inner["message"]
        code = None if isinstance(inner, str) else inner.get("code") or inner.get("type")
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        pass
    detail = server.clean(" ".join(str(detail).split()))[:200]
    said = f"{server.host} answered {status}" + (f": {detail}" if detail else "")
    if status in (401, 403):
        return InputError(f"{said} (is OPENAI_API_KEY the key of this server?)")
    if status == 404:
        return InputError(
            f"{said} (does it have {model!r}, and does OPENAI_BASE_URL end as it should, mostly in /v1?)"
        )
    if status == 429 and code == "insufficient_quota":
        return InputError(said)
    if status in (408, 409, 425, 429) or status >= 500:
        return _Again(said, _retry_after(error.headers.get("Retry-After")))
    return InputError(said)


# -------------------- asking


class ChatClient:
    """Asks one model with fixed settings. temperature, max_tokens: None leaves them to the server; price: USD
    per million tokens, in and out; budget: USD, of all answers of this model in the record."""

    def __init__(
        self,
        model: str,
        record: str,
        temperature: float | None = None,
        max_tokens: int | None = None,
        concurrency: int = 8,
        timeout: float = 180.0,
        retries: int = 6,
        price: tuple[float, float] | None = None,
        budget: float | None = None,
    ):
        self.server, self.file, self.model = server_from_environment(), AnswerFile.open(record), model
        self.settings = {"temperature": temperature, "max_tokens": max_tokens}
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.price, self.budget = price, budget
        self.lock, self.stop = threading.Condition(), threading.Event()
        self.limit_name = "max_tokens"
        self.quiet_until = 0.0  # a server that asks one question to wait is left alone by all
        self.noted: set[str] = set()
        self.asked = self.failed = self.used = 0  # answers, tries without one, answers of the record
        self.under_way = 0
        self.tokens = [0, 0]  # in and out, of this run
        costs = [self.cost(*self._tokens(a)) for a in self.file.of_model(model)]
        self.spent, self.dearest = sum(costs), max(costs, default=0.0)
        self.spent_before = self.spent

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        price = self.price or (0.0, 0.0)
        return (tokens_in * price[0] + tokens_out * price[1]) / 1e6

    @staticmethod
    def _tokens(answer: dict) -> tuple[int, int]:
        """As the server counted them, or an estimate."""
        usage = answer.get("usage")
        good = isinstance(usage, list) and len(usage) == 2 and all(type(n) is int for n in usage)
        if good and 0 <= min(usage) and max(usage) <= LARGEST_COUNT:
            return tuple(usage)
        said = sum(len(m["content"]) for m in answer.get("messages", ()))
        return round(said / PROMPT_CHARACTERS), round(len(answer["text"]) / ANSWER_CHARACTERS)

    def ask_all(self, questions: list, attempt: int) -> list[str]:
        """The texts that answer questions (with a `chat` and a `draw`), several at a time. Raises InputError
        when one fails for good; what was under way is then waited for and recorded."""
        self.stop.clear()
        self.under_way = 0
        keys = [question_key(self.model, q.chat, self.settings, q.draw, attempt) for q in questions]
        new = {key: q for key, q in zip(keys, questions) if key not in self.file.answers}
        self.used += len(set(keys)) - len(new)
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, key, q.chat, q.draw, attempt) for key, q in new.items()]
            try:
                done, silent = as_completed(futures), len(futures) < 10
                for future in tqdm(done, "asking the expert", len(futures), leave=False, disable=silent):
                    if not isinstance(future.exception(), _Stopped):  # then another has the reason
                        future.result()
            except BaseException as e:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(e, KeyboardInterrupt):
                    kept = f"all are kept in {self.file.path}, and the same command goes on"
                    tqdm.write(f"waiting for the answers under way; {kept}")
                raise
        return [self.file.answers[key]["text"] for key in keys]

    def _ask(self, key: str, messages: list[dict], draw: str, attempt: int) -> None:
        try:
            self._begin(messages)
            started = time.monotonic()
            line = {"key": key, "model": self.model, "messages": messages, "settings": self.settings}
            line |= {"draw": draw, "attempt": attempt, **self._try_until_answered(messages)}
            line |= {"seconds": round(time.monotonic() - started, 3)}
            line |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            self.file.append(line)
            self._end(self._tokens(line))
        except BaseException:
            self.stop.set()  # no other question begins; the run ends
            raise

    def _end(self, tokens: tuple[int, int]) -> None:
        with self.lock:
            self.under_way -= 1
            self.asked += 1
            self.tokens = [a + b for a, b in zip(self.tokens, tokens)]
            self.spent += self.cost(*tokens)
            self.dearest = max(self.dearest, self.cost(*tokens))
            self.lock.notify_all()

    def _begin(self, messages: list[dict]) -> None:
        """Waits until a question fits into the budget, if it and those under way cost as much as the dearest
        that one may: max_tokens, or what one has cost. (A token is a byte at least.) Raises InputError where
        it does not fit alone."""
        with self.lock:
            longest = self.cost(len(json.dumps(messages)), self.settings["max_tokens"] or 0)
            self.dearest = max(self.dearest, longest)
            while not self.stop.is_set():
                expected = self.spent + (self.under_way + 1) * self.dearest
                if self.budget is None or (expected <= self.budget and self.spent < self.budget):
                    self.under_way += 1
                    return
                if not self.under_way:
                    cost = f"cost ${self.spent:.4f}, and one more may cost ${self.dearest:.4f}"
                    raise InputError(
                        f"the budget of ${self.budget:g} is used up: the answers in {self.file.path} {cost}; "
                        "they are kept, and the same command goes on with a higher --ask budget=USD"
                    )
                self.lock.wait(0.2)
        raise _Stopped

    def _try_until_answered(self, messages: list[dict]) -> dict:
        tries = 0
        while True:
            self._wait(self.quiet_until - time.monotonic())
            body = {"model": self.model, "messages": messages}
            if self.settings["temperature"] is not None:
                body["temperature"] = self.settings["temperature"]
            if self.settings["max_tokens"] is not None:
                body[self.limit_name] = self.settings["max_tokens"]
            try:
                return post(self.server, body, self.timeout)
            except InputError as e:
                if "max_completion_tokens" not in str(e) or "max_tokens" not in body:
                    raise
                self.limit_name = "max_completion_tokens"  # what newer models want it to be called
            except _Again as e:
                tries += 1
                with self.lock:
                    self.failed += 1
                if e.wait > LONGEST_WAIT:
                    raise InputError(
                        f"{e}; it asks to wait {e.wait:.0f} s: run the same command again then"
                    ) from None
                if tries > self.retries:
                    raise InputError(
                        f"{self.server.host} gave no answer in {tries} tries, at last: {e}; all answers so "
                        f"far are in {self.file.path}: run the same command again to go on"
                    ) from None
                if e.wait:
                    self.quiet_until = max(self.quiet_until, time.monotonic() + e.wait)
                self._note(str(e))
                self._wait(min(LONGEST_BACKOFF, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1.5))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise _Stopped

    def _note(self, reason: str) -> None:
        with self.lock:
            if reason in self.noted:
                return
            self.noted.add(reason)
        tqdm.write(f"{self.server.host}: {one_line(reason)}; trying again")

    def report(self) -> str:
        text = (
            f"{self.used} answers from {self.file.path}, {self.asked} asked for ({self.failed} tries failed)"
        )
        text += f", {self.tokens[0]} tokens in and {self.tokens[1]} out"
        if self.price:
            text += f", ${self.spent - self.spent_before:.4f}"
            text += f" (all of this model in the record: ${self.spent:.4f})"
        return text

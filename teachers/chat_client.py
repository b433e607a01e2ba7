"""Questions to a server that speaks the chat-completions protocol, by the package `openai`
(pip install -r requirements-experts.txt), and their budget. The answers are kept in a record, see record.py.

The server's address and key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY). They are written
nowhere: not into the record, not into a log, and the key is taken out of whatever a server says before that
is shown or kept.

The package tries again, backs off, waits as Retry-After says, and sees to connections, proxies and TLS. What
it leaves open is in Transport.
"""

import asyncio
import contextlib
import json
import os
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass

import httpx2  # what openai stands on
import openai
from tqdm import tqdm

from run.files import InputError, one_line
from teachers.record import AnswerFile, are_counts, question_key, tokens_of

LARGEST_BODY = 2**24  # bytes


def server_from_environment() -> tuple[str, str]:
    """Its address and key. Raises InputError, which does not quote what may be a key in the wrong place."""
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
        form = "an address such as http://localhost:8000/v1, without user name or query"
        raise InputError(f"OPENAI_BASE_URL must be {form}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("OPENAI_API_KEY holds characters that no key has")
    if not key and parts.hostname == "api.openai.com":
        raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL to the address of another server (…/v1)")
    return base, key


def is_completion(body: bytes) -> bool:
    """No content is a refusal, or all tokens were spent on reasoning. It was paid for."""
    try:
        content = json.loads(body)["choices"][0]["message"].get("content")
        return content is None or isinstance(content, str)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def said(response: httpx2.Response) -> str:
    """What a server says that does not answer."""
    try:
        return f"answered {response.status_code}: {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError, RecursionError):
        return f"answered {response.status_code}: {response.text}".removesuffix(": ")


class Transport(openai.DefaultAsyncHttpxClient):
    """Makes one try. HTTPX's time-out begins anew with every chunk, and its bodies have no limit; here a try
    has a deadline, and a body a largest size. A try that fails so, or whose answer is no chat completion,
    looks to the package like a broken connection, after which it tries again. A redirect is not followed:
    the key and the questions go to the host they are meant for and to no other."""

    def __init__(self, client: "ChatClient"):
        super().__init__(follow_redirects=False)
        self.client = client

    async def send(self, request: httpx2.Request, **how) -> httpx2.Response:
        if self.client.stopped:  # between two tries
            raise InputError("another question has failed for good")
        body = bytearray()
        try:
            async with asyncio.timeout(self.client.timeout):
                response = await super().send(request, **how | {"stream": True})
                async with contextlib.aclosing(response):
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > LARGEST_BODY:
                            raise httpx2.DecodingError("a body without end")
            if response.is_success and not is_completion(body):
                raise httpx2.DecodingError("an answer that is no chat completion, or half of one")
        except Exception as e:
            if isinstance(e, (TimeoutError, httpx2.TimeoutException)):
                e = httpx2.ReadTimeout("no whole answer in time")
            self.client.note_failure(e)
            raise e from None
        status, headers = response.status_code, response.headers
        headers.pop("content-encoding", None)  # the body is decoded
        if response.is_success:
            headers["content-type"] = "application/json"  # which servers forget to say
        if b"insufficient_quota" in body:
            headers["x-should-retry"] = "false"  # the package obeys it
        response = httpx2.Response(status, headers=headers, content=bytes(body), request=request)
        if response.is_server_error or status in (408, 409, 429):
            self.client.note_failure(said(response))
        return response


@dataclass(eq=False)
class ChatClient:
    """Asks one model with fixed settings."""

    model: str
    record: str
    temperature: float | None = None  # None: the server's own
    max_tokens: int | None = None  # None: the server's own
    concurrency: int = 8
    timeout: float = 180.0  # seconds, of one try
    retries: int = 6
    price: tuple[float, float] | None = None  # USD per million tokens, in and out
    budget: float | None = None  # USD, of all answers of this model in the record

    def __post_init__(self):
        self.url, self.key = server_from_environment()
        self.host, self.file = urllib.parse.urlsplit(self.url).netloc, AnswerFile.open(self.record)
        self.settings = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        self.limit_name, self.stopped, self.noted = "max_tokens", False, set()
        self.asked = self.failed = self.used = 0  # answers, tries without one, answers of the record
        self.tokens = [0, 0]  # in and out, of this run
        costs = [self.cost(*tokens_of(a)) for a in self.file.of_model(self.model)]
        self.spent, self.dearest = sum(costs), max(costs, default=0.0)
        self.spent_before = self.spent

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        price = self.price or (0.0, 0.0)
        return (tokens_in * price[0] + tokens_out * price[1]) / 1e6

    def ask_all(self, questions: list, attempt: int) -> list[str]:
        """The texts that answer questions (with a `chat` and a `draw`), several at a time. Raises InputError
        when one fails for good; what was under way is then waited for and recorded."""
        keys = [question_key(self.model, q.chat, self.settings, q.draw, attempt) for q in questions]
        new = {key: q for key, q in zip(keys, questions) if key not in self.file.answers}
        self.used += len(set(keys)) - len(new)
        if new:
            asyncio.run(self._ask_new(new, attempt))
        return [self.file.answers[key]["text"] for key in keys]

    async def _ask_new(self, questions: dict[str, object], attempt: int) -> None:
        api = dict(base_url=self.url, api_key=self.key or "none", max_retries=self.retries)
        waiting, tasks, under_way, self.stopped = deque(questions.items()), [], set(), False
        bar = tqdm(desc="asking the expert", total=len(waiting), leave=False, disable=len(waiting) < 10)
        async with openai.AsyncOpenAI(**api, timeout=self.timeout, http_client=Transport(self)) as api:
            try:
                while waiting or under_way:
                    while waiting and self._may_begin(waiting[0][1].chat, len(under_way)):
                        tasks.append(asyncio.create_task(self._ask(api, *waiting.popleft(), attempt)))
                        under_way.add(tasks[-1])
                    done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    bar.update(len(done))
                    for task in done:
                        task.result()
            except asyncio.CancelledError:  # by Ctrl-C
                kept = f"all are kept in {self.file.path}, and the same command goes on"
                tqdm.write(f"waiting for the answers under way; {kept}")
                raise
            finally:
                self.stopped = True  # no other try begins
                await asyncio.gather(*tasks, return_exceptions=True)
                bar.close()

    def _may_begin(self, messages: list[dict], under_way: int) -> bool:
        """Whether a question fits into the budget, if it and those under way cost as much as the dearest that
        one may: max_tokens, or what one has cost. (A token is a byte at least.) Raises InputError where it
        does not fit alone."""
        if under_way == self.concurrency:
            return False
        longest = self.cost(len(json.dumps(messages)), self.max_tokens or 0)
        self.dearest = max(self.dearest, longest)
        expected = self.spent + (under_way + 1) * self.dearest
        if self.budget is None or (expected <= self.budget and self.spent < self.budget):
            return True
        if under_way:
            return False
        cost = f"cost ${self.spent:.4f}, and one more may cost ${self.dearest:.4f}"
        raise InputError(
            f"the budget of ${self.budget:g} is used up: the answers in {self.file.path} {cost}; "
            "they are kept, and the same command goes on with a higher --ask budget=USD"
        )

    async def _ask(self, api: openai.AsyncOpenAI, key: str, question, attempt: int) -> None:
        started = time.monotonic()
        how = {"temperature": self.temperature, self.limit_name: self.max_tokens}
        how = {name: value for name, value in how.items() if value is not None}
        try:
            reply = await api.chat.completions.create(model=self.model, messages=question.chat, **how)
        except openai.APIError as e:
            error = self._error(e)
            if "max_completion_tokens" not in str(error) or "max_tokens" not in how:
                raise error from None
            self.limit_name = "max_completion_tokens"  # what newer models want it to be called
            return await self._ask(api, key, question, attempt)
        finish, text = reply.choices[0].finish_reason, reply.choices[0].message.content or ""
        counts = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        line = {"key": key, "model": self.model, "messages": question.chat, "settings": self.settings}
        line |= {"draw": question.draw, "attempt": attempt, "text": self._clean(text)}
        line |= {"finish": self._clean(finish) if isinstance(finish, str) else None}
        line |= {"usage": counts if are_counts(counts) else None}
        line |= {"seconds": round(time.monotonic() - started, 3)}
        line |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.file.append(line)
        tokens = tokens_of(line)
        self.asked += 1
        self.tokens = [a + b for a, b in zip(self.tokens, tokens)]
        self.spent += self.cost(*tokens)
        self.dearest = max(self.dearest, self.cost(*tokens))

    def _error(self, e: openai.APIError) -> InputError:
        """What to tell the user when the package gives up."""
        tries = int(e.request.headers["x-stainless-retry-count"]) + 1
        status = getattr(e, "status_code", None)
        why = self._line(said(e.response) if status else e.__cause__)
        if status in (401, 403):
            why += " (is OPENAI_API_KEY the key of this server?)"
        elif status == 404:
            advice = "does OPENAI_BASE_URL end as it should, mostly in /v1?"
            why += f" (does it have {self.model!r}, and {advice})"
        elif tries > self.retries:
            why = f"gave no answer in {tries} tries, at last: {why}; all answers so far are in "
            why += f"{self.file.path}: run the same command again to go on"
        elif "retry-after" in e.response.headers:  # of more than two minutes
            wait = self._line(e.response.headers["retry-after"])
            why += f"; it asks to wait (Retry-After: {wait}): run the same command again then"
        return InputError(f"{self.host} {why}")

    def _clean(self, text: str) -> str:
        """Without the key (those of local servers, such as `EMPTY`, are words and no secrets)."""
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def _line(self, what) -> str:
        return one_line(self._clean(str(what) or type(what).__name__), 200)

    def note_failure(self, why) -> None:
        """Of a try. The same is told once."""
        self.failed += 1
        line = f"{self.host}: a try failed: {self._line(why)}"
        if line not in self.noted:
            self.noted.add(line)
            tqdm.write(line)

    def report(self) -> str:
        text = f"{self.used} answers from {self.file.path}, {self.asked} asked for "
        text += f"({self.failed} tries failed), {self.tokens[0]} tokens in and {self.tokens[1]} out"
        if self.price:
            text += f", ${self.spent - self.spent_before:.4f}"
            text += f" (all of this model in the record: ${self.spent:.4f})"
        return text

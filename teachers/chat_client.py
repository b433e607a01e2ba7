"""Questions to a server that speaks the chat-completions protocol, by the package `openai`, and their budget.
Its address and key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY). They are written nowhere, and
the key is removed from whatever a server says before it is shown or stored.
"""

import asyncio
import json
import os
import re
import time
from collections import deque

import openai
from tqdm import tqdm

from run.errors import InputError, one_line
from teachers.asking import Asking, Question
from teachers.record import new_line, open_record, tokens_of

MAX_TOKENS = 4096  # of an answer: models that reason at length need them, and others do not use them
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:[1-9]\d{0,4})?(/[\w./~%:@=+-]*)?", re.ASCII)


def server_from_environment() -> tuple[str, str]:
    """The server's address and key. Raises InputError, which quotes neither, since they may be exchanged."""
    base = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    has_key = key or "//api.openai.com" not in base
    if not (ADDRESS.fullmatch(base) and re.fullmatch("[!-~]*", key) and has_key):
        form = "an address such as http://localhost:8000/v1, without user name or query"
        raise InputError(f"OPENAI_BASE_URL must be {form}, and OPENAI_API_KEY the key of that server")
    return base, key


class ChatClient:
    """Asks one model with fixed settings, and counts answers, tokens and costs."""

    def __init__(self, model: str, asking: Asking):
        self.model, self.asking, self.limit_name = model, asking, "max_tokens"
        self.url, self.key = server_from_environment()
        self.host, self.file = self.url.split("/")[2], open_record(os.path.abspath(asking.record))
        self.kept = f"all answers are in {self.file.path}, and the same command goes on from there"
        self.settings = {"temperature": asking.temperature, "max_tokens": asking.max_tokens or MAX_TOKENS}
        self.asked = self.failed = self.used = 0  # answers, tries before them, answers from the record
        self.tokens = [0, 0]  # in and out, of this process
        self.dearest = 0.0  # USD, that one of the questions so far may cost

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In USD; 0 without prices."""
        return (tokens_in * (self.asking.price_in or 0.0) + tokens_out * (self.asking.price_out or 0.0)) / 1e6

    def costs(self) -> list[float]:
        """Of all answers of this model in the record."""
        answers = self.file.answers.values()
        return [self.cost(*tokens_of(answer)) for answer in answers if answer["model"] == self.model]

    def ask_all(self, questions: list[Question], attempt: int) -> list[str]:
        """The texts that answer the questions, several of which are under way at a time. Raises InputError
        when one gets no answer; those under way are then waited for and recorded."""
        lines = [new_line(self.model, q.chat, self.settings, q.draw, attempt) for q in questions]
        new = {line["key"]: line for line in lines if line["key"] not in self.file.answers}
        self.used += len({line["key"] for line in lines}) - len(new)
        if new:
            asyncio.run(self._ask_new(deque(new.values())))
        return [self.file.answers[line["key"]]["text"] for line in lines]

    async def _ask_new(self, waiting: deque[dict]) -> None:
        under_way: set[asyncio.Task] = set()
        bar = tqdm(desc="asking the expert", total=len(waiting), leave=False, disable=len(waiting) < 10)
        limits = dict(max_retries=self.asking.retries, timeout=self.asking.timeout)
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False)  # the key goes to no other host
        server = dict(base_url=self.url, api_key=self.key or "none", http_client=http)
        async with openai.AsyncOpenAI(**server, **limits) as api:
            try:
                while waiting or under_way:
                    while waiting and self._may_begin(waiting[0]["messages"], len(under_way)):
                        under_way.add(asyncio.create_task(self._ask(api, waiting.popleft())))
                    done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    bar.update(len(done))
                    await asyncio.gather(*done)  # raises the error of one that failed
            finally:
                if under_way:  # a question has failed, or Ctrl-C
                    tqdm.write(f"waiting for the answers under way; {self.kept}")
                await asyncio.gather(*under_way, return_exceptions=True)
                bar.close()

    def _may_begin(self, messages: list[dict], under_way: int) -> bool:
        """Whether a question fits into the budget, if it and those under way each cost as much as the most
        expensive answer: one of the record, or one of max_tokens (a token of the prompt has at least one
        byte). Raises InputError where the question does not fit alone."""
        budget = self.asking.budget
        if under_way == self.asking.concurrency or budget is None:
            return under_way < self.asking.concurrency
        costs, longest = self.costs(), self.cost(len(json.dumps(messages)), self.settings["max_tokens"])
        spent, self.dearest = sum(costs), max([self.dearest, longest, *costs])
        fits = spent + (under_way + 1) * self.dearest <= budget
        if not fits and not under_way:
            costs = f"${spent:.4f} are spent, and one more answer may cost ${self.dearest:.4f}"
            raise InputError(f"the budget of ${budget:g} is used up: {costs}; with a higher one, {self.kept}")
        return fits

    async def _ask(self, api: openai.AsyncOpenAI, line: dict) -> None:
        """Asks a question, and writes its answer and what it cost into its line and the record."""
        settings = {self.limit_name: self.settings["max_tokens"]}
        if self.asking.temperature is not None:
            settings["temperature"] = self.asking.temperature
        create = api.chat.completions.with_raw_response.create
        limit = self.asking.timeout * (self.asking.retries + 1)  # HTTPX restarts its own with every byte
        try:
            async with asyncio.timeout(limit):
                response = await create(model=self.model, messages=line["messages"], **settings)
        except (TimeoutError, openai.APIError) as e:
            if "max_tokens" in settings and "max_completion_tokens" in str(e):
                self.limit_name = "max_completion_tokens"  # the name that newer models want
                return await self._ask(api, line)
            status, why = getattr(e, "status_code", None), f"{type(e).__name__} {e} {e.__cause__ or ''}"
            raise self._error(f"{status}: {e.response.text}" if status else why) from None
        try:
            answer = json.loads(response.text)
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            # No text at all: the model has refused, or has spent all tokens on reasoning.
            text, finish = choice["message"].get("content") or "", choice.get("finish_reason")
            counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._error(f"not a chat completion: {response.text}") from None
        usage = counts if all(type(n) is int and 0 <= n < 10**9 for n in counts) else None
        line |= {"text": self._clean(text), "finish": finish and self._clean(finish), "usage": usage}
        line |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.file.append(line)
        self.asked, self.failed = self.asked + 1, self.failed + response.retries_taken
        self.tokens = [a + b for a, b in zip(self.tokens, tokens_of(line), strict=True)]

    def _error(self, why: str) -> InputError:
        """What the user reads when a question has got no answer."""
        return InputError(f"{self.host} gave no answer: {one_line(self._clean(why), 200)}; {self.kept}")

    def _clean(self, text) -> str:
        """The text without the key. (The short key of a local server, such as `EMPTY`, is no secret.)"""
        return str(text).replace(self.key, "[key]") if len(self.key) >= 8 else str(text)

    def report(self) -> str:
        text = f"{self.used} answers from {self.file.path}, {self.asked} asked for "
        text += f"({self.failed} tries failed), {self.tokens[0]} tokens in and {self.tokens[1]} out"
        here, ever = self.cost(*self.tokens), sum(self.costs())
        return text + (f", ${here:.4f} (all of this model in the record: ${ever:.4f})" if ever else "")

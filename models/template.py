"""A model's chat template: conversations as text, and what stands around a reply in the next prompt.

What differs between templates is found by rendering small conversations. No template is known by name.
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Any

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from run.errors import InputError

# [choice] Templates that print today's date print this one on every day: a run that is resumed after midnight
# reads what it has read before. It is what Llama 3's own template takes where it knows no date.
DAY = datetime(2024, 7, 26)
# What a template must hand on as it stands: several lines, signs that it might escape, more than a few words.
ROLES = ("system", "user", "assistant", "user")
CHAT = [{"role": r, "content": f"{k} <a> &\n{'word ' * 60}{k}"} for k, r in enumerate(ROLES, 1)]


def with_fixed_day(template: str | dict | None):
    """A template, or several by name, with DAY in the place of its calls for today's date."""
    if isinstance(template, dict):
        return {name: with_fixed_day(text) for name, text in template.items()}
    call = r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)"
    return template and re.sub(call, lambda match: repr(DAY.strftime(match[2])), template)


def names_of(template: str | dict | None) -> set[str]:
    """The names that a template, or any of several, can be given from outside, besides those of `render`."""
    texts = template.values() if isinstance(template, dict) else filter(None, [template])
    parsed = (_compile_jinja_template(text).environment.parse(text) for text in texts)
    return set().union(*map(meta.find_undeclared_variables, parsed)) - {"messages", "add_generation_prompt"}


class Template:
    """folds: it has no system role, so the system message begins the first user message. end: the token that
    ends a turn, the first special one behind a reply; None if there is none."""

    def __init__(self, tokenizer, values: dict[str, Any] | None = None):
        """values: what the template is given, by name. InputError: it does not know some name. Other errors
        are those of a template that refuses a conversation."""
        for name in values or ():
            if name not in names_of(tokenizer.chat_template):
                raise InputError(f"--template {name}: the model's chat template does not know this name")
        self.tokenizer, self.values = tokenizer, values or {}
        parts = [{"role": role, "content": f"{role} 7"} for role in ("system", "user", "assistant")]
        system, user, reply = parts
        self.folds = False
        try:
            self.folds = system["content"] not in self.text([system, user])
        except Exception:  # jinja's, raised by the template itself
            self.folds = True
        self.require_all()
        self.lead = self.text([user])  # a prompt: what stands before a reply
        self.lead_ids = self.encode(self.lead)
        head, _, tail = self.text([user, reply, user]).partition(reply["content"])
        self.before = head[len(self.lead) :] if tail and head.startswith(self.lead) else ""
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.end = next((i for i in self.encode(tail) if i in special), None)
        self.after = "" if self.end is None else tail.partition(tokenizer.decode([self.end]))[0]
        if self.after.strip():  # it belongs to the next message
            self.end, self.after = None, ""

    def render(self, chat: list[dict], **how):
        return self.tokenizer.apply_chat_template(
            self.folded(chat), add_generation_prompt=True, **how, **self.values
        )

    def require_all(self) -> None:
        """InputError: a conversation lacks something that was said in it, or has it in another form."""
        said = self.text(CHAT)
        for message in self.folded(CHAT):
            if message["content"] not in said:
                what = f"does not hand on all that the {message['role']} says in a conversation"
                raise InputError(f"the model's chat template {what}; mend it, see docs/models.md")

    @property
    def checksum(self) -> str:
        """Of the template, its values, and what it makes of a conversation today."""
        data = json.dumps([self.tokenizer.chat_template, self.values, self.text(CHAT)], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:12]

    def text(self, chat: list[dict]) -> str:
        return self.render(chat, tokenize=False)

    def folded(self, chat: list[dict]) -> list[dict]:
        if not self.folds or chat[0]["role"] != "system":
            return chat
        system, first, *rest = chat
        return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_reply(self, text: str, whole: bool = True) -> list[int]:
        """The tokens of a reply as a prompt that contains it has them, without `end`. They may differ from
        those of the text alone, which some tokenizers begin with a space. whole: the reply ends here."""
        text, n = self.before + text + self.after * whole, len(self.lead_ids)
        ids = self.encode(self.lead + text)
        return ids[n:] if ids[:n] == self.lead_ids else self.encode(text)

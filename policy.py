"""The policy pi_theta: a causal language model that samples replies to prompts, and scores replies.

This file is the definition, written the plain way: transformers' own attention and cache, one prompt at a
time, the softmax over the whole vocabulary. `fast/engine.py` computes the same numbers faster behind the
same methods; the tests hold the two together. Sampling and scoring use the same distribution:
softmax(logits / temperature) in fp32, no top-k, no top-p, no dropout.

Dimensions: P prompts, M replies to a prompt, S the longest reply in tokens, V vocabulary, B sequences in a
pass, L the longest prompt with its reply, T tokens of one reply (in the training loop of all replies of a
pass).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import lora
from prompts import Reply
from run.errors import InputError


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token from each distribution and its log-probability, both (B,). Temperature 0 takes the
    likeliest token, with its log-probability at temperature 1.

    The token is the one at which the cumulative distribution exceeds the uniform number (inverse transform
    sampling), so a reply depends on its own uniform numbers alone, and not on how prompts are batched."""
    logps_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    cdf_BV = logps_BV.exp().cumsum(-1)
    # Times the last entry, since a rounded sum may end below 1, and a larger number would find no token.
    token_B = (cdf_BV <= uniforms_B[:, None] * cdf_BV[:, -1:]).sum(-1)
    if temperature == 0:
        token_B = logps_BV.argmax(-1)
    return token_B, logps_BV.gather(-1, token_B[:, None])[:, 0]


class Reach(NamedTuple):
    """Limits in tokens. context: of a prompt with its reply; advice: what to do where it is exceeded;
    window: how far back every layer sees."""

    context: int = 2**31
    advice: str = "take fewer agents or rounds, or a smaller --max-new-tokens or --think"
    window: int = 2**31


class Policy:
    """A model, its tokenizer and the two things done with them: sampling and scoring."""

    layer = lora.LoRALinear  # the class that wraps the model's layers when an adapter is injected
    cached = True  # transformers' cache of keys and values; without it, all is read anew for every token

    def __init__(
        self, model, tokenizer, name: str, end_ids: tuple[int, ...], template, reach: Reach = Reach()
    ):
        """end_ids: the tokens that end a reply; training teaches the first of them. template: the model's
        chat template, a models.template.Template."""
        self.model, self.tokenizer, self.name, self.end_ids = model, tokenizer, name, end_ids
        self.template, self.reach = template, reach
        self.device = next(model.parameters()).device
        model.eval()  # no dropout anywhere: the distribution that is sampled is the one that is scored

    def encode_prompt(self, chat: list[dict]) -> list[int]:
        """The tokens of a prompt, up to where the reply begins."""
        return self.template.render(chat, tokenize=True, return_dict=False)

    def encode_reply(self, text: str) -> list[int]:
        """The tokens of a reply with the end-of-turn token."""
        return [*self.template.encode_reply(text), self.end_ids[0]]

    def check_length(self, prompt_tokens: int, reply_tokens: int) -> None:
        """Raises InputError if the model's context is too short for both."""
        if prompt_tokens + reply_tokens > self.reach.context:
            needed = f"a prompt of {prompt_tokens} tokens and {reply_tokens} reply tokens do not fit into"
            raise InputError(f"{needed} the {self.reach.context} tokens of {self.name}; {self.reach.advice}")

    # sampling

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        uniforms_PMS: Tensor,
        temperature: float = 1.0,
        guesses: list[list[int]] | None = None,
    ) -> list[list[Reply]]:
        """M replies of up to S tokens to each of P prompts, [P][M]. Temperature 0 is greedy.

        uniforms_PMS: a random number in [0, 1) for every token of every reply; guesses: texts of a form that
        the replies may have, as token ids. They change no reply, and the fast engine is faster with them."""
        self.check_length(max(map(len, prompts), default=0), uniforms_PMS.shape[2])
        return self._sample(prompts, uniforms_PMS, temperature, guesses) if prompts else []

    def _sample(
        self, prompts: list[list[int]], uniforms_PMS: Tensor, temperature: float, guesses
    ) -> list[list[Reply]]:
        pairs = zip(prompts, uniforms_PMS, strict=True)
        return [self._sample_group(ids, uniforms_MS, temperature) for ids, uniforms_MS in pairs]

    def _sample_group(self, prompt: list[int], uniforms_MS: Tensor, temperature: float) -> list[Reply]:
        """The replies to one prompt, token by token. A reply that has ended is continued until all have
        ended; what follows its end is ignored."""
        M, cache, read = len(uniforms_MS), None, 0
        ids = torch.tensor([prompt] * M, device=self.device)
        replies: list[list[tuple[int, float]]] = [[] for _ in range(M)]  # (token, log pi) of each
        for uniforms_M in uniforms_MS.T:
            out = self.model(ids[:, read:], past_key_values=cache, use_cache=self.cached, logits_to_keep=1)
            token_M, logp_M = draw(out.logits[:, -1], uniforms_M.to(self.device), temperature)
            cache = getattr(out, "past_key_values", None)
            read = ids.shape[1] if cache is not None else 0  # a model without such a cache reads all anew
            ids = torch.cat([ids, token_M[:, None]], 1)
            for reply, token, logp in zip(replies, token_M.tolist(), logp_M.tolist(), strict=True):
                if not reply or reply[-1][0] not in self.end_ids:
                    reply.append((token, logp))
            if all(reply[-1][0] in self.end_ids for reply in replies):
                break
        return [self._reply(*map(list, zip(*reply, strict=True))) for reply in replies]

    def _reply(self, ids: list[int], logps: list[float]) -> Reply:
        ended = ids[-1] in self.end_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        return Reply(text, ids, logps, ended)

    def session(self):
        """An object with the same `sample`, for calls whose prompts go on from those of earlier calls. This
        engine reads every prompt from its beginning, so it is its own session."""
        return self

    # scoring

    def batches(self, prompts: list[list[int]], replies: list[list[list[int]]], size: int) -> list[list[int]]:
        """Which prompts, with their replies, are scored together before one backward pass: lists of indices.
        The size is a question of memory; it counts prompts here, and packed rows in the fast engine."""
        return [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]

    def token_logps(
        self, prompts: list[list[int]], replies: list[list[list[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """log pi of the tokens of every reply, a (T,) for each in the order given, with gradients. replies:
        of each prompt the token ids of one or more replies; one pass reads those of one prompt."""
        logps: list[Tensor] = []
        for prompt, group in zip(prompts, replies, strict=True):
            # Padding stands behind every reply, where causal attention hides it from what is scored.
            ids_ML = pad_sequence([torch.tensor(prompt + reply) for reply in group], batch_first=True)
            self.check_length(ids_ML.shape[1], 0)
            ids_ML, S = ids_ML.to(self.device), ids_ML.shape[1] - len(prompt)
            out = self.model(ids_ML, use_cache=False, logits_to_keep=S + 1)
            logps_MSV = (out.logits[:, -S - 1 : -1].float() / temperature).log_softmax(-1)
            logps_MS = logps_MSV.gather(-1, ids_ML[:, -S:, None])[:, :, 0]
            logps += [logps_S[: len(reply)] for logps_S, reply in zip(logps_MS, group, strict=True)]
        return logps

    @torch.no_grad()
    def reference_logps(
        self, prompts: list[list[int]], replies: list[list[list[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """log pi_ref of the same tokens: the adapter is switched off."""
        with lora.adapter_off(self.model):
            return self.token_logps(prompts, replies, temperature)

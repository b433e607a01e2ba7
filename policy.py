"""The policy pi_theta: a causal language model that samples replies to prompts, and scores replies.

This file is the definition, written the plain way: transformers' own attention and cache, one prompt at a
time, the softmax over the whole vocabulary. `fast/engine.py` gives the same numbers sooner behind the same
methods; the tests hold the two together. The law is the same in sampling and scoring: log softmax(logits /
temperature) in fp32, no top-k, no top-p, no dropout.

Dimensions: P prompts, M replies of a prompt, S reply tokens at most, V vocabulary, B sequences of a pass, T
targets.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import lora
from prompts import Decision
from run.files import InputError


@dataclass
class Rollout:
    """One sampled reply and everything that becomes known of it."""

    prompt_ids: list[int]
    reply_ids: list[int]  # with the first end-of-turn token, if the reply reached it
    sampled_logps: list[float]  # log pi_old of each reply token, as it was sampled
    text: str
    ended: bool
    decision: Decision | None = None  # what the strict parser reads in the text, None if it is not compliant
    rewards: dict[str, float] = field(default_factory=dict)  # by term, with A^S and A^G
    advantage: float = 0.0  # A_i
    weight: float = 0.0  # of each of its tokens in J


@dataclass
class Row:
    """A prompt and its replies, scored together. prompts: its index (fast/engine.py: the indices of several
    prompts that share tokens)."""

    prompts: list[int]
    ids: list[int]
    replies: list[list[int]]

    @property
    def targets(self) -> list[int]:
        return [token for reply in self.replies for token in reply]

    @property
    def longest(self) -> int:
        return len(self.ids) + max(map(len, self.replies), default=0)


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token of each law and its log-probability, both (B,): the inverse of the law's distribution function
    at a uniform number. Temperature 0 takes the likeliest token."""
    law_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    cdf_BV = law_BV.exp().cumsum(-1)
    token_B = (cdf_BV <= uniforms_B[:, None] * cdf_BV[:, -1:]).sum(-1)
    if temperature == 0:
        token_B = law_BV.argmax(-1)
    return token_B, law_BV.gather(-1, token_B[:, None])[:, 0]


class Policy:
    """A model, its tokenizer and the two things done with them: sampling and scoring."""

    layer = lora.LoRALinear  # what wraps the model's layers when an adapter is put on

    def __init__(self, model, tokenizer, name: str, end_ids: tuple[int, ...]):
        """end_ids: the tokens that end a reply; training teaches the first of them."""
        self.model, self.tokenizer, self.name, self.end_ids = model, tokenizer, name, end_ids
        self.device = next(model.parameters()).device
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        model.eval()  # no dropout anywhere: what is sampled is what is scored

    def encode_prompt(self, chat: list[dict]) -> list[int]:
        """The tokens of a prompt, up to where the reply begins."""
        template = self.tokenizer.apply_chat_template
        return template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)

    def encode_reply(self, text: str) -> list[int]:
        """The tokens of a reply with the end-of-turn token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_ids[0]]

    def check_length(self, prompt_tokens: int, reply_tokens: int) -> None:
        if prompt_tokens + reply_tokens > self.context:
            needed = f"a prompt of {prompt_tokens} tokens and {reply_tokens} reply tokens do not fit into"
            advice = "take fewer agents or rounds, or a smaller --max-new-tokens"
            raise InputError(f"{needed} the {self.context} tokens of {self.name}; {advice}")

    def new_history(self):
        """A store for `sample`; this engine keeps none."""
        return None

    # sampling

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        M: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        history=None,
        only: list[int] | None = None,
    ) -> list[list[Rollout]]:
        """M replies to each of P prompts, [P][M]. Temperature 0 is greedy.

        Every token of every reply is drawn with a uniform number of its own, so a sample does not depend on
        how prompts are batched. generator: a list has one for each prompt. only:
        answer these prompts alone, with the samples that they would get among all. history (M = 1): a fast
        engine's store of what earlier calls have read of the same conversations."""
        if isinstance(generator, list):
            uniforms_PMS = torch.stack([torch.rand(M, max_new_tokens, generator=g) for g in generator])
        else:
            uniforms_PMS = torch.rand(len(prompts), M, max_new_tokens, generator=generator)
        if only is not None:
            prompts, uniforms_PMS = [prompts[i] for i in only], uniforms_PMS[only]
        self.check_length(max(map(len, prompts), default=0), max_new_tokens)
        return self._sample(prompts, uniforms_PMS, temperature, history) if prompts else []

    def _sample(self, prompts, uniforms_PMS: Tensor, temperature: float, history) -> list[list[Rollout]]:
        return [self._group(ids, uniforms_MS, temperature) for ids, uniforms_MS in zip(prompts, uniforms_PMS)]

    def _group(self, prompt: list[int], uniforms_MS: Tensor, temperature: float) -> list[Rollout]:
        """The replies to one prompt, token by token; one that has ended goes on unread until all have."""
        M, cache = len(uniforms_MS), None
        ids, replies = torch.tensor([prompt] * M, device=self.device), [[] for _ in range(M)]
        for uniforms_M in uniforms_MS.T:
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_M, logp_M = draw(out.logits[:, -1], uniforms_M.to(self.device), temperature)
            ids, cache = token_M[:, None], out.past_key_values
            for reply, token, logp in zip(replies, token_M.tolist(), logp_M.tolist()):
                if not reply or reply[-1][0] not in self.end_ids:
                    reply.append((token, logp))
            if all(reply[-1][0] in self.end_ids for reply in replies):
                break
        return [self._rollout(prompt, *map(list, zip(*reply))) for reply in replies]

    def _rollout(self, prompt_ids: list[int], reply_ids: list[int], logps: list[float]) -> Rollout:
        ended = reply_ids[-1] in self.end_ids
        text = self.tokenizer.decode(reply_ids[:-1] if ended else reply_ids, skip_special_tokens=False)
        return Rollout(prompt_ids, reply_ids, logps, text, ended)

    # scoring

    def pack(self, prompts: list[list[int]], replies: list[list[list[int]]]) -> list[Row]:
        """What `token_logps` reads: rows of prompts and the replies to each, to be cut into passes."""
        return [Row([i], ids, replies[i]) for i, ids in enumerate(prompts)]

    def token_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi of the targets of each row, [R] of (T,), with gradients: one padded batch, one pass."""
        sequences = [(row.ids, reply) for row in rows for reply in row.replies]
        ids_BL = pad_sequence([torch.tensor(p + r) for p, r in sequences], batch_first=True)
        self.check_length(ids_BL.shape[1], 0)
        # Padding stands behind every reply, where causal attention hides it from what is scored.
        hidden = self.model.get_decoder()(ids_BL.to(self.device), use_cache=False).last_hidden_state
        sources = [hidden[b, len(p) - 1 : len(p) + len(r) - 1] for b, (p, r) in enumerate(sequences)]
        logits_TV = self.model.get_output_embeddings()(torch.cat(sources)).float() / temperature
        targets = torch.tensor([token for row in rows for token in row.targets], device=self.device)
        logps = logits_TV.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return list(logps.split([len(row.targets) for row in rows]))

    @torch.no_grad()
    def reference_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi_ref of the targets: the same rows with the adapter off."""
        with lora.adapter_off(self.model):
            return self.token_logps(rows, temperature)

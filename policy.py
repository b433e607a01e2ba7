"""The policy pi_theta: a causal language model that answers prompts, and scores answers.

The m replies to one prompt share that prompt, and so does the work:
- `sample` reads each prompt once and keeps its keys and values once for all m replies. Each reply has a small store
  of its own. One softmax runs over both (`SharedKV.attend`).
- `token_logps` scores rows: a row holds a prompt once, followed by its m replies. Each reply's positions restart at
  the end of the prompt, and a mask keeps replies from seeing each other. The vocabulary is only visited at reply tokens.

Both hook into any Hugging Face decoder through transformers' AttentionInterface; the model's own code is untouched.
The law is the same in both: log softmax(logits / temperature) in fp32, no top-k, no top-p, no dropout.

Dimensions: P prompts, M replies of a prompt, B = P * M, T reply tokens, R rows, L tokens of a row, D head size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import lora
import pretrained
from runs import InputError

# ---------------------------------------------------------------------------------------------------------------------
# attention with a shared prefix


class SharedKV:
    """Keys and values of B = P * M replies in decoding: those of each prompt once, those of each reply apart."""

    def __init__(self, prompt_lengths: list[int], M: int, max_new_tokens: int, device):
        self.P, self.M, self.S = len(prompt_lengths), M, max_new_tokens
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (P, kv heads, longest prompt, D)
        self.suffix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (B, kv heads, S, D)
        padding_PL = torch.arange(max(prompt_lengths))[None] >= torch.tensor(prompt_lengths)[:, None]
        self.prefix_bias = torch.zeros(padding_PL.shape).masked_fill(padding_PL, -torch.inf)[:, None, None].to(device)
        self.length = 0  # reply tokens stored so far

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token per reply: query (B, heads, 1, D), key and value (B, kv heads, 1, D) -> (B, 1, heads, D)."""
        P, M, t = self.P, self.M, self.length + 1
        B, heads, _, D = query.shape
        kv_heads = key.shape[1]
        shared = heads // kv_heads  # query heads that share a kv head
        if layer not in self.suffix:
            self.suffix[layer] = tuple(kv.new_empty(B, kv_heads, self.S, D) for kv in (key, value))
        suffix_k, suffix_v = self.suffix[layer]
        suffix_k[:, :, t - 1] = key[:, :, 0]
        suffix_v[:, :, t - 1] = value[:, :, 0]
        prefix_k, prefix_v = self.prefix[layer]

        def by_prompt(x):  # (B, kv heads, shared, n) -> (P, kv heads, M * shared, n)
            return x.view(P, M, kv_heads, shared, -1).transpose(1, 2).reshape(P, kv_heads, M * shared, -1)

        def by_reply(x):  # and back
            return x.view(P, kv_heads, M, shared, -1).transpose(1, 2).reshape(B, kv_heads, shared, -1)

        q = query.view(B, kv_heads, shared, D) * scaling
        scores_prefix = by_prompt(q) @ prefix_k.transpose(2, 3) + self.prefix_bias
        scores_suffix = by_prompt(q @ suffix_k[:, :, :t].transpose(2, 3))
        weights = torch.cat([scores_prefix, scores_suffix], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        on_prefix, on_suffix = weights.split([prefix_k.shape[2], t], -1)
        out = by_reply(on_prefix @ prefix_v) + by_reply(on_suffix) @ suffix_v[:, :, :t]
        return out.reshape(B, 1, heads, D)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, shared_kv=None, **kwargs):
    """What the model's attention layers call. Without `shared_kv` it is plain scaled dot product attention."""
    if shared_kv is None or module.layer_idx not in shared_kv.prefix:
        if shared_kv is not None:  # the prompts: keep their keys and values
            shared_kv.prefix[module.layer_idx] = (key, value)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_kv.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prefix", _attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


# ---------------------------------------------------------------------------------------------------------------------
# rollouts and rows


@dataclass
class Rollout:
    """One sampled reply and everything that becomes known of it."""

    prompt_ids: list[int]
    reply_ids: list[int]  # with the first end-of-turn token, if the reply reached it
    sampled_logps: list[float]  # log pi_old of each reply token, as it was sampled
    text: str
    ended: bool
    rewards: dict[str, float] = field(default_factory=dict)  # by term
    advantage: float = 0.0


@dataclass
class Row:
    """Tokens that one forward pass reads together, and the reply tokens in it that are scored.

    ids (L,); positions (L,): position ids; segments (L,): 0 for tokens that everybody later sees, k > 0 for tokens
    that only segment k sees; sources (T,): index into the row of the token whose output predicts each target;
    targets (T,): reply tokens. Recorded positions, never token values, say what is a reply: the end-of-turn token may
    be the padding token too.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int]
    targets: list[int]


def group_row(prompt_ids: list[int], replies: list[list[int]]) -> Row:
    """A prompt once, followed by its replies side by side (each without its last token, which predicts nothing)."""
    end = len(prompt_ids)
    row = Row([], [], [], [], [])
    _extend(row, prompt_ids, 0, 0)
    for k, reply in enumerate(replies, 1):
        start = len(row.ids)
        row.sources += [end - 1, *range(start, start + len(reply) - 1)]  # its first token follows the prompt itself
        row.targets += reply
        _extend(row, reply[:-1], end, k)
    return row


def conversation_rows(turns: list[tuple[list[int], list[int], list[int] | None]]) -> list[Row]:
    """The decisions of one conversation, in as few rows as possible (one, unless the chat template rewrites history).

    A turn is (prompt ids, ids of the reply that was played, ids of the label to score or None). Where the label is not
    what was played it becomes a branch: a segment of its own beside the reply, which the later turns don't see.
    """
    rows, line = [], None  # line: the tokens of segment 0 of the row in hand
    for k, (prompt_ids, played_ids, label_ids) in enumerate(turns, 1):
        if line is None or prompt_ids[: len(line)] != line:
            rows.append(Row([], [], [], [], []))
            line = []
        row = rows[-1]
        _extend(row, prompt_ids[len(line) :], len(line), 0)
        end = len(prompt_ids)
        if label_ids is not None:
            start = len(row.ids)
            row.sources += range(start - 1, start + len(label_ids) - 1)
            row.targets += label_ids
            if label_ids != played_ids:
                _extend(row, label_ids, end, k)
        _extend(row, played_ids, end, 0)
        line = [*prompt_ids, *played_ids]
    return [row for row in rows if row.targets]


def _extend(row: Row, ids: list[int], position: int, segment: int) -> None:
    row.ids += ids
    row.positions += range(position, position + len(ids))
    row.segments += [segment] * len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# the policy


class Policy:
    """A model, its tokenizer and the two things done with them: sampling and scoring."""

    def __init__(self, model, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.device = next(model.parameters()).device
        self.end_ids = pretrained.end_token_ids(model, tokenizer)
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        model.set_attn_implementation("shared_prefix")
        model.eval()  # no dropout anywhere: what is sampled is what is scored

    # text and tokens

    def encode_prompt(self, chat: list[dict]) -> list[int]:
        """The tokens of a prompt, up to where the reply begins."""
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)

    def encode_reply(self, text: str) -> list[int]:
        """The tokens of a reply with the end-of-turn token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_ids[0]]

    def check_length(self, prompt_tokens: int, reply_tokens: int) -> None:
        if prompt_tokens + reply_tokens > self.context:
            raise InputError(
                f"a prompt of {prompt_tokens} tokens and {reply_tokens} reply tokens do not fit into the "
                f"{self.context} tokens of {self.name}; take fewer agents or rounds, or a smaller --max-new-tokens"
            )

    # sampling

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        M: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[list[Rollout]]:
        """M replies to each of P prompts, [P][M]. Temperature 0 is greedy.

        Token t of a reply is the inverse of the law's distribution function at a uniform number that belongs to that
        reply and that t alone, so a sample does not depend on what else is in the batch.
        """
        P, B = len(prompts), len(prompts) * M
        lengths = [len(p) for p in prompts]
        self.check_length(max(lengths), max_new_tokens)
        uniforms_BT = torch.rand(P * M, max_new_tokens, generator=generator).to(self.device)
        kv = SharedKV(lengths, M, max_new_tokens, self.device)

        ids_PL = torch.zeros(P, max(lengths), dtype=torch.long)
        for i, prompt in enumerate(prompts):  # padding on the right: causal attention never looks at it
            ids_PL[i, : lengths[i]] = torch.tensor(prompt)
        hidden = self._decoder()(ids_PL.to(self.device), use_cache=False, shared_kv=kv).last_hidden_state
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = hidden[torch.arange(P, device=self.device), last].repeat_interleave(M, 0)
        first_position_B = torch.tensor(lengths, device=self.device).repeat_interleave(M)

        ends = torch.tensor(self.end_ids, device=self.device)
        ended_B = torch.zeros(B, dtype=torch.bool, device=self.device)
        tokens, logps = [], []
        while True:
            logp_BV = self._log_law(hidden, temperature or 1.0)
            if temperature == 0:
                token_B = logp_BV.argmax(-1)
            else:
                cdf_BV = logp_BV.exp().cumsum(-1)
                threshold_B1 = uniforms_BT[:, len(tokens), None] * cdf_BV[:, -1:]
                token_B = torch.searchsorted(cdf_BV, threshold_B1, right=True)[:, 0].clamp(max=cdf_BV.shape[1] - 1)
            tokens.append(token_B)
            logps.append(logp_BV.gather(1, token_B[:, None])[:, 0])
            ended_B |= torch.isin(token_B, ends)
            if len(tokens) == max_new_tokens or ended_B.all():
                break
            hidden = self._decoder()(
                token_B[:, None],
                position_ids=(first_position_B + kv.length)[:, None],
                use_cache=False,
                shared_kv=kv,
            ).last_hidden_state[:, 0]
            kv.length += 1
        tokens_BT, logps_BT = torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist()
        rollouts = [self._rollout(prompts[b // M], tokens_BT[b], logps_BT[b]) for b in range(B)]
        return [rollouts[i * M : (i + 1) * M] for i in range(P)]

    def _rollout(self, prompt_ids: list[int], tokens: list[int], logps: list[float]) -> Rollout:
        end = next((t for t, token in enumerate(tokens) if token in self.end_ids), None)
        reply = tokens if end is None else tokens[: end + 1]
        text = self.tokenizer.decode(reply if end is None else reply[:-1], skip_special_tokens=False)
        return Rollout(prompt_ids, reply, logps[: len(reply)], text, end is not None)

    # scoring

    def token_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi of the targets of each row, [R] of (T,), with gradients. One forward pass reads all rows."""
        R, L = len(rows), max(len(row.ids) for row in rows)
        self.check_length(max(max(row.positions) for row in rows) + 1, 0)
        ids_RL = torch.zeros(R, L, dtype=torch.long)
        positions_RL = torch.zeros(R, L, dtype=torch.long)
        segments_RL = torch.full((R, L), -1)  # padding is a segment that nobody else sees
        for r, row in enumerate(rows):
            n = len(row.ids)
            ids_RL[r, :n] = torch.tensor(row.ids)
            positions_RL[r, :n] = torch.tensor(row.positions)
            segments_RL[r, :n] = torch.tensor(row.segments)
        visible_RLL = (segments_RL[:, None] == 0) | (segments_RL[:, None] == segments_RL[:, :, None])
        visible_RLL &= torch.ones(L, L, dtype=torch.bool).tril()
        hidden_RLH = self._decoder()(
            ids_RL.to(self.device),
            attention_mask=visible_RLL[:, None].to(self.device),
            position_ids=positions_RL.to(self.device),
            use_cache=False,
        ).last_hidden_state
        flat = [r * L + s for r, row in enumerate(rows) for s in row.sources]
        hidden = hidden_RLH.flatten(0, 1)[torch.tensor(flat, device=self.device)]
        targets = torch.tensor([t for row in rows for t in row.targets], device=self.device)
        logps = -F.cross_entropy(self._logits(hidden, temperature), targets, reduction="none")
        return list(logps.split([len(row.targets) for row in rows]))

    @torch.no_grad()
    def reference_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi_ref of the targets: the same rows with the adapter off."""
        with lora.adapter_off(self.model):
            return self.token_logps(rows, temperature)

    # the model's parts

    def _decoder(self):
        return self.model.get_decoder()

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float() / temperature

    def _log_law(self, hidden: Tensor, temperature: float) -> Tensor:
        return self._logits(hidden, temperature).log_softmax(-1)


def load_policy(name: str, cache: str | None = None, dtype=torch.float32, device: str = "cpu") -> Policy:
    """The base model as a policy. Raises InputError."""
    try:
        model, tokenizer = pretrained.load(name, cache, dtype, device)
    except pretrained.ModelError as e:
        raise InputError(str(e)) from None
    return Policy(model, tokenizer, name)


def put_adapter(policy: Policy, folder: str) -> lora.LoRAConfig:
    """Puts the adapter of a folder on the policy's model. Raises InputError for one that does not fit."""
    try:
        return lora.load_adapter(policy.model, folder)
    except (OSError, ValueError) as e:
        raise InputError(" ".join(str(e).split())) from None

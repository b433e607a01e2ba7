"""The policy pi_theta: a causal language model that answers prompts, and scores answers.

Both `sample` and `token_logps` compute what prompts and replies have in common once: see shared_prefix.py. The
vocabulary is only visited at reply tokens. The law is the same in both: log softmax(logits / temperature) in fp32, no
top-k, no top-p, no dropout.

Dimensions: P prompts, M replies of a prompt, B replies that are sampled, U different ones among them, R rows,
S reply tokens, T targets, H hidden size, V vocabulary.
"""

import ctypes
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models import adapters as adapter_files
import lora
from models import pretrained
from run.files import InputError
from fast.shared_prefix import History, Pass, Row, SharedKV, chain, pack

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


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


class _TargetLogps(torch.autograd.Function):
    """log softmax(logits_of(h) / temperature) at the target of each token: (T, H), (T,) -> (T,).

    Never holds the logits of more than `CHUNK` tokens: each value depends on its own h alone, so its gradient with
    respect to h, one vector of size H, is computed beside it and kept instead. The head, of weight W, is frozen.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, W, temperature, with_gradient):
        values, gradients = [], []
        for h, y in zip(hidden.split(_TargetLogps.CHUNK), targets.split(_TargetLogps.CHUNK)):
            logps = scaled(logits_of(h), temperature).log_softmax(-1)
            values.append(logps.gather(-1, y[:, None])[:, 0])
            if with_gradient:  # (onehot(y) - pi) W / temperature; the difference in fp32, in bf16 it would cancel
                error = logps.exp_()
                error[torch.arange(len(y), device=y.device), y] -= 1
                gradients.append(error.to(h.dtype) @ W / -temperature)
        if with_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None, None, None


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """The law's logits in fp32."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def target_logps(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy(scaled(logits, temperature), targets, reduction="none")


def _draw(logits_UV: Tensor, state_of: list[int], uniforms_B: Tensor | None) -> tuple[list[int], list[float]]:
    """A token for each of B replies, from the law of its state, and its log-probability. Without uniforms: the likeliest.

    A uniform number u draws the first token at which the law's distribution function is above u.
    """
    top_U1 = logits_UV.amax(-1, keepdim=True)
    weight_UV = (logits_UV - top_U1).exp_()
    total_U = weight_UV.sum(-1)
    state_B = torch.tensor(state_of, device=logits_UV.device)
    if uniforms_B is None:
        token_B = logits_UV.argmax(-1)[state_B]
    else:  # the draws of a state stand in its row, so that no distribution function is copied
        rank = [state_of[:b].count(u) for b, u in enumerate(state_of)]
        rank_B = torch.tensor(rank, device=logits_UV.device)
        cdf_UV = weight_UV.cumsum_(-1)
        threshold_UK = logits_UV.new_zeros(len(logits_UV), max(rank) + 1)
        threshold_UK[state_B, rank_B] = uniforms_B.to(logits_UV.device) * cdf_UV[state_B, -1]
        token_B = torch.searchsorted(cdf_UV, threshold_UK, right=True)[state_B, rank_B].clamp(max=logits_UV.shape[1] - 1)
    logp_B = logits_UV[state_B, token_B] - (top_U1[:, 0] + total_U.log())[state_B]
    return token_B.tolist(), logp_B.tolist()


class Policy:
    """A model, its tokenizer and the two things done with them: sampling and scoring."""

    def __init__(self, model, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.device = next(model.parameters()).device
        self.end_ids = pretrained.end_token_ids(model, tokenizer)
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            self.context = min(self.context, model.config.sliding_window)  # within it, it is full attention
        self._float_head, self._float_head_of = None, None  # the head's weight in fp32, and what it was made of
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

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        M: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        history: History | None = None,
        only: list[int] | None = None,
    ) -> list[list[Rollout]]:
        """M replies to each of P prompts, [P][M]. Temperature 0 is greedy.

        Token t of a reply is the inverse of the law's distribution function at a uniform number that belongs to that
        reply and that t alone, so a sample does not depend on what else is in the batch. Replies to one prompt that
        have said the same so far are computed as one, and a reply that has ended costs nothing more.
        generator: a list has one for each prompt, and its sample does not even depend on its place in the batch.
        history (M = 1): what earlier calls have read of these conversations is not read again; it is brought up to date.
        only: answer these prompts alone, with the samples that they would get among all.
        """
        assert history is None or M == 1
        if isinstance(generator, list):
            uniforms_PMS = torch.stack([torch.rand(M, max_new_tokens, generator=g) for g in generator])
        else:
            uniforms_PMS = torch.rand(len(prompts), M, max_new_tokens, generator=generator)
        if only is not None:
            prompts, uniforms_PMS = [prompts[i] for i in only], uniforms_PMS[only]
        if not prompts:
            return []
        P, device = len(prompts), self.device
        self.check_length(max(map(len, prompts)), max_new_tokens)
        rows = pack(prompts, [[]] * P) if history is None else [chain(ids, [i]) for i, ids in enumerate(prompts)]
        tokens = Pass(rows, device, self.model.dtype, history)
        queue = [i for row in rows for i in row.prompts]  # reply b of all B is one to prompt queue[b // M]
        of_rows = [(r, len(prompts[i])) for r, row in enumerate(rows) for i in row.prompts]
        kv = SharedKV(tokens, of_rows, max_new_tokens, history is not None)
        uniforms_BS = uniforms_PMS[queue].flatten(0, 1)
        last = torch.tensor([tokens.index(r, [n - 1])[0] for r, n in of_rows], device=device)
        replies: list[list[int]] = [[] for _ in range(P * M)]
        logps: list[list[float]] = [[] for _ in replies]
        going = list(range(P * M))  # the replies that have not ended
        state_of = [b // M for b in going]  # which of the computed states each of them is in
        hidden_UH = self._hidden(tokens.ids, tokens.positions, kv)[0, last]
        while True:
            logits_UV = scaled(self._logits(hidden_UH), temperature or 1.0)
            drawn, logp_B = _draw(logits_UV, state_of, uniforms_BS[going, kv.length] if temperature else None)
            for b, token, logp in zip(going, drawn, logp_B):
                replies[b].append(token)
                logps[b].append(logp)
            on = [n for n, token in enumerate(drawn) if token not in self.end_ids]
            if kv.length + 1 == max_new_tokens or not on:
                break
            number: dict[tuple[int, int], int] = {}  # the same state and token: the same next state
            next_of = [number.setdefault((state_of[n], drawn[n]), len(number)) for n in on]
            going, state_of = [going[n] for n in on], next_of
            origins, tokens_U = zip(*number)
            kv.go_on(list(origins))
            positions = [len(prompts[queue[i]]) + kv.length for i in kv.prompt_of[: kv.U]]
            ids_U1, positions_U1 = (torch.tensor(x, device=device)[:, None] for x in (tokens_U, positions))
            hidden_UH = self._hidden(ids_U1, positions_U1, kv)[:, 0]
            kv.length += 1
        if history is not None:
            kv.keep(history, [prompt + reply for prompt, reply in zip(prompts, replies)])
        groups: list[list[Rollout]] = [[] for _ in prompts]
        for b, (reply, logp) in enumerate(zip(replies, logps)):
            i = queue[b // M]
            groups[i].append(self._rollout(prompts[i], reply, logp))
        return groups

    def _rollout(self, prompt_ids: list[int], reply_ids: list[int], logps: list[float]) -> Rollout:
        ended = reply_ids[-1] in self.end_ids
        text = self.tokenizer.decode(reply_ids[:-1] if ended else reply_ids, skip_special_tokens=False)
        return Rollout(prompt_ids, reply_ids, logps, text, ended)

    # scoring

    def token_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi of the targets of each row, [R] of (T,), with gradients. One forward pass reads all rows."""
        tokens = Pass(rows, self.device, self.model.dtype)
        self.check_length(int(tokens.positions.max()) + 1, 0)
        sources = [source for r, row in enumerate(rows) for source in tokens.index(r, row.sources)]
        targets = [target for row in rows for target in row.targets]
        once = dict.fromkeys(zip(sources, targets))  # replies that begin alike are scored alike there
        number = {pair: i for i, pair in enumerate(once)}
        which_T = torch.tensor([number[pair] for pair in zip(sources, targets)], device=self.device)
        sources, targets = torch.tensor(list(once), device=self.device).T
        hidden = self._hidden(tokens.ids, tokens.positions, tokens)[0].index_select(0, sources)
        head = self._head()
        if type(head) is not torch.nn.Linear:  # an adapter on the head itself
            logps = target_logps(head(hidden), targets, temperature)
        else:
            logps = _TargetLogps.apply(hidden, targets, self._logits, head.weight, temperature, torch.is_grad_enabled())
        return list(logps[which_T].split([len(row.targets) for row in rows]))

    @torch.no_grad()
    def reference_logps(self, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
        """log pi_ref of the targets: the same rows with the adapter off."""
        with lora.adapter_off(self.model):
            return self.token_logps(rows, temperature)

    # the model's parts

    def _hidden(self, ids: Tensor, positions: Tensor, tokens: Pass | SharedKV) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(ids, position_ids=positions, use_cache=False, tokens=tokens).last_hidden_state

    def _head(self):
        return self.model.get_output_embeddings()

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V). From a plain head in fp32 whatever the model's dtype: bf16 would round a logit of 20 by up to
        0.06, which is more than all that rounding does to the hidden states."""
        head = self._head()
        if type(head) is not torch.nn.Linear:  # an adapter
            return head(hidden)
        version = head.weight.data_ptr(), head.weight._version
        if self._float_head_of != version:
            with torch.inference_mode(False):
                self._float_head, self._float_head_of = head.weight.detach().float(), version
        bias = None if head.bias is None else head.bias.float()
        return lora.linear(hidden.float(), self._float_head, bias).contiguous()


def prepare_cpu() -> None:
    """The process's settings that make CPUs faster and change no result by more than fp32's own rounding."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc. Freed activations stay with the process: else the kernel takes them back
        libc.mallopt(M_MMAP_MAX, 0)  # and hands them out again page by page, at every step
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    # On AMD's CPUs MKL leaves AVX-512 alone, and oneDNN has twice its speed in fp32. But torch asks oneDNN only where it
    # may round to bf16 inside; whether it then does (with AMX) shows in a product.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f"):
        settings, a = torch.backends.mkldnn.matmul, torch.arange(2.0**16).sin().view(256, 256)
        settings.fp32_precision = "bf16"
        if (a @ a - (a.double() @ a.double())).abs().max() > 1e-3:  # of sums up to 1.1; bf16 would be off by 0.06
            settings.fp32_precision = "ieee"


def load_policy(name: str, cache: str | None = None, dtype=torch.float32, device: str = "cpu") -> Policy:
    """The base model as a policy. Raises InputError."""
    if torch.device(device).type == "cpu":
        prepare_cpu()
    try:
        model, tokenizer = pretrained.load(name, cache, dtype, device)
    except pretrained.ModelError as e:
        raise InputError(str(e)) from None
    return Policy(model, tokenizer, name)


def put_adapter(policy: Policy, folder: str) -> lora.LoRAConfig:
    """Puts the adapter of a folder on the policy's model. Raises InputError for one that does not fit."""
    try:
        return adapter_files.load_adapter(policy.model, folder)
    except (OSError, ValueError) as e:
        raise InputError(" ".join(str(e).split())) from None

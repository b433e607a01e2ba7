"""The policy as policy.py defines it, sooner: the same draws and log-probabilities behind the same methods.

Both sampling and scoring compute what prompts and replies have in common once: see shared_prefix.py. The
vocabulary is only visited at reply tokens, and its gradient is taken in closed form.

Dimensions: P prompts, M replies of a prompt, B replies that are sampled, U different ones among them, R rows,
S reply tokens, T targets, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.lora_products import JointLoRALinear, linear
from fast.shared_prefix import History, Pass, Row, SharedKV, chain, pack
from policy import Policy, Rollout


class _TargetLogps(torch.autograd.Function):
    """log softmax(logits_of(h) / temperature) at the target of each token: (T, H), (T,) -> (T,).

    Never holds the logits of more than `CHUNK` tokens: each value depends on its own h alone, so its gradient
    with respect to h, one vector of size H, is computed beside it and kept instead. The head, of weight W, is
    frozen."""

    CHUNK = 256

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, W, temperature, with_gradient):
        values, gradients = [], []
        for h, y in zip(hidden.split(_TargetLogps.CHUNK), targets.split(_TargetLogps.CHUNK)):
            logps = scaled(logits_of(h), temperature).log_softmax(-1)
            values.append(logps.gather(-1, y[:, None])[:, 0])
            # (onehot(y) - pi) W / temperature; the difference in fp32, in bf16 it would cancel
            if with_gradient:
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
    """A token for each of B replies, from the law of its state, and its log-probability. Without uniforms:
    the likeliest.

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
        token_B = torch.searchsorted(cdf_UV, threshold_UK, right=True)[state_B, rank_B].clamp(
            max=logits_UV.shape[1] - 1
        )
    logp_B = logits_UV[state_B, token_B] - (top_U1[:, 0] + total_U.log())[state_B]
    return token_B.tolist(), logp_B.tolist()


class FastPolicy(Policy):
    """A Policy whose rows are trees of tokens. Models with a sliding window are read within it only."""

    layer = JointLoRALinear

    def __init__(self, model, tokenizer, name: str, end_ids: tuple[int, ...]):
        super().__init__(model, tokenizer, name, end_ids)
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            self.context = min(self.context, model.config.sliding_window)  # within it, it is full attention
        # the head's weight in fp32, and what it was made of
        self._float_head, self._float_head_of = None, None
        model.set_attn_implementation("shared_prefix")

    def new_history(self) -> History:
        return History()

    # sampling

    def _sample(self, prompts, uniforms_PMS: Tensor, temperature: float, history: History | None):
        """Replies to one prompt that have said the same so far are computed as one, and a reply that has
        ended costs nothing more. history (M = 1): what earlier calls have read is not read again; it is
        brought up to date."""
        (P, M, max_new_tokens), device = uniforms_PMS.shape, self.device
        assert history is None or M == 1
        rows = (
            pack(prompts, [[]] * P) if history is None else [chain(ids, [i]) for i, ids in enumerate(prompts)]
        )
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

    # scoring

    def pack(self, prompts: list[list[int]], replies: list[list[list[int]]]) -> list[Row]:
        return pack(prompts, replies)

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
            logps = _TargetLogps.apply(
                hidden, targets, self._logits, head.weight, temperature, torch.is_grad_enabled()
            )
        return list(logps[which_T].split([len(row.targets) for row in rows]))

    # the model's parts

    def _hidden(self, ids: Tensor, positions: Tensor, tokens: Pass | SharedKV) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(ids, position_ids=positions, use_cache=False, tokens=tokens).last_hidden_state

    def _head(self):
        return self.model.get_output_embeddings()

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V). From a plain head in fp32 whatever the model's dtype: bf16 would round a logit of
        20 by up to 0.06, which is more than all that rounding does to the hidden states."""
        head = self._head()
        if type(head) is not torch.nn.Linear:  # an adapter
            return head(hidden).contiguous()
        version = head.weight.data_ptr(), head.weight._version
        if self._float_head_of != version:
            with torch.inference_mode(False):
                self._float_head, self._float_head_of = head.weight.detach().float(), version
        bias = None if head.bias is None else head.bias.float()
        return linear(hidden.float(), self._float_head, bias).contiguous()

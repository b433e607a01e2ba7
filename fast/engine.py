"""The same sampling and scoring as in policy.py, behind the same methods, but faster.

Both compute what prompts and replies have in common only once (shared_prefix.py). Sampling reads drafts of
replies in one pass instead of a pass for every token (drafts.py). Logits are computed only where reply tokens
are predicted, and their gradient in closed form.

Dimensions: P prompts, M replies of a prompt, S the longest reply, B draws, U states (nodes of the trees) that
they are from, R rows, T targets, H hidden size, V vocabulary.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from fast.drafts import Drafts
from fast.lora_products import JointLoRALinear, linear
from fast.shared_prefix import Pass, Row, Store, pack
from policy import Policy
from prompts import Reply

CHUNK = 256  # the most tokens whose logits are held at the same time


class _TargetLogps(torch.autograd.Function):
    """log softmax(logits_of(h) / temperature) at the target of each token: (T, H), (T,) -> (T,).

    Each value depends on its own h alone, so its gradient with respect to h is a single vector of size H,
    which is computed in the forward pass and stored instead of the logits. The head, of weight W, is frozen.
    scale, cap: see after_head."""

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, W, temperature, scale=1.0, cap=torch.inf):
        values, gradients = [], []
        for h, y in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = logits_of(h)
            logps = scaled(logits, temperature).log_softmax(-1)
            values.append(logps.gather(-1, y[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                # (onehot(y) - pi) W / temperature. The difference is taken in fp32, as bf16 would cancel it.
                error = logps.exp_()
                error[torch.arange(len(y), device=y.device), y] -= 1
                if cap < torch.inf:
                    error *= 1 - (logits / cap) ** 2  # the derivative of tanh
                gradients.append(error.to(h.dtype) @ W / (-temperature / scale))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), *[None] * 6


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits divided by the temperature, in fp32."""
    return logits.float() if temperature == 1 else logits.float() / temperature


@torch.no_grad()
def after_head(model) -> tuple[float, float]:
    """What a model makes of the logits z of its head: cap tanh(scale z / cap), or scale z where cap is inf.
    Both are measured: its own forward pass, without the decoder, is shown a small and a large z. Most models
    have (1, inf)."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    z_11V = torch.zeros(1, 1, head.weight.shape[0], device=model.device)
    z_11V[..., :2] = torch.tensor([2.0**-20, 2.0**20])
    out = MoeModelOutputWithPast(
        torch.zeros(1, 1, head.weight.shape[1], dtype=model.dtype, device=ids.device)
    )
    out.cross_attentions = None  # what the outputs of some decoders have besides
    hook = head.register_forward_hook(lambda *_: z_11V)
    decoder.forward = lambda *_, **__: out
    try:
        small, large = model(ids, use_cache=False).logits[0, -1, :2].tolist()
    finally:
        hook.remove()
        del decoder.forward
    scale = small * 2**20
    return scale, torch.inf if large == scale * 2**20 else large


def _draw(logits_UV: Tensor, state_of: list[int], uniforms_B: Tensor | None) -> tuple[list[int], list[float]]:
    """B tokens, each drawn from the distribution of its state, and their log-probabilities. state_of: rising.
    Without uniform numbers it is the likeliest token.

    As in policy.draw, it is the token at which the cumulative distribution exceeds the uniform number."""
    top_U1 = logits_UV.amax(-1, keepdim=True)
    weight_UV = (logits_UV - top_U1).exp_()
    total_U = weight_UV.sum(-1)
    state_B = torch.tensor(state_of, device=logits_UV.device)
    if uniforms_B is None:
        token_B = logits_UV.argmax(-1)[state_B]
    else:  # all draws from a state are looked up in its row at once, so no distribution is copied
        rank_B = torch.arange(len(state_B), device=state_B.device) - torch.searchsorted(state_B, state_B)
        cdf_UV = weight_UV.cumsum_(-1)
        threshold_UK = logits_UV.new_zeros(len(logits_UV), int(rank_B.max()) + 1)
        threshold_UK[state_B, rank_B] = uniforms_B.to(logits_UV.device) * cdf_UV[state_B, -1]
        token_UK = torch.searchsorted(cdf_UV, threshold_UK, right=True)
        token_B = token_UK[state_B, rank_B].clamp(max=logits_UV.shape[1] - 1)
    logp_B = logits_UV[state_B, token_B] - (top_U1[:, 0] + total_U.log())[state_B]
    return token_B.tolist(), logp_B.tolist()


class FastPolicy(Policy):
    """A Policy that computes trees of tokens. A model with a sliding window is used within the window only,
    where its attention is the same as full attention."""

    layer = JointLoRALinear

    def __init__(self, model, *parts):
        """As that of Policy."""
        super().__init__(model, *parts)
        if self.reach.window < self.reach.context:
            advice = f"that is its attention window, and --engine plain reads on; {self.reach.advice}"
            self.reach = self.reach._replace(context=self.reach.window, advice=advice)
        self.scale, self.cap = after_head(model)
        self._float_head, self._float_head_version = None, None  # the head's weight in fp32, see _logits
        model.set_attn_implementation("shared_prefix")

    # sampling

    def session(self) -> "_Session":
        """Samples one reply (M = 1) to each of the same conversations in every call. Tokens that an earlier
        call has read are not computed again."""
        return _Session(self)

    def _sample(
        self, prompts, uniforms_PMS, temperature, guesses, session: "_Session | None" = None
    ) -> list[list[Reply]]:
        """Pass by pass: the tokens that replies have come to are read, with drafts of what may follow, and
        each reply is drawn along what was read. Replies to one prompt that have been the same so far are one
        node of its tree, which is computed once."""
        P, M, S = uniforms_PMS.shape
        rows, ends = session.go_on(prompts) if session else _roots(prompts)
        store, drafts = session.store if session else Store(), Drafts(guesses)
        uniforms_BS = uniforms_PMS.flatten(0, 1)
        replies: list[list[int]] = [[] for _ in range(P * M)]
        logps: list[list[float]] = [[] for _ in replies]
        # Of each reply that has not ended, the (row, node) of its last token; at first, of its prompt's.
        at = {b: ends[b // M] for b in range(P * M)}
        while at:
            # 1. What is read: where the replies are, each place once, and below it a draft. visits: of each
            # node the replies that may come to it, and the number of the token that they draw there.
            paths: dict[tuple[int, int], list[int]] = {}
            visits: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
            for b, (r, node) in at.items():
                said = len(replies[b])
                if (r, node) not in paths:
                    drafted = drafts.draft(replies[b], S - said - 1, self.end_ids)
                    paths[r, node] = [node, *rows[r].add(node, drafted)]
                # Replies of different lengths meet where one prompt is the beginning of another.
                for k, visited in enumerate(paths[r, node][: S - said]):
                    visits[r, visited].append((b, said + k))
            drawn = self._draw_along(rows, store, visits, uniforms_BS, temperature)
            # 2. Each reply goes along the nodes that were read as far as they are what it draws.
            passed: set[tuple[int, int]] = set()
            for b, (r, node) in list(at.items()):
                start = len(replies[b])
                while (b, node) in drawn:
                    passed.add((r, node))
                    token, logp = drawn[b, node]
                    replies[b].append(token)
                    logps[b].append(logp)
                    before, node = node, rows[r].child.get((node, token))
                drafts.learn(replies[b], start)
                if len(replies[b]) == S or token in self.end_ids:
                    del at[b]
                else:
                    # A node that an earlier pass has read is read again: its output was not kept.
                    again = node is None or node < store.read[r]
                    at[b] = r, rows[r].append(before, token) if again else node
            drafts.count(len(visits) - len(paths), len(passed) - len(paths))
        made = [self._reply(*both) for both in zip(replies, logps, strict=True)]
        return [made[i * M : (i + 1) * M] for i in range(P)]

    def _draw_along(
        self, rows, store, visits, uniforms_BS, temperature
    ) -> dict[tuple[int, int], tuple[int, float]]:
        """Reads what is new in the rows, and draws the next token of every reply at every node that it may
        come to: (reply, node) -> (token, log pi). visits: see _sample."""
        tokens, nodes = Pass(rows, self.device, self.model.dtype, store), list(visits)
        index = torch.tensor([tokens.index(r, [node])[0] for r, node in nodes], device=self.device)
        hidden_UH = self._hidden(tokens.ids, tokens.positions, tokens)[0].index_select(0, index)
        drawn = {}
        for start in range(0, len(nodes), CHUNK):
            part = nodes[start : start + CHUNK]
            logits_UV = scaled(self._logits(hidden_UH[start : start + CHUNK]), temperature or 1.0)
            pairs = [(u, b, t) for u, place in enumerate(part) for b, t in visits[place]]
            state_of, reply, t = map(list, zip(*pairs, strict=True))
            uniforms_B = uniforms_BS[reply, t] if temperature else None
            values = zip(*_draw(logits_UV, state_of, uniforms_B), strict=True)
            drawn |= {(b, part[u][1]): value for (u, b, _), value in zip(pairs, values, strict=True)}
        return drawn

    # scoring

    def batches(self, prompts, replies, size: int) -> list[list[int]]:
        """As in Policy. `size` counts rows, and prompts that are beginnings of each other share a row."""
        rows = pack(prompts, replies)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [[i for row in part for i in row.prompts] for part in parts]

    def token_logps(self, prompts, replies, temperature: float = 1.0) -> list[Tensor]:
        """As in Policy. A reply's last token is not read, so it need not fit into the context. The rows are
        computed in the order of their first prompts."""
        rows = sorted(pack(prompts, replies), key=lambda row: row.prompts[0])
        tokens = Pass(rows, self.device, self.model.dtype)
        self.check_length(int(tokens.positions.max()) + 1, 0)
        sources = [source for r, row in enumerate(rows) for source in tokens.index(r, row.sources)]
        targets = [target for row in rows for target in row.targets]
        # Replies that begin alike have the same sources and targets there, and each such pair is scored once.
        number: dict[tuple[int, int], int] = {}
        which = [number.setdefault(pair, len(number)) for pair in zip(sources, targets, strict=True)]
        sources, targets = torch.tensor(list(number), device=self.device).T
        hidden = self._hidden(tokens.ids, tokens.positions, tokens)[0].index_select(0, sources)
        head = self.model.get_output_embeddings()
        if type(head) is torch.nn.Linear:
            how = temperature, self.scale, self.cap
            logps = _TargetLogps.apply(hidden, targets, self._logits, head.weight, *how)
        else:  # an adapter on the head itself
            logps = -F.cross_entropy(scaled(self._logits(hidden), temperature), targets, reduction="none")
        logps = logps[torch.tensor(which, device=self.device)]
        order = [(i, k) for row in rows for i in row.prompts for k in range(len(replies[i]))]
        parts = dict(zip(order, logps.split([len(replies[i][k]) for i, k in order]), strict=True))
        return [parts[i, k] for i, group in enumerate(replies) for k in range(len(group))]

    # the model's parts

    def _hidden(self, ids: Tensor, positions: Tensor, tokens: Pass) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(ids, position_ids=positions, use_cache=False, tokens=tokens).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V). The product with a plain head is taken in fp32 whatever the model's dtype: bf16
        would round a logit of 20 by up to 0.06, which is more than all the rounding of the hidden states."""
        head = self.model.get_output_embeddings()
        if type(head) is not torch.nn.Linear:  # an adapter
            logits = head(hidden)
        else:
            version = head.weight.data_ptr(), head.weight._version
            if self._float_head_version != version:
                with torch.inference_mode(False):
                    self._float_head, self._float_head_version = head.weight.detach().float(), version
            bias = None if head.bias is None else head.bias.float()
            logits = linear(hidden.float(), self._float_head, bias)
        if self.scale != 1:
            logits = logits * self.scale
        return (logits if self.cap == torch.inf else self.cap * torch.tanh(logits / self.cap)).contiguous()


def _roots(prompts: list[list[int]]) -> tuple[list[Row], list[tuple[int, int]]]:
    """The rows of some prompts, and of each prompt the (row, node) of its last token."""
    rows = pack(prompts, [[]] * len(prompts))
    row_of = {i: r for r, row in enumerate(rows) for i in row.prompts}
    return rows, [(row_of[i], len(prompt) - 1) for i, prompt in enumerate(prompts)]


class _Session:
    """See FastPolicy.session. Each conversation is a row, which grows from call to call."""

    def __init__(self, policy: FastPolicy):
        self.policy, self.rows, self.store = policy, [], Store()

    @torch.inference_mode()
    def sample(
        self, prompts, uniforms_PMS: Tensor, temperature: float = 1.0, guesses=None
    ) -> list[list[Reply]]:
        """As in Policy, with M = 1. Every call must have the same conversations in the same order. A prompt
        may differ from what was read of its conversation; it is read anew from there on."""
        assert uniforms_PMS.shape[1] == 1
        self.policy.check_length(max(map(len, prompts), default=0), uniforms_PMS.shape[2])
        return self.policy._sample(prompts, uniforms_PMS, temperature, guesses, self) if prompts else []

    def go_on(self, prompts: list[list[int]]) -> tuple[list[Row], list[tuple[int, int]]]:
        """The rows, and of each prompt the (row, node) of its last token, which is always read again: its
        output is needed."""
        self.rows = self.rows or [Row() for _ in prompts]
        ends = []
        for r, (row, prompt) in enumerate(zip(self.rows, prompts, strict=True)):
            *_, before = [-1, *row.add(-1, prompt[:-1])]
            ends.append((r, row.append(before, prompt[-1])))
        return self.rows, ends

"""Prompts and replies as trees of tokens, and attention over them: every token is computed once.

All prompts begin with the same rules, the prompt of a decision goes on from that of the decision before, the
m replies to one prompt follow it and begin alike. So they form trees:

- a `Row` is a trunk (the longest prompt) from which replies branch off; a token sees its ancestors (`pack`);
- a `Pass` packs rows for one forward pass: without padding, with the beginning that all rows have in common
  read once;
- a `SharedKV` holds the keys and values of the prompts once for all replies that are being sampled. Each
  reply has a small store of its own, and one softmax runs over both.

It hooks into any Hugging Face decoder through transformers' AttentionInterface; the model's own code is
untouched.

Dimensions: R rows, n tokens of a pass, of which C are the common beginning; a row's keys: P that it begins
with, then X = L + B own ones (trunk, branches); U states that are computed in a decoding step, at most K of a
row; S reply tokens, T targets, D head size.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fast import attention
from run.files import InputError

# -------------------- rows: prompts and replies as trees of tokens


@dataclass
class Row:
    """A tree of tokens that one forward pass reads, and the reply tokens that it scores.

    ids (n,): tokens; parents (n,): index of the token before, -1 for the first, always smaller than the own
    index; sources (T,): index of the token whose output predicts each target; targets (T,): reply tokens;
    prompts: which of the prompts it was packed from, in the order in which their replies stand in `targets`.
    Recorded indices, never token values, say what is a reply: the end-of-turn token may be the padding token
    too."""

    ids: list[int]
    parents: list[int]
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def positions(self) -> list[int]:
        depth: list[int] = []
        for parent in self.parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return depth

    @property
    def longest(self) -> int:
        """Tokens from the first to the deepest."""
        return max(self.positions()) + 1


def chain(ids: list[int], prompts: list[int]) -> Row:
    """A row without branches."""
    return Row(list(ids), list(range(-1, len(ids) - 1)), prompts=prompts)


def pack(prompts: list[list[int]], replies: list[list[list[int]]]) -> list[Row]:
    """Prompts and the replies to each (none, one or many) in as few rows as possible.

    A prompt that is the beginning of another shares its row. Where replies begin alike, with each other or
    with what stands in the trunk, they share tokens. The last token of a reply predicts nothing, so it is not
    read."""
    rows: list[Row] = []
    trunks: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        prompt = prompts[i]
        r = next((r for r, trunk in enumerate(trunks) if trunk[: len(prompt)] == prompt), None)
        if r is None:
            r = len(rows)
            rows.append(chain(prompt, []))
            trunks.append(prompt)
        rows[r].prompts.append(i)
    for row in rows:
        row.prompts.sort()
        child = {(node - 1, token): node for node, token in enumerate(row.ids)}  # (node, next token) -> node
        for i in row.prompts:
            for reply in replies[i]:
                node = len(prompts[i]) - 1
                for t, token in enumerate(reply):
                    row.sources.append(node)
                    row.targets.append(token)
                    if t + 1 < len(reply):
                        if (node, token) not in child:
                            child[node, token] = len(row.ids)
                            row.ids.append(token)
                            row.parents.append(node)
                        node = child[node, token]
    return rows


def trunk_length(row: Row) -> int:
    """How many tokens a row has before its first branch."""
    return next((node for node, parent in enumerate(row.parents) if parent != node - 1), len(row.parents))


def common_beginning(rows: list[Row]) -> int:
    """C: how many tokens all rows begin with, before any branch. 0 for a single row; every row keeps one
    token."""
    if len(rows) < 2:
        return 0
    limit = min(len(row.ids) - 1 for row in rows)
    for row in rows:
        limit = min([limit, *(parent + 1 for parent in row.parents[trunk_length(row) :])])
    tokens = zip(*(row.ids[:limit] for row in rows))
    return next((C for C, alternatives in enumerate(tokens) if len(set(alternatives)) > 1), limit)


# -------------------- attention

IN_BLOCKS = ("cpu",)  # devices where attention.py is faster than torch's own attention


@dataclass
class History:
    """What was read of R conversations so far: their tokens, and the keys and values of each layer (R, kv
    heads, P, D), in whatever order and with gaps; columns say where each token's stand."""

    ids: list[list[int]] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def known(self, r: int, ids: list[int]) -> int:
        """How many first tokens of `ids` need not be read again; at least one is."""
        same = (t for t, (a, b) in enumerate(zip(self.ids[r], ids)) if a != b)
        return min(next(same, min(len(self.ids[r]), len(ids))), len(ids) - 1)


class Pass:
    """Rows packed for one forward pass: the common beginning, then what is left of row 1, of row 2, ..., no
    padding. Only the attention sees rows side by side, as P + X columns of keys: P that rows begin with (C of
    the common beginning, or those of the rows' history), then X = L + B own ones, padded: L of the trunk (all
    before the first branch), where each token sees all before it, and B of branches, which have a mask."""

    def __init__(self, rows: list[Row], device, dtype, history: History | None = None):
        self.history = history if history and history.kv else None
        if self.history:
            known = [self.history.known(r, row.ids) for r, row in enumerate(rows)]
            # after keys that differ from row to row, every token has a mask
            trunks = np.zeros(len(rows), int)
            begin = [self.history.columns[r][:n] for r, n in enumerate(known)]
            self.C, P = 0, next(iter(self.history.kv.values()))[0].shape[2]
        else:
            self.C = P = common_beginning(rows)
            known = [P] * len(rows)
            trunks = np.array([trunk_length(row) - P for row in rows])
            begin = [list(range(P))] * len(rows)
        lengths = np.array([len(row.ids) for row in rows]) - known
        self.R, self.L, self.B = R, L, B = len(rows), int(trunks.max()), int((lengths - trunks).max())
        self.X = X = L + B
        self.known = known
        self.starts = np.cumsum([self.C, *lengths])  # where own tokens begin in the packed order
        depths = [row.positions() for row in rows]

        def packed(of_rows: list[list[int]]) -> Tensor:
            own = [value for of_row, n in zip(of_rows, known) for value in of_row[n:]]
            return torch.tensor([of_rows[0][: self.C] + own], device=device)

        self.ids, self.positions = packed([row.ids for row in rows]), packed(depths)

        self.columns: list[list[int]] = []  # where each token of a row stands among its keys
        places_RX = np.full((R, X), self.C)  # padding reads the first own token, and nobody sees it
        real_RX = np.zeros((R, X), bool)
        visible_RBK = np.zeros((R, B, P + X), bool)
        visible_RBK[:, range(B), range(P + L, P + X)] = (
            True  # padding sees itself, or its softmax would be 0/0
        )
        for r, (row, length, trunk) in enumerate(zip(rows, lengths, trunks)):
            place = np.concatenate([np.arange(trunk), L + np.arange(length - trunk)])  # of each own token
            places_RX[r, place], real_RX[r, place] = self.starts[r] + np.arange(length), True
            self.columns.append(columns := begin[r] + (P + place).tolist())
            for i in range(trunk, length):
                parent = row.parents[known[r] + i]
                if parent >= known[r] + trunk:
                    visible_RBK[r, i - trunk] |= visible_RBK[r, parent - known[r] - trunk]
                else:
                    visible_RBK[r, i - trunk, columns[: parent + 1]] = True
        self.places = torch.tensor(places_RX.flatten(), device=device)  # padded place -> packed index
        # packed index (after C) -> padded place
        self.back = torch.tensor(np.flatnonzero(real_RX), device=device)
        self.padding = torch.tensor(np.flatnonzero(~real_RX), device=device)
        self.P, self.visible, self.device, self.dtype = P, visible_RBK, device, dtype
        self.masks: dict[int, Tensor] = {}  # of branches, by query heads per key head
        if torch.device(device).type in IN_BLOCKS:
            trunk_1LK = np.tri(L, P + X, self.C, bool)[None]
            self.blocks = [
                *attention.blocks(trunk_1LK, device),
                *attention.blocks(visible_RBK, device, first=L),
            ]
            self.blocks_of_beginning = attention.blocks(np.tri(self.C, dtype=bool)[None], device)

    def index(self, r: int, nodes: list[int]) -> list[int]:
        """Packed indices of tokens of row r."""
        return [node if node < self.C else int(self.starts[r]) + node - self.known[r] for node in nodes]

    def attend(
        self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query (1, heads, n, D), key and value (1, kv heads, n, D) -> (1, n, heads, D), and the keys and
        values of each row, (R, kv heads, P + X, D)."""
        (_, heads, n, D), C = query.shape, self.C

        def of_rows(x, begin=None):  # (1, heads, n, D) -> (R, heads, [P +] X, D)
            own = (
                _ByRow.apply(x[0].transpose(0, 1).flatten(1), self)
                .view(self.R, self.X, -1, D)
                .transpose(1, 2)
            )
            return own if begin is None else torch.cat([begin, own], 2)

        def beginning(x):
            return x[:, :, :C].expand(self.R, -1, -1, -1)

        # (A history gives its keys and values away; `SharedKV.keep` fills it again.)
        begin_k, begin_v = (
            self.history.kv.pop(module.layer_idx) if self.history else map(beginning, (key, value))
        )
        k, v = of_rows(key, begin_k), of_rows(value, begin_v)
        if query.device.type in IN_BLOCKS:
            out = attention.attention(of_rows(query), k, v, self.blocks, scaling)
            begun = [x[:, :, :C] for x in (query, key, value)]
            out_of_beginning = attention.attention(*begun, self.blocks_of_beginning, scaling)[0]
        else:
            q = of_rows(query, beginning(query))
            out, out_of_beginning = self._attend_by_kernels(module, q, k, v, scaling)
        out = _Packed.apply(out.reshape(self.R * self.X, -1), self)
        return torch.cat([out_of_beginning.flatten(1), out]).view(1, n, heads, D), k, v

    def _attend_by_kernels(
        self, module, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """The same by torch's kernels: q (R, heads, C + X, D) -> (R, X, heads, D), and (C, heads, D) of the
        beginning."""
        (R, heads, _, D), kv_heads, C, L = q.shape, k.shape[1], self.C, self.L
        outs, out_of_beginning = [], q.new_empty(0, heads, D)
        if L:
            trunks = [x[:, :, : C + L] for x in (q, k, v)]
            out = sdpa_attention_forward(module, *trunks, None, scaling=scaling, is_causal=True)[0]
            outs, out_of_beginning = [out[:, C:]], out[0, :C]
        if self.B:
            # heads of a key head stand one after the other, as a long sequence: no copies of keys
            group = heads // kv_heads
            if group not in self.masks:
                bias_RBK = torch.zeros(self.visible.shape, dtype=self.dtype)
                bias_RBK.masked_fill_(torch.tensor(~self.visible), -torch.inf)
                self.masks[group] = bias_RBK[:, None].repeat(1, 1, group, 1).to(self.device)
            branches = q[:, :, C + L :].reshape(R, kv_heads, -1, D)
            out = F.scaled_dot_product_attention(branches, k, v, self.masks[group], scale=scaling)
            outs.append(out.reshape(R, heads, -1, D).transpose(1, 2))
        return torch.cat(outs, 1), out_of_beginning


class _ByRow(torch.autograd.Function):
    """Packed tokens (n, ...) -> padded places (R * X, ...). Each token after the beginning has one place, so
    the gradient is a gather too, and not a slow scatter-add; padding passes none back."""

    @staticmethod
    def forward(ctx, x, rows: Pass):
        ctx.rows = rows
        return x.index_select(0, rows.places)

    @staticmethod
    def backward(ctx, grad):
        beginning = grad.new_zeros(ctx.rows.C, grad.shape[1])
        return torch.cat([beginning, grad.index_select(0, ctx.rows.back)]), None


class _Packed(torch.autograd.Function):
    """And back: padded places -> packed tokens after the beginning."""

    @staticmethod
    def forward(ctx, x, rows: Pass):
        ctx.rows = rows
        return x.index_select(0, rows.back)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.rows.places - ctx.rows.C)
        return grad.index_fill_(0, ctx.rows.padding, 0), None


class SharedKV:
    """Keys and values in decoding: those of the prompts once for all replies, those of the replies apart.

    What is computed are states: a prompt and what some of its replies have said so far. At first they are the
    prompts."""

    def __init__(
        self, rows: Pass, prompts: list[tuple[int, int]], max_new_tokens: int, keeps_ended: bool = False
    ):
        """prompts: the row and the length of each. keeps_ended: states that do not go on are wanted by
        `keep`."""
        visible = torch.zeros(len(prompts), rows.P + rows.X, dtype=torch.bool)
        for i, (r, n) in enumerate(prompts):
            visible[i, rows.columns[r][:n]] = True
        # the bias of each prompt
        self.bias = torch.zeros(visible.shape, dtype=rows.dtype).masked_fill(~visible, -torch.inf)
        self.rows, self.max_new_tokens, self.keeps_ended = rows, max_new_tokens, keeps_ended
        self.row_of_prompt = [r for r, _ in prompts]
        # the prompt of the U states that are computed, then of ended ones that are kept
        self.prompt_of = list(range(len(prompts)))
        self.U = 0
        self.prompt: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # layer -> keys (R, kv heads, D, P + X), values (R, kv heads, P + X, D)
        self.reply: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (states, kv heads, S, D)
        self.length = 0  # reply tokens stored so far

    def go_on(self, origin: list[int]) -> None:
        """From now on U states are computed, in the order of their rows; each goes on from the origin-th so
        far."""
        if origin == list(range(self.U)):
            return
        gone_on = set(origin)
        ended = [u for u in range(len(self.prompt_of)) if u not in gone_on] if self.keeps_ended else []
        self.U, device = len(origin), self.rows.places.device
        self.prompt_of = [self.prompt_of[u] for u in origin + ended]
        taken = torch.tensor(origin + ended, device=device)
        self.reply = {layer: (k[taken], v[taken]) for layer, (k, v) in self.reply.items()}
        # Attention to the prompts wants the states by row, K places each; what is left over is computed in
        # vain.
        rows = [self.row_of_prompt[i] for i in self.prompt_of[: self.U]]
        self.K = max(rows.count(r) for r in set(rows))
        place = [r * self.K + rows[:u].count(r) for u, r in enumerate(rows)]
        state = [0] * (self.rows.R * self.K)
        for u, p in enumerate(place):
            state[p] = u
        self.full = place == list(range(len(state)))
        self.place_U, self.state = torch.tensor(place, device=device), torch.tensor(state, device=device)
        bias = self.bias[[self.prompt_of[u] for u in state]].view(self.rows.R, 1, self.K, 1, -1)
        self.bias_RK = bias.to(device) if bias.any() else None

    def keep(self, history: History, ids: list[list[int]]) -> None:
        """Leaves what was read in a history; each row has one reply. ids: prompt and reply of each row."""
        P_X = self.bias.shape[-1]
        history.ids = [of_row[:-1] for of_row in ids]  # the last token was not read any more
        history.columns = [
            columns + list(range(P_X, P_X + len(of_row) - len(columns)))
            for columns, of_row in zip(self.rows.columns, history.ids)
        ]
        states = torch.tensor(np.argsort(self.prompt_of), device=self.rows.places.device)
        for layer in list(self.prompt):
            (k, v), reply = self.prompt.pop(layer), self.reply.pop(layer, ())
            of_reply = [x[states, :, : self.length] for x in reply] or [v[:, :, :0]] * 2
            history.kv[layer] = tuple(torch.cat(parts, 2) for parts in zip((k.transpose(2, 3), v), of_reply))

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, ...]:
        """First the prompts, as a Pass; then one new token per state: (U, heads, 1, D) -> (U, 1, heads, D),
        with scores in the model's dtype."""
        layer = module.layer_idx
        if layer not in self.prompt:
            out, k, v = self.rows.attend(module, query, key, value, scaling)
            # contiguous, or every step would copy them
            self.prompt[layer] = k.transpose(2, 3).contiguous(), v.contiguous()
            return (out,)
        (U, heads, _, D), kv_heads, t = query.shape, key.shape[1], self.length + 1
        R, K, group = self.rows.R, self.K, heads // key.shape[1]
        if layer not in self.reply:
            shape = (len(self.prompt_of), kv_heads, self.max_new_tokens, D)
            self.reply[layer] = key.new_zeros(shape), value.new_zeros(shape)
        prompt_k, prompt_v = self.prompt[layer]
        reply_k, reply_v = (store[:U, :, :t] for store in self.reply[layer])
        reply_k[:, :, -1:], reply_v[:, :, -1:] = key, value

        def by_row(x):  # (U, kv heads, group, ...) -> (R, kv heads, K * group, ...)
            x = x if self.full else x.index_select(0, self.state)
            return x.view(R, K, kv_heads, group, -1).transpose(1, 2).reshape(R, kv_heads, K * group, -1)

        def by_state(x):  # and back
            x = x.view(R, kv_heads, K, group, -1).transpose(1, 2).reshape(R * K, kv_heads, group, -1)
            return x if self.full else x.index_select(0, self.place_U)

        q = query.view(U, kv_heads, group, D) * scaling
        on_prompt, on_reply = by_row(q) @ prompt_k, q @ reply_k.transpose(2, 3)
        if self.bias_RK is not None:
            on_prompt.view(R, kv_heads, K, group, -1).add_(self.bias_RK)
        weights = (
            torch.cat([on_prompt, by_row(on_reply)], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        )
        w_prompt, w_reply = weights.split([prompt_k.shape[3], t], -1)
        out = by_state(w_prompt @ prompt_v) + by_state(w_reply) @ reply_v
        return (out.reshape(U, 1, heads, D),)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tokens=None, **kwargs):
    """What the model's attention layers call. tokens: the Pass or SharedKV that says who sees whom, whatever
    mask transformers made of the position ids; without it (somebody calls the model itself) it is plain
    attention."""
    if tokens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError(
            "models whose attention has a soft cap or sinks are not supported; choose another --model"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tokens.attend(module, query, key, value, scaling)[0], None


AttentionInterface.register("shared_prefix", _attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)

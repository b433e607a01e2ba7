"""Prompts and replies as trees of tokens, and attention over them: every token is computed once.

All prompts begin with the same rules, the prompt of a decision goes on from that of the decision before, and
the M replies to a prompt follow it and may begin alike. So they form trees:

- a `Row` is a trunk (the longest prompt) from which replies branch off; a token sees its ancestors (`pack`);
- a `Pass` packs rows for one forward pass, without padding; the beginning that all rows have in common is
  read once;
- a `SharedKV` stores the keys and values of the prompts once for all replies that are being sampled. Each
  reply has a small store of its own, and one softmax runs over both.

The model's own code is not changed: any Hugging Face decoder calls this through transformers'
AttentionInterface.

Dimensions: R rows; n tokens of a pass, the first C of which are the common beginning; the keys of a row are P
that it begins with, then X = L + B own ones (trunk, branches); U states that are computed in a decoding step,
at most K of them in a row; S the longest reply, T targets, D head size.
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
from run.errors import InputError

# -------------------- rows: prompts and replies as trees of tokens


@dataclass
class Row:
    """A tree of tokens that one forward pass reads, and the reply tokens that are scored.

    ids (n,): the tokens. parents (n,): the index of the token before, -1 for the first; it is always smaller
    than the own index. sources (T,): the index of the token whose output predicts each target. targets (T,):
    the reply tokens. prompts: the indices of the prompts in this row, in the order of their replies in
    `targets`. Which tokens are a reply is known from these indices and never from token values, since the
    end-of-turn token may be the padding token too."""

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


def chain(ids: list[int], prompts: list[int]) -> Row:
    """A row without branches."""
    return Row(list(ids), list(range(-1, len(ids) - 1)), prompts=prompts)


def pack(prompts: list[list[int]], replies: list[list[list[int]]]) -> list[Row]:
    """Prompts and the replies to each (any number) in as few rows as possible, the longest trunk first.

    A prompt that is the beginning of another shares its row. Replies share the tokens of their common
    beginning, also with the trunk. The last token of a reply predicts nothing, so it is not read."""
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
    """The number of tokens before the first branch of a row."""
    return next((node for node, parent in enumerate(row.parents) if parent != node - 1), len(row.parents))


def common_beginning(rows: list[Row]) -> int:
    """C: the number of tokens with which all rows begin, before any branch. It is 0 for a single row, and
    leaves every row a token of its own."""
    if len(rows) < 2:
        return 0
    limit = min(len(row.ids) - 1 for row in rows)
    for row in rows:
        limit = min([limit, *(parent + 1 for parent in row.parents[trunk_length(row) :])])
    tokens = zip(*(row.ids[:limit] for row in rows), strict=True)
    return next((C for C, alternatives in enumerate(tokens) if len(set(alternatives)) > 1), limit)


# -------------------- attention

IN_BLOCKS = ("cpu",)  # the devices where attention.py is faster than torch's own attention


@dataclass
class History:
    """What was read of R conversations so far. ids: their tokens. kv: keys and values (R, kv heads, P, D) of
    each layer; the P places may be in any order and have gaps. columns: the place of each token."""

    ids: list[list[int]] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def known(self, r: int, ids: list[int]) -> int:
        """The number of first tokens of `ids` that need not be read again. It leaves at least one to read."""
        limit = min(len(self.ids[r]), len(ids) - 1)
        return next((t for t in range(limit) if self.ids[r][t] != ids[t]), limit)


class _Gather(torch.autograd.Function):
    """x[index], whose gradient is grad[back] with zeros at `none`. The index takes each token at most once,
    except padding, which passes no gradient back. In general it would be a slow scatter-add."""

    @staticmethod
    def forward(ctx, x, index, back, none):
        ctx.back, ctx.none = back, none
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.back).index_fill_(0, ctx.none, 0), None, None, None


class Pass:
    """Rows packed for one forward pass: first the common beginning, then the rest of each row, row after row.

    Attention alone sees the rows side by side, each with P + X columns of keys. P keys are those of the
    common beginning (then P = C), or those of the rows' history. X = L + B are the row's own: L places for
    its trunk, where each token sees all tokens before it, and B for its branches, where each token has a
    mask. Shorter rows are padded."""

    def __init__(self, rows: list[Row], device, dtype, history: History | None = None):
        self.history = history if history and history.kv else None
        if self.history:
            known = [history.known(r, row.ids) for r, row in enumerate(rows)]
            begin = [history.columns[r][:n] for r, n in enumerate(known)]
            # The keys before them differ from row to row, so every token needs a mask.
            trunks = np.zeros(len(rows), int)
            self.C, P = 0, next(iter(history.kv.values()))[0].shape[2]
        else:
            self.C = P = common_beginning(rows)
            known, begin = [P] * len(rows), [list(range(P))] * len(rows)
            trunks = np.array([trunk_length(row) - P for row in rows])
        lengths = np.array([len(row.ids) for row in rows]) - known
        self.R, self.L, self.B = R, L, B = len(rows), int(trunks.max()), int((lengths - trunks).max())
        self.X, self.P, self.known, self.device, self.dtype = L + B, P, known, device, dtype
        self.starts = np.cumsum([self.C, *lengths])  # the packed index of each row's first own token

        def packed(values: list[list[int]]) -> Tensor:
            own = [value for row, n in zip(values, known, strict=True) for value in row[n:]]
            return torch.tensor([values[0][: self.C] + own], device=device)

        self.ids = packed([row.ids for row in rows])
        self.positions = packed([row.positions() for row in rows])
        self.columns: list[list[int]] = []  # the place of each token of a row among the row's keys
        places_RX = np.full((R, self.X), self.C)  # padding reads some token, and no token sees it
        real_RX = np.zeros((R, self.X), bool)
        visible_RBK = np.zeros((R, B, P + self.X), bool)
        # Every query sees itself; if padding saw nothing, its softmax would be 0/0.
        visible_RBK[:, range(B), range(P + L, P + self.X)] = True
        for r, (row, length, trunk) in enumerate(zip(rows, lengths, trunks, strict=True)):
            place = np.concatenate([np.arange(trunk), L + np.arange(length - trunk)])  # of each own token
            places_RX[r, place], real_RX[r, place] = self.starts[r] + np.arange(length), True
            self.columns.append(columns := begin[r] + (P + place).tolist())
            for i in range(trunk, length):
                parent = row.parents[known[r] + i]
                if parent >= known[r] + trunk:
                    visible_RBK[r, i - trunk] |= visible_RBK[r, parent - known[r] - trunk]
                else:
                    visible_RBK[r, i - trunk, columns[: parent + 1]] = True
        # For _Gather: from the packed order to the places of all rows, and back (without the beginning).
        places = torch.tensor(places_RX.flatten(), device=device)
        real, padding = (torch.tensor(np.flatnonzero(x), device=device) for x in (real_RX, ~real_RX))
        beginning = torch.arange(self.C, device=device)
        self.to_places = places, torch.cat([0 * beginning, real]), beginning
        self.to_packed = real, places - self.C, padding
        self.visible = visible_RBK
        self.masks: dict[int, Tensor] = {}  # for the branches, by the number of query heads per key head
        if torch.device(device).type in IN_BLOCKS:
            trunk_1LK = np.tri(L, P + self.X, self.C, bool)[None]
            self.blocks = attention.blocks(trunk_1LK, device) + attention.blocks(visible_RBK, device, first=L)
            self.beginning_blocks = attention.blocks(np.tri(self.C, dtype=bool)[None], device)

    def index(self, r: int, nodes: list[int]) -> list[int]:
        """The packed indices of tokens of row r."""
        return [node if node < self.C else int(self.starts[r]) + node - self.known[r] for node in nodes]

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, ...]:
        """query (1, heads, n, D), key and value (1, kv heads, n, D) -> (1, n, heads, D), and the keys and
        values of each row, (R, kv heads, P + X, D)."""
        (_, heads, n, D), C = query.shape, self.C

        def own(x):  # (1, heads, n, D) -> (R, heads, X, D)
            padded = _Gather.apply(x[0].transpose(0, 1).flatten(1), *self.to_places)
            return padded.view(self.R, self.X, -1, D).transpose(1, 2)

        def beginning(x):  # (1, heads, n, D) -> (R, heads, C, D)
            return x[:, :, :C].expand(self.R, -1, -1, -1)

        if self.history:  # this empties the history, and `SharedKV.keep` fills it again
            begin_k, begin_v = self.history.kv.pop(module.layer_idx)
        else:
            begin_k, begin_v = beginning(key), beginning(value)
        k, v = torch.cat([begin_k, own(key)], 2), torch.cat([begin_v, own(value)], 2)
        if query.device.type in IN_BLOCKS:
            out = attention.attention(own(query), k, v, self.blocks, scaling)
            q_C, k_C, v_C = (x[:, :, :C] for x in (query, key, value))
            out_C = attention.attention(q_C, k_C, v_C, self.beginning_blocks, scaling)[0]
        else:
            q = torch.cat([beginning(query), own(query)], 2)
            out, out_C = self._by_kernels(module, q, k, v, scaling)
        out = _Gather.apply(out.reshape(self.R * self.X, -1), *self.to_packed)
        return torch.cat([out_C.flatten(1), out]).view(1, n, heads, D), k, v

    def _by_kernels(self, module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The same by torch's kernels: q (R, heads, C + X, D) -> (R, X, heads, D) of the rows' own tokens and
        (C, heads, D) of the common beginning."""
        (R, heads, _, D), kv_heads, C, L = q.shape, k.shape[1], self.C, self.L
        outs, out_C = [], q.new_empty(0, heads, D)
        if L:
            trunks = [x[:, :, : C + L] for x in (q, k, v)]
            out = sdpa_attention_forward(module, *trunks, None, scaling=scaling, is_causal=True)[0]
            outs, out_C = [out[:, C:]], out[0, :C]
        if self.B:
            # The heads of a key head stand one after the other, like a long sequence, so no key is copied.
            group = heads // kv_heads
            if group not in self.masks:
                bias_RBK = torch.zeros(self.visible.shape, dtype=self.dtype)
                bias_RBK.masked_fill_(torch.tensor(~self.visible), -torch.inf)
                self.masks[group] = bias_RBK[:, None].repeat(1, 1, group, 1).to(self.device)
            branches = q[:, :, C + L :].reshape(R, kv_heads, -1, D)
            out = F.scaled_dot_product_attention(branches, k, v, self.masks[group], scale=scaling)
            outs.append(out.reshape(R, heads, -1, D).transpose(1, 2))
        return torch.cat(outs, 1), out_C


class SharedKV:
    """Keys and values in decoding: those of the prompts once for all replies, and those of the replies.

    What is computed are states: a prompt together with what some of its replies have said so far. In the
    beginning there is one for every prompt."""

    def __init__(self, tokens: Pass, ends: list[tuple[int, int]], S: int, keeps_ended: bool = False):
        """ends: the row and the length of each prompt. keeps_ended: states that do not go on are stored too,
        since `keep` will want them."""
        visible = torch.zeros(len(ends), tokens.P + tokens.X, dtype=torch.bool)
        for i, (r, n) in enumerate(ends):
            visible[i, tokens.columns[r][:n]] = True
        # what each prompt adds to the scores of its row's keys
        self.bias = torch.zeros(visible.shape, dtype=tokens.dtype).masked_fill(~visible, -torch.inf)
        self.tokens, self.S, self.keeps_ended = tokens, S, keeps_ended
        self.row_of_prompt = [r for r, _ in ends]
        self.prompt_of = list(range(len(ends)))  # of the U states that are computed, then of the ended ones
        self.U = 0
        # By layer: keys (R, kv heads, D, P + X) and values (R, kv heads, P + X, D) of the prompts, keys and
        # values (states, kv heads, S, D) of the replies.
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self.reply: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0  # the number of reply tokens that are stored

    def go_on(self, origin: list[int]) -> None:
        """From now on U states are computed, in the order of their rows. origin: which of the present states
        each of them continues."""
        if origin == list(range(self.U)):
            return
        ended = sorted(set(range(len(self.prompt_of))) - set(origin)) if self.keeps_ended else []
        self.U, device = len(origin), self.tokens.device
        self.prompt_of = [self.prompt_of[u] for u in origin + ended]
        taken = torch.tensor(origin + ended, device=device)
        self.reply = {layer: (k[taken], v[taken]) for layer, (k, v) in self.reply.items()}
        # Attention to the prompts needs the states by row, with K places in each; places without a state are
        # computed without need.
        rows = [self.row_of_prompt[i] for i in self.prompt_of[: self.U]]
        self.K = max(rows.count(r) for r in set(rows))
        place = [r * self.K + rows[:u].count(r) for u, r in enumerate(rows)]
        state = [0] * (self.tokens.R * self.K)
        for u, p in enumerate(place):
            state[p] = u
        self.full = place == list(range(len(state)))
        self.place_U, self.state = torch.tensor(place, device=device), torch.tensor(state, device=device)
        bias = self.bias[[self.prompt_of[u] for u in state]].view(self.tokens.R, 1, self.K, 1, -1)
        self.bias_RK = bias.to(device) if bias.any() else None

    def keep(self, history: History, ids: list[list[int]]) -> None:
        """Stores what was read in a history. ids: the prompt and the only reply of each row."""
        width = self.bias.shape[-1]
        history.ids = [row[:-1] for row in ids]  # the last token of a reply was not read
        history.columns = [
            columns + list(range(width, width + len(row) - len(columns)))
            for columns, row in zip(self.tokens.columns, history.ids, strict=True)
        ]
        states = torch.tensor(np.argsort(self.prompt_of), device=self.tokens.device)
        for layer in list(self.prompt):
            (k, v), reply = self.prompt.pop(layer), self.reply.pop(layer, ())
            ends = [x[states, :, : self.length] for x in reply] or [v[:, :, :0]] * 2
            history.kv[layer] = tuple(torch.cat(x, 2) for x in zip((k.transpose(2, 3), v), ends, strict=True))

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor]:
        """The first call of a layer reads the prompts, as a Pass does; each later call a new token of each
        state: (U, heads, 1, D) -> (U, 1, heads, D), with scores in the model's dtype."""
        layer = module.layer_idx
        if layer not in self.prompt:
            out, k, v = self.tokens.attend(module, query, key, value, scaling)
            # contiguous, because every step would copy them otherwise
            self.prompt[layer] = k.transpose(2, 3).contiguous(), v.contiguous()
            return (out,)
        (U, heads, _, D), kv_heads, t = query.shape, key.shape[1], self.length + 1
        R, K, group = self.tokens.R, self.K, heads // kv_heads
        if layer not in self.reply:
            shape = (len(self.prompt_of), kv_heads, self.S, D)
            self.reply[layer] = key.new_zeros(shape), value.new_zeros(shape)
        prompt_k, prompt_v = self.prompt[layer]
        reply_k, reply_v = (store[:U, :, :t] for store in self.reply[layer])
        reply_k[:, :, -1:], reply_v[:, :, -1:] = key, value

        def by_row(x):  # (U, kv heads, group, ...) -> (R, kv heads, K * group, ...)
            x = x if self.full else x.index_select(0, self.state)
            return x.view(R, K, kv_heads, group, -1).transpose(1, 2).reshape(R, kv_heads, K * group, -1)

        def by_state(x):  # (R, kv heads, K * group, ...) -> (U, kv heads, group, ...)
            x = x.view(R, kv_heads, K, group, -1).transpose(1, 2).reshape(R * K, kv_heads, group, -1)
            return x if self.full else x.index_select(0, self.place_U)

        q = query.view(U, kv_heads, group, D) * scaling
        on_prompt, on_reply = by_row(q) @ prompt_k, q @ reply_k.transpose(2, 3)
        if self.bias_RK is not None:
            on_prompt.view(R, kv_heads, K, group, -1).add_(self.bias_RK)
        scores = torch.cat([on_prompt, by_row(on_reply)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        w_prompt, w_reply = weights.split([prompt_k.shape[3], t], -1)
        out = by_state(w_prompt @ prompt_v) + by_state(w_reply) @ reply_v
        return (out.reshape(U, 1, heads, D),)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tokens=None, **kwargs):
    """What the model's attention layers call. tokens: the Pass or SharedKV that says which tokens see which,
    whatever mask transformers made of the position ids. Without it, when the model itself is called, this is
    plain attention."""
    if tokens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError("attention with a soft cap or sinks is not supported; choose another --model")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tokens.attend(module, query, key, value, scaling)[0], None


AttentionInterface.register("shared_prefix", _attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)

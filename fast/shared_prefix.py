"""Prompts and replies as trees of tokens, and attention over them: every token is computed once.

All prompts begin with the same rules, the prompt of a decision goes on from that of the decision before, and
the M replies to a prompt follow it and may begin alike. So they form trees:

- a `Row` is a tree: a trunk (what comes before the first branch), then branches; a token sees its ancestors;
- a `Pass` packs rows for one forward pass, without padding; the beginning that all rows have in common is
  read once;
- a `Store` holds the keys and values of what was read, so that later passes read only what is new in the
  trees: the next tokens of replies, or the next prompt of a conversation.

The model's own code is not changed: any Hugging Face decoder calls this through transformers'
AttentionInterface.

Dimensions: R rows; n tokens of a pass, the first C of which are the common beginning; X the most tokens that
it reads of one row: L before any branch, then B that need a mask; K the most tokens of a row, of this pass
and those before; T targets, D head size.
"""

import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from run.errors import InputError

# -------------------- rows: prompts and replies as trees of tokens


@dataclass
class Row:
    """A tree of tokens, and the reply tokens of it that are scored.

    ids (n,): the tokens, which are called by their index (node). parents (n,): the node before, -1 for the
    first; it is always smaller than the node. depths (n,): the number of tokens before. child: (node, next
    token) -> node. sources (T,): the node whose output predicts each target. targets (T,): the reply tokens.
    prompts: the indices of the prompts in this row, in the order of their replies in `targets`. Which tokens
    are a reply is known from these indices and never from token values, since the end-of-turn token may be
    the padding token too."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    child: dict[tuple[int, int], int] = field(default_factory=dict)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def append(self, node: int, token: int) -> int:
        """A new node for a token below `node` (-1: for the first token)."""
        self.child[node, token] = len(self.ids)
        self.ids.append(token)
        self.parents.append(node)
        self.depths.append(0 if node < 0 else self.depths[node] + 1)
        return len(self.ids) - 1

    def add(self, node: int, tokens: list[int]) -> list[int]:
        """The nodes of a chain of tokens below `node`. Those that are missing are appended."""
        nodes = []
        for token in tokens:
            below = self.child.get((node, token))
            node = self.append(node, token) if below is None else below
            nodes.append(node)
        return nodes


def pack(prompts: list[list[int]], replies: list[list[list[int]]]) -> list[Row]:
    """Prompts and the replies to each (any number) in as few rows as possible, the longest prompt first.

    A prompt that is the beginning of another shares its row. Replies share the tokens of their common
    beginning, also with the trunk. The last token of a reply predicts nothing, so it is not read."""
    rows: list[Row] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        row = next((row for row in rows if row.ids[: len(prompts[i])] == prompts[i]), None)
        if row is None:
            rows.append(row := Row())
            row.add(-1, prompts[i])
        row.prompts.append(i)
    for row in rows:
        row.prompts.sort()
        for i in row.prompts:
            end = len(prompts[i]) - 1
            for reply in replies[i]:
                row.sources += [end, *row.add(end, reply[:-1])]
                row.targets += reply
    return rows


def trunk_length(row: Row) -> int:
    """The number of tokens before the first branch of a row."""
    return next((node for node, parent in enumerate(row.parents) if parent != node - 1), len(row.parents))


def visible(row: Row, first: int) -> np.ndarray:
    """Which tokens of a row the node `first` and those after it see, (nodes, all nodes): themselves and those
    above them."""
    end = len(row.ids)
    seen = np.zeros((end - first, end), bool)
    for node in range(first, end):
        own, parent = seen[node - first], row.parents[node]
        if parent >= first:
            own |= seen[parent - first]
        while -1 < parent < first:
            own[parent], parent = True, row.parents[parent]
        own[node] = True
    return seen


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


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros with the dtype and device of another tensor. On CPUs they are a memory map of their own, which
    goes back to the system when it is freed: in the heap, which keeps what is freed (fast/cpu.py), a store
    that grows would leave all its former sizes behind. Places that are never written take no memory."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = max(1, math.prod(shape)) * like.element_size()
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype)[: math.prod(shape)].view(shape)


class Store:
    """The keys and values of what was read of some rows. read: how many nodes of each row; kv: by layer, keys
    and values (R, kv heads, room, D), where the place of a token is its node."""

    def __init__(self):
        self.read: list[int] = []
        self.kv: dict[int, list[Tensor]] = {}

    def add(self, layer: int, tokens: "Pass", computed: tuple[Tensor, Tensor]) -> list[Tensor]:
        """computed: keys and values of a pass, (1, kv heads, n, D) each. Returns those of all that was read,
        (R, kv heads, K, D)."""
        (_, heads, _, D), C, K = computed[0].shape, tokens.C, tokens.K
        old = self.kv.get(layer)
        if old is None or old[0].shape[2] < K:
            # Zeros, and not what happens to be in memory: what is masked is multiplied by 0.
            new = [zeros((tokens.R, heads, K + K // 2, D), x) for x in computed]
            for x, before in zip(new, old or (), strict=False):
                x[:, :, : before.shape[2]] = before
            self.kv[layer] = new
        for x, own in zip(self.kv[layer], computed, strict=True):
            x[:, :, :C] = own[:, :, :C]
            x[tokens.row_of_own, :, tokens.node_of_own] = own[0, :, C:].transpose(0, 1)
        return [x[:, :, :K] for x in self.kv[layer]]


class _Gather(torch.autograd.Function):
    """x[index], whose gradient is grad[back] with zeros at `none`. The index takes each token at most once,
    except padding, which passes no gradient back. For any index the gradient would be a slow scatter-add."""

    @staticmethod
    def forward(ctx, x, index, back, none):
        ctx.back, ctx.none = back, none
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.back).index_fill_(0, ctx.none, 0), None, None, None


class Pass:
    """Rows packed for one forward pass: first the common beginning, then the rest of each row, row after row.
    Attention sees the rows side by side, each with C + X queries, some of which are padding."""

    def __init__(self, rows: list[Row], device, dtype, store: Store | None = None):
        """store: what was read before, to which this pass adds; None: all is read, and nothing stored."""
        self.store, self.device, self.dtype = store, device, dtype
        goes_on = bool(store and store.read)
        self.C = C = 0 if goes_on else common_beginning(rows)
        self.known = known = store.read if goes_on else [C] * len(rows)
        ends = [len(row.ids) for row in rows]
        lengths = np.array(ends) - known
        self.R, self.X, self.K = R, X, K = len(rows), int(max(lengths)), max(ends)
        self.starts = np.cumsum([C, *lengths]).tolist()  # the packed index of each row's first own token
        if store:
            store.read = ends

        def packed(values: list[list[int]]) -> Tensor:
            own = [value for row, n in zip(values, known, strict=True) for value in row[n:]]
            return torch.tensor([values[0][:C] + own], device=device)

        self.ids = packed([row.ids for row in rows])
        self.positions = packed([row.depths for row in rows])
        self.row_of_own = torch.tensor(np.repeat(range(R), lengths), device=device)
        self.node_of_own = packed([list(range(end)) for end in ends])[0, C:]
        # Before its first branch, a token sees all tokens of its row before it, and needs no mask. So do the
        # first L of the X queries in all rows.
        self.L = L = 0 if goes_on else min(map(trunk_length, rows)) - C
        places_RX = np.full((R, X), C)  # padding reads some token, and no token sees it
        real_RX = np.zeros((R, X), bool)
        self.seen_RBK = np.zeros((R, X - L, K), bool)
        for r, (row, n, end) in enumerate(zip(rows, lengths, ends, strict=True)):
            places_RX[r, :n], real_RX[r, :n] = self.starts[r] + np.arange(n), True
            self.seen_RBK[r, : n - L, :end] = visible(row, known[r] + L)
            self.seen_RBK[r, n - L :, 0] = True  # if padding saw nothing, its softmax would be 0/0
        self.bias: Tensor | None = None  # the same as 0 and -inf, which are added to scores
        # For _Gather: from the packed order to the places of all rows, and back (without the beginning).
        places = torch.tensor(places_RX.flatten(), device=device)
        real, padding = (torch.tensor(np.flatnonzero(x), device=device) for x in (real_RX, ~real_RX))
        beginning = torch.arange(C, device=device)
        self.to_places = places, torch.cat([0 * beginning, real]), beginning
        self.to_packed = real, places - C, padding

    def index(self, r: int, nodes: list[int]) -> list[int]:
        """The packed indices of tokens of row r."""
        return [node if node < self.C else self.starts[r] + node - self.known[r] for node in nodes]

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query (1, heads, n, D), key and value (1, kv heads, n, D) -> (1, n, heads, D)."""
        (_, heads, n, D), R, C, L = query.shape, self.R, self.C, self.L
        q, *kv = (self.side_by_side(x) for x in ((query,) if self.store else (query, key, value)))
        k, v = self.store.add(module.layer_idx, self, (key, value)) if self.store else kv
        outs, out_C = [], q.new_empty(0, heads, D)
        if C + L:
            trunks = [x[:, :, : C + L] for x in (q, k, v)]
            out = sdpa_attention_forward(module, *trunks, None, scaling=scaling, is_causal=True)[0]
            outs, out_C = [out[:, C:]], out[0, :C]
        if L < self.X:
            outs.append(self.branches(q[:, :, C + L :], k, v, scaling))
        out = _Gather.apply(torch.cat(outs, 1).reshape(R * self.X, -1), *self.to_packed)
        return torch.cat([out_C.flatten(1), out]).view(1, n, heads, D)

    def side_by_side(self, x: Tensor) -> Tensor:
        """(1, heads, n, D) -> (R, heads, C + X, D)."""
        own = _Gather.apply(x[0].transpose(0, 1).flatten(1), *self.to_places)
        own = own.view(self.R, self.X, -1, x.shape[-1]).transpose(1, 2)
        return torch.cat([x[:, :, : self.C].expand(self.R, -1, -1, -1), own], 2)

    def branches(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q (R, heads, B, D), k and v (R, kv heads, K, D) -> (R, B, heads, D), by seen_RBK. The query heads
        that share a key head stand one after the other, like a long sequence, so that no key is copied."""
        (R, heads, B, D), kv_heads = q.shape, k.shape[1]
        if self.bias is None:  # all layers share it
            seen_RBK = torch.tensor(self.seen_RBK, device=self.device)
            bias_RBK = torch.zeros(seen_RBK.shape, dtype=self.dtype, device=self.device)
            bias_RBK.masked_fill_(~seen_RBK, -torch.inf)
            self.bias = bias_RBK[:, None].repeat(1, 1, heads // kv_heads, 1)
        q = q.reshape(R, kv_heads, -1, D)
        out = F.scaled_dot_product_attention(q, k, v, self.bias, scale=scaling)
        return out.reshape(R, heads, B, D).transpose(1, 2)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tokens=None, **kwargs):
    """What the model's attention layers call. tokens: the Pass that says which tokens see which, whatever
    mask transformers made of the position ids. Without it, when the model itself is called, this is plain
    attention."""
    if tokens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Sinks, biases, or the keys that sparse attention has chosen, come as tensors or as a mask of the layer.
    own = {name for name, value in kwargs.items() if isinstance(value, Tensor)} - {"position_ids"}
    own |= {"softcap"} if kwargs.get("softcap") is not None else set()
    own |= {"a mask"} if attention_mask is not None and not hasattr(attention_mask, "of_positions") else set()
    if own:
        raise InputError(f"its attention also takes {', '.join(sorted(own))}; choose another --model")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tokens.attend(module, query, key, value, scaling), None


def _mask(*args, **kwargs) -> Tensor | None:
    """transformers' own, marked: a mask that a layer has made itself must not be lost in `_attention`."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None:
        mask.of_positions = True
    return mask


AttentionInterface.register("shared_prefix", _attention)
AttentionMaskInterface.register("shared_prefix", _mask)

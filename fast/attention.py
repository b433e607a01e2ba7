"""Attention in which every token sees some of the others, computed by plain matrix products in blocks.

The result is softmax(scaling q k^T + mask) v, with scores and softmax in fp32. Neighbouring queries form a
`Block` together with the keys that any of them sees, so that few products are computed only to be masked. The
backward pass computes the weights again instead of storing them. torch's flash attention does not use the
fast products that many CPUs have; this code takes half of its time in bf16, and three quarters in fp32 with
oneDNN.

Dimensions: R rows, n queries and K keys of a row, D head size; kv heads, each of which serves a group of
query heads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUERIES = 128  # the largest number of queries in a block


@dataclass
class Block:
    """queries: a slice of the n queries. keys: a slice of the K keys, or the indices (k,) of some of them.
    bias (R or 1, 1, queries, keys): 0 where the query sees the key, else -inf."""

    queries: slice
    keys: slice | Tensor
    bias: Tensor


def blocks(visible: np.ndarray, device, first: int = 0) -> list[Block]:
    """The blocks for a mask. visible (R or 1, n, K), bool: whether a query sees a key; every query must see
    at least one. The first of the n queries has the number `first`."""
    result = []
    for start in range(0, visible.shape[1], QUERIES):
        mask = visible[:, start : start + QUERIES]
        seen = np.flatnonzero(mask.any((0, 1)))
        if 4 * len(seen) > 3 * (seen[-1] + 1):  # a slice needs no copy, which is worth some masked products
            keys, mask = slice(0, int(seen[-1]) + 1), mask[:, :, : seen[-1] + 1]
        else:
            keys, mask = torch.tensor(seen, device=device), mask[:, :, seen]
        bias = torch.zeros(mask.shape).masked_fill_(torch.tensor(~mask), -torch.inf).to(device)
        queries = slice(first + start, first + start + mask.shape[1])
        result.append(Block(queries, keys, bias[:, None]))
    return result


class _Attention(torch.autograd.Function):
    """With w the weights of a block, s its scores and g the gradient of its output o:
    dv = w^T g,  ds = w (g v^T - sum_D g o),  dq = scaling ds k,  dk = scaling ds^T q."""

    @staticmethod
    def weights(q: Tensor, k: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """q (R kv, group queries, D), k (R kv, keys, D) -> fp32 (R kv, group queries, keys)."""
        scores = (q.float() * scaling) @ k.float().transpose(-1, -2)
        scores.view(len(bias), -1, *bias.shape[2:]).add_(bias)
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, all_blocks, scaling):
        (R, heads, n, D), kv_heads = q.shape, k.shape[1]
        out = q.new_empty(R, n, heads, D)
        for block in all_blocks:
            q_block, k_seen, v_seen = _by_kv_head(block, q, kv_heads), _seen(block, k), _seen(block, v)
            weights = _Attention.weights(q_block, k_seen, block.bias, scaling).to(v.dtype)
            out[:, block.queries] = (weights @ v_seen).view(R, heads, -1, D).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out)
        ctx.blocks, ctx.scaling = all_blocks, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        (R, heads, _, D), kv_heads = q.shape, k.shape[1]
        grad_out = (grad.float() * out.float()).sum(-1, keepdim=True).transpose(1, 2)
        grad = grad.transpose(1, 2)  # (R, heads, n, D), as q
        dq, (dk, dv) = torch.empty_like(q), (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for block in ctx.blocks:
            q_block, g, g_out = (_by_kv_head(block, x, kv_heads) for x in (q, grad, grad_out))
            k_seen, v_seen = _seen(block, k), _seen(block, v)
            weights = _Attention.weights(q_block, k_seen, block.bias, ctx.scaling)
            ds = (g.float() @ v_seen.float().transpose(-1, -2)).sub_(g_out).mul_(weights).to(q.dtype)
            dq[:, :, block.queries] = (ds @ k_seen).mul_(ctx.scaling).view(R, heads, -1, D)
            dk_block = ds.transpose(-1, -2) @ q_block
            dv_block = weights.to(g.dtype).transpose(-1, -2) @ g
            for total, part in ((dk, dk_block), (dv, dv_block)):
                part = part.view(R, kv_heads, -1, D)
                if isinstance(block.keys, slice):
                    total[:, :, block.keys] += part
                else:
                    total.index_add_(2, block.keys, part.float())
        return dq, dk.mul_(ctx.scaling).to(k.dtype), dv.to(v.dtype), None, None


def _by_kv_head(block: Block, x: Tensor, kv_heads: int) -> Tensor:
    """(R, heads, n, D) -> (R kv, group queries, D): the heads of a key head stand one after the other, so
    that no key is copied."""
    x = x[:, :, block.queries]
    return x.reshape(len(x) * kv_heads, -1, x.shape[-1])


def _seen(block: Block, x: Tensor) -> Tensor:
    """(R, kv heads, K, D) -> (R kv, keys, D)."""
    x = x[:, :, block.keys] if isinstance(block.keys, slice) else x.index_select(2, block.keys)
    return x.flatten(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, all_blocks: list[Block], scaling: float) -> Tensor:
    """q (R, heads, n, D), k and v (R, kv heads, K, D) -> (R, n, heads, D). Every query must be in exactly one
    block."""
    return _Attention.apply(q, k, v, all_blocks, scaling)

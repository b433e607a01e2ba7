"""Attention in which every token sees some of the others, by plain matrix products in blocks.

softmax(scaling q k^T + mask) v, scores and softmax in fp32. Neighbouring queries form a `Block` with the keys
that any of them sees, so that little is multiplied to be masked. The backward pass computes the weights
again. Where a CPU has fast products, torch's flash attention does not use them, and this takes half (bf16) to
three quarters (fp32 of oneDNN) of its time.

Dimensions: R rows, n queries and K keys of a row, D head size; kv heads, of which each serves a group of
query heads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUERIES = 128  # of a block, at most


@dataclass
class Block:
    """queries: which of the n. keys: a slice of the K, or indices (k,). bias (R or 1, 1, queries, keys): 0,
    or -inf for what is not seen."""

    queries: slice
    keys: slice | Tensor
    bias: Tensor


def blocks(visible: np.ndarray, device, first: int = 0) -> list[Block]:
    """visible (R or 1, n, K): does a query see a key? Each sees one at least. The queries count from
    `first`."""
    result = []
    for start in range(0, visible.shape[1], QUERIES):
        of_block = visible[:, start : start + QUERIES]
        seen = np.flatnonzero(of_block.any((0, 1)))
        if 4 * len(seen) > 3 * (seen[-1] + 1):  # a slice is no copy, and worth some keys in vain
            keys, of_block = slice(0, int(seen[-1]) + 1), of_block[:, :, : seen[-1] + 1]
        else:
            keys, of_block = torch.tensor(seen, device=device), of_block[:, :, seen]
        bias = torch.zeros(of_block.shape).masked_fill_(torch.tensor(~of_block), -torch.inf).to(device)
        queries = slice(first + start, first + start + of_block.shape[1])
        result.append(Block(queries, keys, bias[:, None]))
    return result


class _Attention(torch.autograd.Function):
    """With w the weights of a block, s its scores, g the gradient of its output o:
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
            of_block, k_of_block, v_of_block = _of_block(block, q, kv_heads), _seen(block, k), _seen(block, v)
            weights = _Attention.weights(of_block, k_of_block, block.bias, scaling).to(v.dtype)
            out[:, block.queries] = (weights @ v_of_block).view(R, heads, -1, D).transpose(1, 2)
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
            of_q, g, g_out = (_of_block(block, x, kv_heads) for x in (q, grad, grad_out))
            k_seen, v_seen = _seen(block, k), _seen(block, v)
            weights = _Attention.weights(of_q, k_seen, block.bias, ctx.scaling)
            ds = (g.float() @ v_seen.float().transpose(-1, -2)).sub_(g_out).mul_(weights).to(q.dtype)
            dq[:, :, block.queries] = (ds @ k_seen).mul_(ctx.scaling).view(R, heads, -1, D)
            for total, of_block in (
                (dk, ds.transpose(-1, -2) @ of_q),
                (dv, weights.to(g.dtype).transpose(-1, -2) @ g),
            ):
                of_block = of_block.view(R, kv_heads, -1, D)
                if isinstance(block.keys, slice):
                    total[:, :, block.keys] += of_block
                else:
                    total.index_add_(2, block.keys, of_block.float())
        return dq, dk.mul_(ctx.scaling).to(k.dtype), dv.to(v.dtype), None, None


def _of_block(block: Block, x: Tensor, kv_heads: int) -> Tensor:
    """(R, heads, n, D) -> (R kv, group queries, D): the heads of a key head one after the other, so no key is
    copied."""
    x = x[:, :, block.queries]
    return x.reshape(len(x) * kv_heads, -1, x.shape[-1])


def _seen(block: Block, x: Tensor) -> Tensor:
    """(R, kv heads, K, D) -> (R kv, keys, D)."""
    x = x[:, :, block.keys] if isinstance(block.keys, slice) else x.index_select(2, block.keys)
    return x.flatten(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, all_blocks: list[Block], scaling: float) -> Tensor:
    """q (R, heads, n, D), k and v (R, kv heads, K, D) -> (R, n, heads, D). The blocks have every query
    once."""
    return _Attention.apply(q, k, v, all_blocks, scaling)

"""Attention in blocks against softmax(scaling q k^T) v written out in float64: values and gradients."""

import numpy as np
import pytest
import torch

from fast import attention

R, KV_HEADS, GROUP, N, K, D = 3, 2, 3, 11, 17, 8
SCALING, CPU = 0.3, "cpu"


def forest(rng, n, K):
    """Each of n queries sees itself and what some earlier query sees, or else the first K - n keys."""
    visible = np.zeros((n, K), bool)
    for i in range(n):
        visible[i] = visible[rng.integers(i)] if i and rng.random() < 0.7 else np.arange(K) < K - n
        visible[i, K - n + i] = True
    return visible


def masks():
    rng = np.random.default_rng(0)
    apart = np.zeros((1, N, K), bool)
    for shift in (0, K - N):  # every query sees two keys: blocks of indices, not slices
        apart[0, range(N), range(shift, N + shift)] = True
    return {
        "causal, one for all rows": np.tri(N, K, K - N, bool)[None],
        "a tree for each row": np.stack([forest(rng, N, K) for _ in range(R)]),
        "two keys each": apart,
        "any": rng.random((R, N, K)) < 0.3,
    }


def inputs(dtype=torch.float32, heads=KV_HEADS * GROUP, n=N):
    generator = torch.Generator().manual_seed(1)
    shapes = (R, heads, n, D), (R, KV_HEADS, K, D), (R, KV_HEADS, K, D), (R, n, heads, D)
    q, k, v, g = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], g


def definition(q, k, v, visible):
    q, k, v = q.double(), *(x.double().repeat_interleave(GROUP, 1) for x in (k, v))
    scores = SCALING * torch.einsum("rhnd,rhkd->rhnk", q, k)
    weights = scores.masked_fill(~torch.tensor(visible)[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rhnk,rhkd->rnhd", weights, v)


def errors(q, k, v, g, visible):
    """Those of the output and of the three gradients, relative to the largest number of each."""
    in_blocks = attention.attention(q, k, v, attention.blocks(visible, CPU), SCALING)
    results = []
    for out in (in_blocks, definition(q, k, v, visible)):
        grads = torch.autograd.grad(out, (q, k, v), g.to(out.dtype))
        results.append([x.detach().double() for x in (out, *grads)])
    assert all(b.abs().max() > 0.1 for b in results[1])
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("queries", [1, 4, 128])
def test_values_and_gradients(monkeypatch, name, queries):
    visible = masks()[name]
    visible[..., 0] |= ~visible.any(-1)  # each sees one at least
    monkeypatch.setattr(attention, "QUERIES", queries)
    (q, k, v), g = inputs()
    assert max(errors(q, k, v, g, visible)) < 3e-6


def test_in_bf16_scores_and_sums_are_those_of_fp32(monkeypatch):
    """Inputs and results are rounded, and the weights once: errors of a few roundings, also over many blocks,
    and also where a score is about 20, which bf16 would round by up to 0.06."""
    monkeypatch.setattr(attention, "QUERIES", 2)
    visible = masks()["a tree for each row"]
    for size in (1, 8):
        (q, k, v), g = inputs(torch.bfloat16)
        with torch.no_grad():
            q.mul_(size)
        out, *gradients = errors(q, k, v, g, visible)
        assert 1e-4 < out < 2**-7 and max(gradients) < 2**-6


def test_every_query_is_in_one_block_which_has_few_keys_that_none_of_its_queries_sees(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    for name, visible in masks().items():
        blocks = attention.blocks(visible, CPU, first=5)
        assert [i for b in blocks for i in range(N + 5)[b.queries]] == list(range(5, N + 5)), name
        for b in blocks:
            part = visible[:, b.queries.start - 5 : b.queries.stop - 5]
            keys = np.arange(K)[b.keys]
            assert part[:, :, np.setdiff1d(np.arange(K), keys)].sum() == 0
            assert (b.bias[:, 0] == 0).tolist() == part[:, :, keys].tolist()
            assert set(b.bias.unique().tolist()) <= {0, -torch.inf}
            wasted = ~part[:, :, keys].any((0, 1))
            assert not wasted.any() if torch.is_tensor(b.keys) else wasted.mean() < 0.25
    blocks = attention.blocks(masks()["two keys each"], CPU)
    assert [type(b.keys) for b in blocks] == [slice, torch.Tensor, torch.Tensor]
    assert [b.bias.numel() for b in blocks] == [4 * 10, 4 * 8, 3 * 6]


def test_no_query_no_block():
    assert attention.blocks(np.zeros((1, 0, 0), bool), CPU) == []
    (q, k, v), _ = inputs(n=0)
    assert attention.attention(q, k, v, [], SCALING).shape == (R, 0, KV_HEADS * GROUP, D)

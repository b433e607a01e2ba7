"""Trees of tokens by hand: what is read, what is scored, what is stored. That the numbers are right is tested
in test_engine.py."""

from argparse import Namespace

import pytest
import torch
from reference import END, PROMPTS, assert_close, difference, engine, gradients, score, uniforms
from torch.nn import functional as F

from fast.shared_prefix import Pass, common_beginning, pack


@pytest.fixture(scope="module")
def fast(model_dir):
    return engine("fast", model_dir)


@pytest.fixture(scope="module")
def plain(model_dir):
    return engine("plain", model_dir)


def test_a_group_by_hand():
    """Replies that begin alike share tokens, nobody's last token is read, and the lists are copies."""
    prompt, replies = [5, 6, 7], [[10, 11, END], [12], [10, 13, 14], [10, 11, END]]
    (row,) = pack([prompt], [replies])
    assert row.ids == [5, 6, 7, 10, 11, 13]
    assert row.parents == [-1, 0, 1, 2, 3, 3]
    assert row.depths == [0, 1, 2, 3, 4, 4]
    assert row.sources == [2, 3, 4, 2, 2, 3, 5, 2, 3, 4]
    assert row.targets == [10, 11, END, 12, 10, 13, 14, 10, 11, END]
    row.ids[0] = row.ids[3] = row.targets[0] = row.targets[3] = 99
    assert prompt == [5, 6, 7] and replies == [[10, 11, END], [12], [10, 13, 14], [10, 11, END]]


NESTED = [  # of the first, the trunk has 80 81 END too
    ([65, 70, 100, 33], [[90, 91, END], [80, 81, END], [80, 82], [90, 91, END]]),
    ([65, 70, 100, 33, 80, 81, END, 60, 61], [[77, 78, END], [77, 79], [END]]),
    ([65, 70, 100, 34, 80], [[90], [90, 91, END]]),
    ([65, 70, 100, 34], [[80, 92, END]]),
    ([65, 70, 100, 34, 80], [[12, 13]]),  # the same prompt once more
]


def test_prompts_that_go_on_from_each_other_share_a_row():
    rows = pack(*zip(*NESTED, strict=True))
    assert [row.prompts for row in rows] == [[0, 1], [2, 3, 4]]
    for row in rows:
        assert row.targets == [t for i in row.prompts for reply in NESTED[i][1] for t in reply]
        line = {-1: []}  # the tokens up to every node
        for node, (token, parent) in enumerate(zip(row.ids, row.parents, strict=True)):
            assert parent < node
            line[node] = line[parent] + [token]
        assert len({tuple(v) for v in line.values()}) == len(line)  # no token is computed twice
        ends = iter(row.sources)
        for i in row.prompts:
            for reply in NESTED[i][1]:
                assert all(line[next(ends)] == NESTED[i][0] + reply[:t] for t in range(len(reply)))
    assert len(rows[0].ids) == 9 + 2 + 2  # the trunk; 90 91; 77 78


@pytest.mark.parametrize(
    ("groups", "C"),
    [
        ([([1, 2, 3], [[4, 5]])], 0),  # a row alone has nothing to share
        ([([1, 2, 3], [[4, 5]]), ([1, 2, 9], [[4, 5]])], 2),
        ([([1, 2, 3], [[4, 5]]), ([7, 2, 9], [[4, 5]])], 0),
        ([([1, 2, 3], [[4, 5], [6, 7]]), ([1, 2, 3], [[4, 5], [6, 7]])], 3),  # up to where branches leave
        ([([1, 2, 3], [[4]]), ([1, 2, 3], [[5]])], 2),  # every row has a token of its own
        ([([1], [[6, 7]]), ([1, 2, 3, 4], [[4, 5]])], 1),
        (NESTED, 3),
    ],
)
def test_the_beginning_that_rows_have_in_common_is_read_once(fast, plain, groups, C):
    prompts, replies = zip(*groups, strict=True)
    rows = pack(prompts, replies) if groups is NESTED else [pack([p], [r])[0] for p, r in groups]
    assert common_beginning(rows) == C
    tokens = Pass(rows, "cpu", torch.float32)
    assert tokens.ids.numel() == sum(len(row.ids) - C for row in rows) + C
    assert difference(score(fast, prompts, replies), score(plain, prompts, replies)) < 1e-4


KV_HEADS, GROUP, D, SCALING = 2, 3, 8, 0.3
LAYER = Namespace(num_key_value_groups=GROUP)  # what torch's attention asks of the model's layer


def attention_of_each_token(rows, tokens, q, k, v):
    """The definition in float64: a token of a row sees itself and the tokens above it."""
    q, k, v = q[0].double(), *(x[0].double().repeat_interleave(GROUP, 0) for x in (k, v))
    out = torch.zeros_like(q)
    for r, row in enumerate(rows):
        for node in range(len(row.ids)):
            line = [node]
            while row.parents[line[-1]] >= 0:
                line.append(row.parents[line[-1]])
            at, seen = tokens.index(r, line)[0], tokens.index(r, line)
            weights = (SCALING * torch.einsum("hd,hkd->hk", q[:, at], k[:, seen])).softmax(-1)
            out[:, at] = torch.einsum("hk,hkd->hd", weights, v[:, seen])
    return out.transpose(0, 1)[None]


@pytest.mark.parametrize("size", [1, 8])  # of 8 are scores of 20, which bf16 rounds by up to 0.06
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [NESTED, NESTED[:1], NESTED[1:3]])
def test_attention_of_trees_and_its_gradients(groups, dtype, size):
    rows = pack(*zip(*groups, strict=True))
    tokens, generator = Pass(rows, "cpu", dtype), torch.Generator().manual_seed(1)
    shapes = [(1, heads, tokens.ids.numel(), D) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    q, k, v = (x.requires_grad_() for x in (q * size, k, v))
    results = []
    for out in (tokens.attend(LAYER, q, k, v, SCALING), attention_of_each_token(rows, tokens, q, k, v)):
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        results.append([x.detach().double() for x in (out, *torch.autograd.grad(out, (q, k, v), g))])
    assert results[0][0].shape == (1, tokens.ids.numel(), KV_HEADS * GROUP, D)
    out, *of_gradients = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
    assert out < (3e-6 if dtype == torch.float32 else 2**-7)
    assert max(of_gradients) < (3e-6 if dtype == torch.float32 else 2**-5)


def test_a_kernel_that_returns_a_transposed_view(fast, monkeypatch):
    """CUDA's memory-efficient kernel does: values, gradients and samples, also in a session."""
    prompts, calls, kernel = [[7, 8, 9, *p] for p in PROMPTS], [], F.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        calls.append(kwargs.get("is_causal", False))
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    def results():
        logps, session = torch.cat(score(fast, prompts)), fast.session()
        weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
        groups = fast.sample(prompts, uniforms(0, 6, 3, 8))
        for _ in range(2):
            groups += session.sample(prompts, uniforms(0, 6, 1, 4))
        ids = [reply.ids for group in groups for reply in group]
        return logps.detach(), gradients(fast, (weights * logps).sum()), ids

    as_it_is = results()
    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    as_a_view = results()
    assert set(calls) == {True, False}
    assert difference(as_it_is[0], as_a_view[0]) < 1e-5
    assert_close(as_it_is[1], as_a_view[1])
    assert as_it_is[2] == as_a_view[2]

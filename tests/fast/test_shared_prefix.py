"""Trees of tokens by hand: what is read, what is scored, what is stored. That the numbers are right is tested
in test_engine.py."""

import pytest
import torch
from reference import END, PROMPTS, assert_close, difference, engine, gradients, score, uniforms
from torch.nn import functional as F

from fast import shared_prefix
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


def test_attention_by_a_kernel_is_attention_by_products(fast, monkeypatch):
    """Values, gradients and samples, with a common beginning, and in a session: as on a GPU, and on a CPU,
    which decodes by a kernel too. CUDA's memory-efficient kernel returns a transposed view, as this one."""
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

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    score(fast, prompts)
    assert not calls
    by_products = results()
    assert set(calls) == {False}
    monkeypatch.setattr(shared_prefix, "IN_BLOCKS", ())
    by_kernel = results()
    assert set(calls) == {True, False}
    assert difference(by_products[0], by_kernel[0]) < 1e-5
    assert_close(by_products[1], by_kernel[1])
    assert by_products[2] == by_kernel[2]

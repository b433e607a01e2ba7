"""Sampling and scoring against the model's own plain forward passes and transformers' own greedy generate.

The reference never touches the code under test: the model is loaded afresh with its default attention, the adapter is
added to its weights as W + scaling B A, and every reply gets a forward pass of its own, without batch or padding.
"""

import copy
import json
import math
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models import adapters as adapter_files
from run import checkpoint
import experts
import lora
from fast import shared_prefix
from reference import plain_logps, plain_model, take_gradients
from world.draws import Family
from policy import _TargetLogps, load_policy, prepare_cpu, put_adapter
from prompts import PromptStyle
from run.files import InputError
from fast.shared_prefix import History, Pass, common_beginning, pack

END = 2  # <|im_end|> of the tiny tokenizer, which is its padding token too
PROMPTS = [[65, 70, 100, 33, 80], [90, 41], [5, 200, 17, 65, 65, 31, 120, 77, 9, 300, 42]]  # ragged, without END


def add_adapter(policy, seed=1, size=0.05):
    """An adapter as training would leave it: with B = 0 most of these tests could not fail."""
    config = lora.LoRAConfig(4, 8.0, lora.DEFAULT_TARGETS, policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in lora.lora_layers(policy.model).values():
            layer.B.copy_(size * torch.randn(layer.B.shape, generator=generator))
    return config


@pytest.fixture(scope="module")
def ending_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with an end of turn that is likely after PROMPTS[0] and not rare elsewhere."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        others = model.lm_head(hidden).logsumexp(-1)
        model.lm_head.weight[END] = hidden * (others - 1) / hidden.dot(hidden)  # a share of about 1 / (1 + e)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_with_own_head(tiny_model_dir, tmp_path_factory):
    """The tiny model with an output head that is not tied to its embeddings."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.save_pretrained(folder)
    assert not model.config.tie_word_embeddings
    return str(folder)


@pytest.fixture
def policy(ending_model_dir):
    policy = load_policy(str(ending_model_dir))
    add_adapter(policy)
    return policy


def assert_same_gradients(policy, loss, reference_loss):
    loss.backward()
    actual = take_gradients(policy)
    reference_loss.backward()
    expected = take_gradients(policy)
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-3
    assert sum(bool((g.abs() > 1e-3 * largest).any()) for g in expected) > len(expected) / 2
    for a, b in zip(actual, expected):
        assert (a - b).abs().max() <= 1e-4 * largest


def group_row(prompt, replies):
    (row,) = pack([prompt], [replies])
    return row


def conversation_rows(turns):
    """What train_sft makes of (prompt, what was played, label or None)."""
    scored = [(prompt, [label]) for prompt, _, label in turns if label is not None]
    return pack(*zip(*scored))


def flat(groups):
    return [o for group in groups for o in group]


# --- sampling


def test_greedy_equals_the_generate_of_transformers(policy):
    """Ragged prompts in one batch, against generate() of a merged model, one prompt at a time."""
    merged = load_policy(policy.name)
    add_adapter(merged)
    lora.merge(merged.model)
    merged.model.set_attn_implementation("eager")
    groups = policy.sample(PROMPTS, 2, 24, temperature=0)
    for prompt, group in zip(PROMPTS, groups):
        ids = torch.tensor([prompt])
        limits = dict(do_sample=False, max_new_tokens=24, eos_token_id=END, pad_token_id=END)
        out = merged.model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        for o in group:
            assert o.reply_ids == out[0, len(prompt) :].tolist()
    assert len({tuple(o.reply_ids) for o in flat(groups)}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_are_those_of_a_plain_forward_pass(policy, temperature):
    groups = policy.sample(PROMPTS, 4, 12, temperature, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        others = 0.0
        for prompt, group in zip(PROMPTS, groups):
            for o in group:
                assert o.prompt_ids == prompt and len(o.sampled_logps) == len(o.reply_ids)
                expected = plain_logps(model, prompt, o.reply_ids, temperature)
                assert (torch.tensor(o.sampled_logps) - expected).abs().max() < 1e-4
                wrong = plain_logps(model, prompt, o.reply_ids, 1.7 - temperature)
                others = max(others, float((torch.tensor(o.sampled_logps) - wrong).abs().max()))
    assert others > 0.1  # the other temperature would have been seen
    assert len({tuple(o.reply_ids) for o in flat(groups)}) > 6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_sampled_is_scored_alike(policy, temperature):
    """On the first inner step the ratio is 1."""
    groups = policy.sample(PROMPTS, 3, 12, temperature, torch.Generator().manual_seed(4))
    rows = [group_row(p, [o.reply_ids for o in g]) for p, g in zip(PROMPTS, groups)]
    scored = torch.cat(policy.token_logps(rows, temperature)).detach()
    sampled = torch.tensor([v for o in flat(groups) for v in o.sampled_logps])
    assert ((scored - sampled).exp() - 1).abs().max() < 1e-4


def chi_square_excess(counts_V, law_V):
    """(chi^2 - df) / sqrt(2 df) over the tokens that are expected at least 5 times, the rest in one cell."""
    expected_V = counts_V.sum() * law_V
    often = expected_V >= 5
    counts = np.append(counts_V[often], counts_V[~often].sum())
    expected = np.append(expected_V[often], expected_V[~often].sum())
    df = len(counts) - 1
    assert df > 20
    return (((counts - expected) ** 2 / expected).sum() - df) / math.sqrt(2 * df)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_law(policy, temperature):
    """The first token's frequencies, and the second's over all first ones, against the exact laws."""
    prompt, M = PROMPTS[1], 8000
    groups = policy.sample([prompt], M, 2, temperature, torch.Generator().manual_seed(11))
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        first_V = (model(prompt)[-1] / temperature).double().softmax(-1)
        V = len(first_V)
        second_VV = torch.stack([(model([*prompt, v])[-1] / temperature).double().softmax(-1) for v in range(V)])
    not_ended_V = first_V.clone()
    not_ended_V[END] = 0
    second_V = (not_ended_V @ second_VV) / not_ended_V.sum()

    def counts(t):
        return np.bincount([o.reply_ids[t] for o in groups[0] if len(o.reply_ids) > t], minlength=V)

    assert counts(0).sum() == M
    for t, law_V in enumerate((first_V, second_V)):
        law_V = law_V.numpy()
        assert chi_square_excess(counts(t), law_V) < 5
        assert chi_square_excess(counts(t), law_V**0.8 / (law_V**0.8).sum()) > 5  # the bound tells laws apart


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(policy):
    """Each reply has its own row of uniforms: the same rows give the same replies, whatever stands beside them."""
    T = 10
    together = policy.sample(PROMPTS, 2, T, 1.0, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for prompt, group in zip(PROMPTS, together):  # the generator goes on where the prompt before left it
        (alone,) = policy.sample([prompt], 2, T, 1.0, generator)
        for a, b in zip(alone, group):
            assert a.reply_ids == b.reply_ids and a.text == b.text
            assert np.allclose(a.sampled_logps, b.sampled_logps, atol=1e-5)
    assert len({tuple(o.reply_ids) for o in flat(together)}) == 6
    singly = torch.Generator().manual_seed(5)  # and one reply at a time
    for group in together:
        for o in group:
            assert policy.sample([o.prompt_ids], 1, T, 1.0, singly)[0][0].reply_ids == o.reply_ids


def test_sampling_is_fixed_by_its_generator_alone(policy):
    def draw(seed):
        torch.manual_seed(torch.seed())  # the global state must not matter
        return [o.reply_ids for o in flat(policy.sample(PROMPTS, 3, 8, 1.0, torch.Generator().manual_seed(seed)))]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_first_end_of_turn_is_part_of_the_reply(policy):
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == END  # the trap is set
    (group,) = policy.sample(PROMPTS[:1], 200, 8, 1.0, torch.Generator().manual_seed(2))
    ended = [o for o in group if o.ended]
    open_ended = [o for o in group if not o.ended]
    assert any(len(o.reply_ids) == 1 for o in ended) and any(len(o.reply_ids) > 1 for o in ended) and open_ended
    for o in ended:
        assert o.reply_ids.index(END) == len(o.reply_ids) - 1 < 8
        assert o.text == policy.tokenizer.decode(o.reply_ids[:-1]) and "<|im_end|>" not in o.text
    for o in open_ended:  # those that hit the limit
        assert len(o.reply_ids) == 8 and END not in o.reply_ids
        assert o.text == policy.tokenizer.decode(o.reply_ids)
    assert all(len(o.sampled_logps) == len(o.reply_ids) for o in group)
    # the end of turn is scored, though it is the padding token
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        scored = policy.token_logps([group_row(PROMPTS[0], [o.reply_ids for o in ended[:6]])])[0]
        expected = torch.cat([plain_logps(model, PROMPTS[0], o.reply_ids) for o in ended[:6]])
    assert (scored - expected).abs().max() < 1e-4
    assert sum(t == END for t in group_row(PROMPTS[0], [o.reply_ids for o in ended[:6]]).targets) == 6


def test_an_end_of_turn_in_the_prompt_hides_nothing(policy):
    """pad == eos: prompts with the token in the middle, and padded beside longer ones."""
    prompts = [[1, 65, END, 70, 1, 80], [80] * 13]
    groups = policy.sample(prompts, 2, 6, 1.0, torch.Generator().manual_seed(8))
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        rows = [group_row(p, [o.reply_ids for o in g]) for p, g in zip(prompts, groups)]
        for p, g, scored in zip(prompts, groups, policy.token_logps(rows)):
            expected = torch.cat([plain_logps(model, p, o.reply_ids) for o in g])
            assert (torch.tensor([v for o in g for v in o.sampled_logps]) - expected).abs().max() < 1e-4
            assert (scored - expected).abs().max() < 1e-4


def test_a_reply_that_ends_on_the_last_token_has_ended(policy):
    (group,) = policy.sample(PROMPTS[:1], 60, 1, 1.0, torch.Generator().manual_seed(2))
    assert {o.ended for o in group} == {True, False}
    for o in group:
        assert o.ended == (o.reply_ids == [END]) and len(o.reply_ids) == 1
        assert (o.text == "") == o.ended


NESTED_PROMPTS = [PROMPTS[0] + [77, 78, 79], PROMPTS[1], PROMPTS[0], PROMPTS[0] + [77, 12], PROMPTS[0]]


def test_prompts_that_begin_alike_are_read_once_and_sampled_alike(policy, monkeypatch):
    """Also in another order, with ragged groups of prompts: a sample belongs to its prompt and its uniform numbers."""
    read = []
    handle = policy.model.get_decoder().register_forward_pre_hook(lambda m, args: read.append(args[0].numel()))
    groups = policy.sample(NESTED_PROMPTS, 3, 10, 1.0, torch.Generator().manual_seed(5))
    handle.remove()
    assert read[0] == 8 + 7 + 2  # the two longest and the one that is like no other
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        for prompt, group in zip(NESTED_PROMPTS, groups):
            for o in group:
                assert o.prompt_ids == prompt
                expected = plain_logps(model, prompt, o.reply_ids)
                assert (torch.tensor(o.sampled_logps) - expected).abs().max() < 1e-4
    uniforms = torch.rand(5, 3, 10, generator=torch.Generator().manual_seed(5))
    for i, prompt in enumerate(NESTED_PROMPTS):  # the same numbers, one prompt at a time
        monkeypatch.setattr(torch, "rand", lambda *size, generator: uniforms[i : i + 1])
        (alone,) = policy.sample([prompt], 3, 10, 1.0)
        assert [o.reply_ids for o in alone] == [o.reply_ids for o in groups[i]]


def test_a_decoding_step_reads_one_token_for_what_differs_and_goes_on(policy):
    """Replies to one prompt that have said the same so far are one, and those that have ended are none."""
    read, policy.end_ids = [], list(range(60))
    handle = policy.model.get_decoder().register_forward_pre_hook(lambda m, args: read.append(args[0].numel()))
    groups = policy.sample(PROMPTS, 20, 8, 1.0, torch.Generator().manual_seed(1))
    handle.remove()
    assert read[0] == sum(map(len, PROMPTS))
    going = [
        {(i, *o.reply_ids[:t]) for i, group in enumerate(groups) for o in group if len(o.reply_ids) > t}
        for t in range(1, max(len(o.reply_ids) for o in flat(groups)))
    ]
    assert read[1:] == [len(different) for different in going]
    assert read[1] < sum(len(o.reply_ids) > 1 for o in flat(groups)) and min(read[1:]) < max(read[1:])


def test_replies_that_part_late_keep_what_they_had_in_common(policy):
    """At a low temperature replies part after several tokens; from there each goes on from a copy of the same past."""
    groups = policy.sample(NESTED_PROMPTS, 30, 12, 0.35, torch.Generator().manual_seed(3))
    parted_late = 0
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        for prompt, group in zip(NESTED_PROMPTS, groups):
            different = {tuple(o.reply_ids): o for o in group}
            for ids, o in different.items():
                expected = plain_logps(model, prompt, o.reply_ids, 0.35)
                assert (torch.tensor(o.sampled_logps) - expected).abs().max() < 3e-4  # logits / 0.35
                parted_late += any(ids[:5] == other[:5] and ids[:9] != other[:9] for other in different)
    assert parted_late >= 5


def test_sampling_leaves_the_model_as_it_was(policy):
    state = {name: p.clone() for name, p in policy.model.named_parameters()}
    policy.sample(PROMPTS, 2, 3, 1.0, torch.Generator().manual_seed(1))
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, state[name])


# --- scoring groups


GROUPS = [
    (PROMPTS[0], [[90, 91, END], [77], [30, 31, 32, 33, 34, 35], [90, 91, 92]]),
    (PROMPTS[1], [[END], [12, 13, 14, END]]),
    (PROMPTS[2], [[200, 201, 202, 203, END], [200, 201, 202], [9, END], [8, 7]]),
]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_group_rows_equal_a_forward_pass_per_reply(policy, size, temperature):
    rows = [group_row(p, replies) for p, replies in GROUPS]
    logps = [x for i in range(0, 3, size) for x in policy.token_logps(rows[i : i + size], temperature)]
    model = plain_model(policy.name, policy)
    expected = [torch.cat([plain_logps(model, p, r, temperature) for r in replies]) for p, replies in GROUPS]
    for a, b in zip(logps, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(x), generator=generator) for x in expected]
    losses = [sum((w * x).sum() for w, x in zip(weights, values)) for values in (logps, expected)]
    assert_same_gradients(policy, *losses)


def test_replies_of_a_group_do_not_see_each_other(policy):
    (one,) = policy.token_logps([group_row(PROMPTS[0], [[90, 91, END], [50, 51]])])
    (other,) = policy.token_logps([group_row(PROMPTS[0], [[90, 91, END], [310, 12]])])
    assert torch.allclose(one[:3], other[:3], atol=1e-6) and not torch.allclose(one[3:], other[3:], atol=1e-2)


def test_a_row_scores_reply_tokens_only_and_copies_them():
    prompt, replies = [5, 6, 7], [[10, 11, END], [12], [10, 13, 14], [10, 11, END]]
    row = group_row(prompt, replies)
    assert row.ids == [5, 6, 7, 10, 11, 13]  # replies that begin alike share tokens; nobody's last token is read
    assert row.parents == [-1, 0, 1, 2, 3, 3]
    assert row.positions() == [0, 1, 2, 3, 4, 4]
    assert row.sources == [2, 3, 4, 2, 2, 3, 5, 2, 3, 4]
    assert row.targets == [10, 11, END, 12, 10, 13, 14, 10, 11, END]
    row.ids[0] = row.ids[3] = row.targets[0] = row.targets[3] = 99
    assert prompt == [5, 6, 7] and replies == [[10, 11, END], [12], [10, 13, 14], [10, 11, END]]


NESTED = [
    ([65, 70, 100, 33], [[90, 91, END], [80, 81, END], [80, 82], [90, 91, END]]),  # the trunk goes on with 80 81 END
    ([65, 70, 100, 33, 80, 81, END, 60, 61], [[77, 78, END], [77, 79], [END]]),
    ([65, 70, 100, 34, 80], [[90], [90, 91, END]]),
    ([65, 70, 100, 34], [[80, 92, END]]),
    ([65, 70, 100, 34, 80], [[12, 13]]),  # the same prompt once more
]


def test_prompts_that_go_on_from_each_other_share_a_row():
    rows = pack([p for p, _ in NESTED], [r for _, r in NESTED])
    assert [row.prompts for row in rows] == [[0, 1], [2, 3, 4]]
    for row in rows:
        assert row.targets == [t for i in row.prompts for reply in NESTED[i][1] for t in reply]
        line = {-1: []}  # the tokens up to every node
        for node, (token, parent) in enumerate(zip(row.ids, row.parents)):
            assert parent < node
            line[node] = line[parent] + [token]
        assert len({tuple(v) for v in line.values()}) == len(line)  # no token is computed twice
        ends = iter(row.sources)
        for i in row.prompts:
            for reply in NESTED[i][1]:
                for t in range(len(reply)):
                    assert line[next(ends)] == NESTED[i][0] + reply[:t]
    assert len(rows[0].ids) == 9 + 2 + 1 + 1  # trunk; 90 91; 82 is a last token; 77


@pytest.mark.parametrize("size", [1, 2])
def test_shared_rows_equal_a_forward_pass_per_reply(policy, size):
    rows = pack([p for p, _ in NESTED], [r for _, r in NESTED])
    assert common_beginning(rows) == 3
    logps = torch.cat([x for i in range(0, 2, size) for x in policy.token_logps(rows[i : i + size])])
    model = plain_model(policy.name, policy)
    expected = torch.cat([plain_logps(model, NESTED[i][0], r) for row in rows for i in row.prompts for r in NESTED[i][1]])
    assert (logps - expected).abs().max() < 1e-4
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    assert_same_gradients(policy, (weights * logps).sum(), (weights * expected).sum())


@pytest.mark.parametrize(
    ("rows", "C"),
    [
        ([([1, 2, 3], [[4, 5]])], 0),  # a row alone has nothing to share
        ([([1, 2, 3], [[4, 5]]), ([1, 2, 9], [[4, 5]])], 2),
        ([([1, 2, 3], [[4, 5]]), ([7, 2, 9], [[4, 5]])], 0),
        ([([1, 2, 3], [[4, 5]]), ([1, 2, 3], [[4, 5]])], 3),  # every row keeps a token of its own
        ([([1, 2, 3], [[4, 5], [6, 7]]), ([1, 2, 3], [[4, 5], [6, 7]])], 3),  # up to where branches leave
        ([([1], [[6, 7]]), ([1, 2, 3, 4], [[4, 5]])], 1),
    ],
)
def test_the_beginning_that_rows_have_in_common(policy, rows, C):
    packed = [group_row(*row) for row in rows]
    assert common_beginning(packed) == C
    tokens = Pass(packed, "cpu", torch.float32)
    assert tokens.ids.shape[1] == sum(len(row.ids) - C for row in packed) + C
    model = plain_model(policy.name, policy)
    for (prompt, replies), logps in zip(rows, policy.token_logps(packed)):
        expected = torch.cat([plain_logps(model, prompt, reply) for reply in replies])
        assert (logps - expected).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_vocabulary_is_visited_in_chunks(policy, monkeypatch, chunk):
    rows = [group_row(p, replies) for p, replies in GROUPS]
    whole = torch.cat(policy.token_logps(rows))
    seen = []
    monkeypatch.setattr("policy._TargetLogps.CHUNK", chunk)
    logits = policy._logits
    monkeypatch.setattr(policy, "_logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    again = torch.cat(policy.token_logps(rows))
    pairs = {(r, *pair) for r, row in enumerate(rows) for pair in zip(row.sources, row.targets)}
    assert sum(seen) == len(pairs) < len(whole) and max(seen) <= chunk
    assert (whole - again).abs().max() < 1e-5
    weights = torch.randn(len(whole), generator=torch.Generator().manual_seed(0))
    assert_same_gradients(policy, (weights * again).sum(), (weights * whole).sum())


def test_an_adapter_on_the_head_is_trained_too(model_with_own_head):
    policy = load_policy(model_with_own_head)
    config = lora.LoRAConfig(3, 6.0, ("lm_head", "v_proj"), policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in lora.lora_layers(policy.model).values():
            layer.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    model = plain_model(policy.name, policy)
    rows = [group_row(p, replies) for p, replies in GROUPS]
    expected = torch.cat([plain_logps(model, p, r) for p, replies in GROUPS for r in replies])
    assert_same_gradients(policy, torch.cat(policy.token_logps(rows)).sum(), expected.sum())


def test_scoring_changes_no_row(policy):
    rows = [group_row(p, replies) for p, replies in GROUPS]
    policy.token_logps(rows)[0].sum().backward()
    policy.reference_logps(rows)
    assert rows == [group_row(p, replies) for p, replies in GROUPS]


# --- scoring conversations


def turns_of(labels, prompts=None):
    """Two rounds of two stages; each prompt goes on from the one before and its played reply."""
    played = [[10, 11, 12, END], [20, END], [30, 31, END], [40, 41, END]]
    between = [[65, 70, 100], [80, 81], [90], [77, 78, 79, 80]]
    turns, line = [], []
    for new, reply, label in zip(between, played, labels):
        prompt = line + new
        turns.append((prompt, reply, label))
        line = prompt + reply
    return turns


SAME = [[10, 11, 12, END], [20, END], [30, 31, END], [40, 41, END]]
BRANCHED = [[10, 300, END], [20, END], [201, 202, 203, 204, END], [40, END]]
PARTLY = [None, [21, 22, END], None, [40, 41, END]]


@pytest.mark.parametrize("labels", [SAME, BRANCHED, PARTLY], ids=["no-branches", "branches", "partly-scored"])
def test_conversation_rows_equal_a_forward_pass_per_decision(policy, labels):
    turns = turns_of(labels)
    rows = conversation_rows(turns)
    assert len(rows) == 1  # two rounds, one pass
    scored = [(p, label) for p, _, label in turns if label is not None]
    assert rows[0].targets == [t for _, label in scored for t in label]
    model = plain_model(policy.name, policy)
    expected = torch.cat([plain_logps(model, p, label) for p, label in scored])
    (logps,) = policy.token_logps(rows)
    assert logps.shape == expected.shape and (logps - expected).abs().max() < 1e-4
    assert_same_gradients(policy, -logps.mean(), -expected.mean())


def test_conversations_of_other_lengths_can_share_a_batch(policy):
    rows = conversation_rows(turns_of(BRANCHED)) + conversation_rows(turns_of(SAME)[:1]) + [group_row(*GROUPS[0])]
    alone = [policy.token_logps([row])[0] for row in rows]
    for a, b in zip(policy.token_logps(rows), alone, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_only_reply_tokens_are_scored_row_by_hand():
    """Turn 1: the label 7 2 is a branch beside what was played, 8 2; turn 2 goes on from 8 2 and was played as said."""
    turns = [([5, 6], [8, END], [7, END]), ([5, 6, 8, END, 9], [4, 3, END], [4, 3, END])]
    (row,) = conversation_rows(turns)
    assert row.ids == [5, 6, 8, END, 9, 7, 4, 3]
    assert row.parents == [-1, 0, 1, 2, 3, 1, 4, 6]
    assert row.positions() == [0, 1, 2, 3, 4, 2, 5, 6]
    assert row.sources == [1, 5, 4, 6, 7] and row.targets == [7, END, 4, 3, END]


def test_what_was_played_at_random_is_not_a_target():
    (row,) = conversation_rows(turns_of(BRANCHED))
    assert row.targets == [t for label in BRANCHED for t in label]
    assert 11 not in row.targets and 11 in row.ids and 30 not in row.targets and 30 in row.ids


def test_a_conversation_whose_history_is_rewritten_takes_more_rows(policy):
    turns = turns_of(SAME)
    rewritten = [*turns[:2], ([1, 1, 1, *turns[2][0][5:]], turns[2][1], turns[2][2])]
    rows = conversation_rows(rewritten)
    assert len(rows) == 2
    model = plain_model(policy.name, policy)
    expected = [plain_logps(model, p, label) for p, _, label in rewritten]
    expected = torch.cat([expected[i] for row in rows for i in row.prompts])
    assert (torch.cat(policy.token_logps(rows)) - expected).abs().max() < 1e-4


def test_conversation_rows_leave_the_turns_as_they_were():
    turns = turns_of(BRANCHED)
    (row,) = conversation_rows(turns)
    for i in range(len(row.targets)):
        row.targets[i] = 399
    row.ids[:] = [399] * len(row.ids)
    assert turns == turns_of(BRANCHED)


# --- pi_ref


@pytest.mark.parametrize("dtype, size", [(torch.float32, 0.05), (torch.bfloat16, 0.05), (torch.bfloat16, 0.002)])
def test_after_the_merge_adapter_off_is_the_sft_policy(ending_model_dir, dtype, size):
    """Also in bf16 after an SFT of small steps, which W + BA in bf16 would not keep."""
    rows = [group_row(p, replies) for p, replies in GROUPS]
    policy = load_policy(str(ending_model_dir), dtype=dtype)
    base = torch.cat(policy.token_logps(rows)).detach()
    add_adapter(policy, size=size)
    sft = torch.cat(policy.token_logps(rows)).detach()
    lora.merge(policy.model)
    config = lora.LoRAConfig(3, 6.0, lora.DEFAULT_TARGETS, policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(9))

    reference, now = torch.cat(policy.reference_logps(rows)), torch.cat(policy.token_logps(rows))
    assert torch.equal(reference, now.detach())  # so KL(pi, pi_ref) is exactly 0 at step 0
    assert (reference - sft).abs().max() < 1e-4
    assert (reference - base).abs().max() > 2 * size
    assert not reference.requires_grad and now.requires_grad

    with torch.no_grad():  # a trained adapter moves pi and not pi_ref
        for layer in lora.lora_layers(policy.model).values():
            layer.B.fill_(0.05)
    assert torch.equal(torch.cat(policy.reference_logps(rows)), reference)
    assert (torch.cat(policy.token_logps(rows)) - reference).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_has_the_same_temperature(policy, temperature):
    rows = [group_row(p, replies) for p, replies in GROUPS]
    base = load_policy(policy.name)
    base.model.requires_grad_(False)
    expected = torch.cat(base.token_logps(rows, temperature))
    assert torch.equal(torch.cat(policy.reference_logps(rows, temperature)), expected)


def test_there_is_no_dropout(tiny_model_dir, tmp_path):
    """Even where the model's config asks for it: what is sampled is what is scored."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    policy = load_policy(str(folder))
    add_adapter(policy)
    assert policy.model.config.attention_dropout == 0.5
    rows = [group_row(*GROUPS[0])]
    a, b = (policy.token_logps(rows)[0].detach() for _ in range(2))
    assert torch.equal(a, b)
    (group,) = policy.sample([PROMPTS[0]], 4, 6, 1.0, torch.Generator().manual_seed(0))
    (scored,) = policy.token_logps([group_row(PROMPTS[0], [o.reply_ids for o in group])])
    assert (scored - torch.tensor([v for o in group for v in o.sampled_logps])).abs().max() < 1e-4


def test_put_adapter_gives_the_saved_policy(policy, tmp_path):
    rows = [group_row(p, replies) for p, replies in GROUPS]
    adapter_files.save_adapter(policy.model, tmp_path / "adapter", lora.LoRAConfig(4, 8.0, lora.DEFAULT_TARGETS, policy.name))
    loaded = load_policy(policy.name)
    put_adapter(loaded, str(tmp_path / "adapter"))
    assert torch.equal(torch.cat(loaded.token_logps(rows)), torch.cat(policy.token_logps(rows)))


# --- limits, text and tokens


def one_line_error(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value)
    return str(error.value)


def test_a_prompt_longer_than_the_context_is_an_input_error(tiny_model_dir, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    policy = load_policy(str(folder))
    generator = torch.Generator().manual_seed(0)
    assert len(policy.sample([[65] * 10, [65]], 1, 6, 1.0, generator)) == 2  # 16 tokens fit
    message = one_line_error(lambda: policy.sample([[65], [65] * 11], 1, 6, 1.0, generator))
    assert "11" in message and "16" in message
    one_line_error(lambda: policy.token_logps([group_row([65] * 14, [[1, 2, 3, 4]])]))
    assert policy.token_logps([group_row([65] * 10, [[1, 2, 3, 4, 5, 6]] * 3)])[0].shape == (18,)  # a row may be longer


@pytest.fixture(scope="module")
def records():
    return experts.simulate_many(2, "second-best", 0, PromptStyle(), (3, 3), families=(Family("bcz", "GE", 2),), noise=0.5)


def test_a_prompt_and_its_reply_are_a_prefix_of_the_next_prompt(policy, records):
    """What play appends token by token is what the chat template makes of the whole conversation."""
    lines = {}
    for r in records:
        prompt, reply = policy.encode_prompt(r.prompt), policy.encode_reply(r.reply)
        assert prompt[: len(lines.get((r.game, r.seat), []))] == lines.get((r.game, r.seat), [])
        lines[r.game, r.seat] = prompt + reply
        text = policy.tokenizer.apply_chat_template(r.prompt, add_generation_prompt=True, tokenize=False)
        assert policy.tokenizer.decode(prompt) == text
        answered = [*r.prompt, {"role": "assistant", "content": r.reply}]
        whole = policy.tokenizer.apply_chat_template(answered, tokenize=False)
        assert whole.startswith(policy.tokenizer.decode(prompt + reply))
    assert len(records) == 2 * 2 * 2 * 3 and len(lines) == 6


def test_encoded_replies_end_their_turn_and_read_back(policy, records):
    for r in records:
        ids = policy.encode_reply(r.label)
        assert ids[-1] == END and END not in ids[:-1]
        assert policy.tokenizer.decode(ids[:-1]) == r.label


def test_a_whole_game_is_one_row_and_equals_plain_forward_passes(policy, records):
    of_seat = [r for r in records if (r.game, r.seat) == (0, 1)]
    encode = policy.encode_reply
    turns = [(policy.encode_prompt(r.prompt), encode(r.reply), encode(r.label)) for r in of_seat]
    rows = conversation_rows(turns)
    assert len(rows) == 1 and len(turns) == 4
    assert any(r.label != r.reply for r in records if r.game == 0)
    with torch.no_grad():
        model = plain_model(policy.name, policy)
        expected = torch.cat([plain_logps(model, p, label) for p, _, label in turns])
        assert (policy.token_logps(rows)[0] - expected).abs().max() < 1e-4


# --- what checkpoints build on


def test_seeded_generators_differ_in_every_number():
    def draw(*numbers):
        return tuple(torch.rand(4, generator=checkpoint.seeded(*numbers)).tolist())

    keys = [(s, p, t) for s in range(3) for p in range(3) for t in range(3)]
    assert len({draw(*k) for k in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 7), (4, 4), (1, 2)])
def test_shuffled_goes_through_everything_once_an_epoch(count, size):
    steps = 3 * count  # that is 3 * size epochs
    indices = [i for step in range(steps) for i in checkpoint.shuffled(count, size, step, 0, 2)]
    epochs = [indices[k : k + count] for k in range(0, len(indices), count)]
    assert len(epochs) == 3 * size and all(sorted(e) == list(range(count)) for e in epochs)
    if count == 7:
        assert len({tuple(e) for e in epochs}) > 1
        assert indices != [i for step in range(steps) for i in checkpoint.shuffled(count, size, step, 1, 2)]


def test_a_row_is_a_record_of_positions_not_of_token_values():
    """The same rows for a prompt and replies that are nothing but the padding token."""
    row = group_row([END, END], [[END, END], [END]])
    assert (row.ids, row.parents) == ([END] * 3, [-1, 0, 1])
    assert (row.sources, row.targets) == ([1, 2, 1], [END] * 3)


# --- conversations whose keys and values are kept


def test_a_kept_history_samples_what_a_fresh_reading_samples(policy):
    """Four decisions of ragged conversations, some of which end before others. The next prompt goes on from the reply,
    or says something else than was sampled (at its third token, at its last, from the beginning), as text that is
    tokenised anew may."""
    rng = random.Random(0)
    prompts, history, read, lengths = [list(p) for p in PROMPTS], History(), [], []
    forward, end_ids = policy._hidden, policy.end_ids
    policy.end_ids = list(range(0, 300, 4))
    policy._hidden = lambda ids, positions, tokens: read.append(ids.numel()) or forward(ids, positions, tokens)
    try:
        for stage in range(4):
            read.clear()
            kept = policy.sample(prompts, 1, 6, 1.0, torch.Generator().manual_seed(stage), history)
            new_tokens = read[0]
            lengths.append([len(group[0].reply_ids) for group in kept])
            fresh = policy.sample(prompts, 1, 6, 1.0, torch.Generator().manual_seed(stage))
            for (a,), (b,) in zip(kept, fresh):
                assert a.reply_ids == b.reply_ids
                assert torch.tensor(a.sampled_logps) == pytest.approx(torch.tensor(b.sampled_logps), abs=1e-4)
            if stage:
                assert new_tokens == sum(len(p) - n for p, n in zip(prompts, shared))
            before = [p + group[0].reply_ids for p, group in zip(prompts, kept)]
            prompts = [ids + [rng.randrange(10, 200) for _ in range(rng.randrange(1, 5))] for ids in before]
            changed = [None, 2, -1, 0][stage]
            if changed is not None:
                at = changed % len(before[0])
                prompts[0][at] = 201 if prompts[0][at] != 201 else 202
            read_before = [ids[:-1] for ids in before]  # the last token of a reply was not read
            shared = [len(os.path.commonprefix([a, b])) for a, b in zip(read_before, prompts)]
    finally:
        policy._hidden, policy.end_ids = forward, end_ids
    assert min(shared) == 0 < max(shared)
    assert any(1 < a < b for of_stage in lengths for a, b in zip(of_stage, of_stage[1:]))  # an earlier one ended first


def test_a_prompt_that_was_read_whole_before_is_asked_again(policy):
    history = History()
    first = policy.sample(PROMPTS, 1, 4, 0.0, history=history)
    again = policy.sample(PROMPTS, 1, 4, 0.0, history=history)
    assert [g[0].reply_ids for g in first] == [g[0].reply_ids for g in again]


# --- what only other devices show


def test_attention_by_a_kernel_is_attention_by_products(policy, monkeypatch):
    """Values and gradients, with prompts that have a common beginning, and in decoding."""
    begun = [([7, 8, 9, *p], replies) for p, replies in GROUPS]
    rows = [group_row(p, replies) for p, replies in begun]
    by_products = torch.cat(policy.token_logps(rows))
    sampled = policy.sample([p for p, _ in begun], 3, 8, 1.0, torch.Generator().manual_seed(0))
    called, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        called.append(kwargs.get("is_causal", False))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    torch.cat(policy.token_logps(rows))
    assert not called
    monkeypatch.setattr(shared_prefix, "IN_BLOCKS", ())
    by_kernel = torch.cat(policy.token_logps(rows))
    assert set(called) == {True, False}
    assert (by_products - by_kernel).abs().max() < 1e-5
    weights = torch.randn(len(by_kernel), generator=torch.Generator().manual_seed(1))
    assert_same_gradients(policy, (weights * by_products).sum(), (weights * by_kernel).sum())
    again = policy.sample([p for p, _ in begun], 3, 8, 1.0, torch.Generator().manual_seed(0))
    assert [o.reply_ids for g in sampled for o in g] == [o.reply_ids for g in again for o in g]


def test_attention_kernels_may_return_another_memory_layout(policy, monkeypatch):
    """CUDA's memory-efficient attention returns a transposed view."""
    monkeypatch.setattr(shared_prefix, "IN_BLOCKS", ())
    rows = [group_row(p, replies) for p, replies in GROUPS]
    expected = torch.cat(policy.token_logps(rows))
    kernel = torch.nn.functional.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", transposed)
    assert torch.equal(torch.cat(policy.token_logps(rows)), expected)


@pytest.mark.parametrize("margin", [1.0, 4.0, 8.0])
def test_gradient_of_a_confident_token_in_bf16(margin):
    """W_y - sum_v pi_v W_v of two rounded vectors would be all noise where pi_y is near 1, as it is after SFT."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(500, 64, generator=generator))
    head.requires_grad_(False)
    targets = torch.randint(500, (40,), generator=generator)
    h = 0.05 * torch.randn(40, 64, generator=generator) + head.weight[targets] * (5 + margin) / 64
    head, h = head.bfloat16(), h.bfloat16()

    def gradient(head, h, dtype):
        h = h.to(dtype).requires_grad_()
        head = head.to(dtype)
        _TargetLogps.apply(h, targets, head, head.weight, 1.0, True).sum().backward()
        return h.grad.float()

    exact, got = gradient(copy.deepcopy(head), h, torch.float32), gradient(head, h, torch.bfloat16)
    error = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.05


# --- precision


def test_logits_of_a_bf16_model_are_in_fp32(model_dir):
    """And follow the head's weights."""
    policy = load_policy(model_dir, dtype=torch.bfloat16)
    head, hidden = policy._head(), torch.randn(5, 64).bfloat16()
    for _ in range(2):
        logits = policy._logits(hidden)
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
        assert (logits - hidden.float() @ head.weight.float().T).abs().max() < 1e-4
        with torch.no_grad():
            head.weight.mul_(2)


def test_bf16_samples_and_scores_nearly_the_law_of_fp32(model_dir):
    """Sampling and scoring differ by rounding alone, and so does the law from that of fp32 on the same weights."""
    half, full = load_policy(model_dir, dtype=torch.bfloat16), load_policy(model_dir)
    full.model.load_state_dict({name: p.float() for name, p in half.model.state_dict().items()})
    add_adapter(half), add_adapter(full)
    groups = half.sample(PROMPTS, 6, 12, 1.0, torch.Generator().manual_seed(3))
    rows = pack(PROMPTS, [[o.reply_ids for o in group] for group in groups])
    sampled = torch.tensor([v for row in rows for i in row.prompts for o in groups[i] for v in o.sampled_logps])
    scored, exact = (torch.cat(policy.token_logps(rows)).detach() for policy in (half, full))
    assert len(sampled) > 100 and sampled.std() > 0.5
    for other in (sampled, exact):
        assert (scored - other).abs().mean() < 0.04


def test_a_cpu_is_prepared_without_loss_of_precision():
    prepare_cpu()
    a = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double().T
    assert (a @ a.T - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux alone")
def test_products_that_would_be_rounded_to_bf16_are_not_used(monkeypatch):
    """A CPU that is said to be AMD's and rounds inside, as one with AMX would."""
    settings = torch.backends.mkldnn.matmul
    before, exact = settings.fp32_precision, torch.Tensor.__matmul__

    def product(a, b):
        rounds = rounding and settings.fp32_precision == "bf16" and a.dtype == torch.float32
        a, b = (x.bfloat16() if rounds else x for x in (a, b))
        return exact(a.double(), b.double()).float()

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC", "avx512_f": True}, raising=False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    try:
        for rounding, left in ((False, "bf16"), (True, "ieee")):
            prepare_cpu()
            assert settings.fp32_precision == left
    finally:
        settings.fp32_precision = before

"""The fast engine against the plain one, which defines what it must say: the same model, adapter, uniform numbers."""

import copy
import random
import statistics

import pytest
import torch
from reference import (
    END,
    ENGINES,
    PROMPTS,
    REPLIES,
    add_adapter,
    assert_close_gradients,
    difference,
    engine,
    gradients,
    score,
)
from tiny import make_tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

import lora
import tompo
from fast import engine as fast_engine
from fast.engine import FastPolicy
from fast.lora_products import JointLoRALinear
from models import adapters
from models.load import load_policy, put_adapter
from policy import Policy
from run.files import InputError

TOKENIZER = make_tiny_tokenizer()
SHAPE = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(initializer_range=0.2, eos_token_id=END, pad_token_id=END, bos_token_id=1)
MODELS = {
    "two heads of a key head, tied": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "one key head": LlamaConfig(**SHAPE, num_key_value_heads=1, head_dim=24),
    "a key head each, biases": Qwen2Config(**SHAPE, num_key_value_heads=4),
}


def pair(model="two heads of a key head, tied", dtype=torch.float32, adapter=True, **targets):
    """The fast and the plain engine on two copies of a random model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = copy.deepcopy(MODELS.get(model, model))
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # 0 at first
                torch.nn.init.normal_(p, std=0.5)
    copies = model, AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)
    copies[1].load_state_dict(model.state_dict())
    policies = [
        policy_class(m, TOKENIZER, "tiny", (END,)) for policy_class, m in zip((FastPolicy, Policy), copies)
    ]
    for policy in policies if adapter else ():
        add_adapter(policy, **targets)
    return policies


def seed(number):
    return torch.Generator().manual_seed(number)


def assert_same_samples(fast, plain, tolerance=1e-4):
    """Tokens, text, end, and the log-probabilities within the tolerance. Returns the replies."""
    for of_fast, of_plain in zip(fast, plain, strict=True):
        for a, b in zip(of_fast, of_plain, strict=True):
            assert (a.prompt_ids, a.reply_ids, a.text, a.ended) == (
                b.prompt_ids,
                b.reply_ids,
                b.text,
                b.ended,
            )
            assert a.sampled_logps == pytest.approx(b.sampled_logps, abs=tolerance)
    return [[o.reply_ids for o in group] for group in fast]


# --- sampling


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [0, 0.3, 0.7, 1.0, 1.3])
def test_the_same_uniform_numbers_draw_the_same_replies(model, temperature):
    """To prompts that begin alike, with ends at different steps; replies of a low temperature part late."""
    policies = pair(model)
    for policy in policies:
        policy.end_ids = (END, *range(3, 400, 13))
    for M, limit in ((7, 12), (1, 20), (3, 1)):
        replies = assert_same_samples(*(p.sample(PROMPTS, M, limit, temperature, seed(M)) for p in policies))
        if M == 7 and temperature:
            assert len({len(reply) for group in replies for reply in group}) > 5


def test_some_prompts_with_a_generator_each_are_sampled_alike():
    policies = pair()
    for only in (None, [4, 0, 2], [3], []):
        drawn = [p.sample(PROMPTS, 3, 9, 0.7, [seed(i) for i in range(6)], only=only) for p in policies]
        replies = assert_same_samples(*drawn)
        assert len({tuple(reply) for group in replies for reply in group}) == 3 * len(only or range(6)) * (
            only != []
        )


def test_a_kept_history_says_what_a_fresh_reading_says():
    """Four decisions of conversations, some of which end before others, with and without some of the prompts. The next
    prompt goes on from the reply, or says something else than was sampled, as text that is tokenised anew may."""
    rng, (fast, plain), only = random.Random(0), pair(), [4, 1, 3]
    fast.end_ids = plain.end_ids = (END, *range(0, 300, 4))
    histories = fast.new_history(), fast.new_history()
    prompts = [list(p) for p in PROMPTS]
    for stage, changed in enumerate([None, 2, -1, 0]):
        expected = plain.sample(prompts, 1, 6, 1.0, seed(stage))
        assert_same_samples(fast.sample(prompts, 1, 6, 1.0, seed(stage), histories[0]), expected)
        some = fast.sample(prompts, 1, 6, 1.0, seed(stage), histories[1], only)
        assert_same_samples(some, [expected[i] for i in only])
        if stage:  # nobody can have read the last token of a reply
            known = [histories[0].known(r, prompt) for r, prompt in enumerate(prompts)]
        prompts = [
            p + group[0].reply_ids + [rng.randrange(10, 200)] * rng.randrange(1, 5)
            for p, group in zip(prompts, expected)
        ]
        if changed is not None:
            prompts[1][changed] = 201 if prompts[1][changed] != 201 else 202
    assert known
    asked_again = [fast.sample(prompts, 1, 4, 0.0, history=histories[0]) for _ in range(2)]
    assert_same_samples(*asked_again)
    assert_same_samples(asked_again[0], plain.sample(prompts, 1, 4, 0.0))


# --- scoring


def objective(policy, micro_batch, old, reference, temperature):
    """The loss of RFT over groups with advantages of both signs and old log-probabilities that are partly clipped, pass by
    pass; the gradient is added up in the policy's adapter."""
    rows, loss = policy.pack(PROMPTS, REPLIES), 0.0
    for start in range(0, len(rows), micro_batch):
        part = rows[start : start + micro_batch]
        of_part = [i for row in part for i in row.prompts]
        logps = torch.cat(policy.token_logps(part, temperature))
        advantages = [(-1.0) ** k * (i + 1) for i in of_part for k, r in enumerate(REPLIES[i]) for _ in r]
        given = torch.cat([old[i] for i in of_part]), torch.cat([reference[i] for i in of_part])
        weights = torch.full_like(logps, 1 / 50)
        part_loss, _ = tompo.objective_loss(logps, *given, torch.tensor(advantages), weights, beta=0.1)
        part_loss.backward()
        loss += part_loss.item()
    grads = [p.grad for p in lora.lora_parameters(policy.model)]
    policy.model.zero_grad(set_to_none=True)
    return loss, grads


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_reference_and_gradients_are_the_same(model, temperature):
    """Of ragged groups, for every cut into passes."""
    fast, plain = pair(model)
    expected, off = (score(plain, temperature=temperature, reference=r) for r in (False, True))
    old = [x.detach() + 0.5 * torch.randn(len(x), generator=seed(i)) for i, x in enumerate(expected)]
    loss, expected_gradients = objective(plain, 1, old, off, temperature)
    assert difference(expected, off) > 0.1
    for size in (1, 2, 100):
        cut = dict(temperature=temperature, micro_batch=size)
        assert difference(score(fast, **cut), expected) < 1e-4
        assert difference(score(fast, **cut, reference=True), off) < 1e-4
        for policy in (fast, plain):
            of_policy, found = objective(policy, size, old, off, temperature)
            assert of_policy == pytest.approx(loss, abs=1e-5)
            assert_close_gradients(found, expected_gradients)


def test_an_adapter_on_the_head_is_trained_too():
    fast, plain = pair("one key head", targets=("lm_head", "v_proj"))
    assert difference(score(fast), score(plain)) < 1e-4
    weights = torch.randn(sum(len(x) for x in score(plain)), generator=seed(0))
    assert_close_gradients(*(gradients(p, (weights * torch.cat(score(p))).sum()) for p in (fast, plain)))
    assert_same_samples(*(p.sample(PROMPTS, 3, 6, 1.0, seed(0)) for p in (fast, plain)))


def test_all_linear_leaves_the_head_out():
    for policy in pair("one key head", adapter=False):
        add_adapter(policy, targets="all-linear")
        assert len(lora.lora_layers(policy.model)) == 14


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_vocabulary_is_visited_in_chunks_and_once_for_what_is_alike(monkeypatch, chunk):
    fast, plain = pair()
    rows, seen, logits = fast.pack(PROMPTS, REPLIES), [], fast._logits
    monkeypatch.setattr(fast_engine._TargetLogps, "CHUNK", chunk)
    monkeypatch.setattr(fast, "_logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    again, whole = torch.cat(score(fast)), torch.cat(score(plain))
    different = {(r, *p) for r, row in enumerate(rows) for p in zip(row.sources, row.targets)}
    assert sum(seen) == len(different) < len(whole) and max(seen) <= chunk
    weights = torch.randn(len(whole), generator=seed(0))
    assert difference(again, whole) < 1e-4
    assert_close_gradients(
        gradients(fast, (weights * again).sum()), gradients(plain, (weights * whole).sum())
    )


# --- adapters that are merged


@pytest.mark.parametrize("dtype, logps, grads", [("float32", 1e-4, 1e-3), ("bfloat16", 0.3, 0.06)])
def test_a_chain_that_is_merged_under_a_new_adapter(model_dir, tmp_path, dtype, logps, grads):
    """Written by one engine, read by the other, to the end of the chain; the reference is the chain in both."""
    names, others = "ab", dict(fast="plain", plain="fast")
    for k, name in enumerate(names):
        writer = load_policy(model_dir, dtype, engine=ENGINES[k])
        if k:
            put_adapter(writer, str(tmp_path / "a"))
            lora.merge(writer.model)
        config = add_adapter(writer, seed=k, r=3 + k)
        adapters.save_adapter(writer.model, tmp_path / name, config)
    policies = [load_policy(model_dir, dtype, engine=name) for name in ENGINES]
    before = score(policies[1])
    for policy in policies:
        put_adapter(policy, f"{tmp_path / 'a'}+{tmp_path / 'b'}")
    chain = score(policies[1])
    assert difference(score(policies[0]), chain) < logps and difference(chain, before) > 5 * 0.3
    for policy in policies:
        lora.merge(policy.model)
        add_adapter(policy, seed=7)
        assert difference(score(policy, reference=True), chain) < logps
    fast, plain = (torch.cat(score(policy)) for policy in policies)
    assert difference(fast, plain) < logps < difference(plain, chain)
    weights = torch.randn(len(plain), generator=seed(0))
    found = [gradients(policy, (weights * x).sum()) for policy, x in zip(policies, (fast, plain))]
    assert_close_gradients(*found, grads)
    assert others

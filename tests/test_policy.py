"""What both engines promise, each by itself; that they compute the same is tested in tests/fast.

The plain engine defines the other, so both are compared here with code that shares no line with them:
transformers' forward pass without a cache, one for each reply and one for each sampled token, on weights
W + scaling B A, and the inverse of the cumulative distribution by hand.
"""

import math
from itertools import accumulate

import pytest
import torch
from reference import (
    END,
    ENGINES,
    PROMPTS,
    REPLIES,
    add_adapter,
    assert_close,
    difference,
    engine,
    gradients,
    ids_of,
    score,
    uniforms,
)
from tiny import changed_copy
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import lora
from fast.engine import _draw
from models.load import load_policy
from play import dataset
from play.cast import make_expert
from policy import draw
from prompts import PromptStyle
from run.errors import InputError
from world.draws import Family


@pytest.fixture(params=ENGINES)
def policy(request, model_dir):
    return engine(request.param, model_dir)


def transformers_logps(policy):
    """ids, temperature -> log softmax (length, vocabulary) in float64, with gradients for A and B."""
    model = AutoModelForCausalLM.from_pretrained(policy.name).eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, layer in lora.lora_layers(policy.model).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.scaling * layer.B @ layer.A

    def logps(ids, temperature):
        out = functional_call(model, weights, (torch.tensor([ids]),), dict(use_cache=False))
        return (out.logits[0].double() / temperature).log_softmax(-1)

    return logps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_their_gradients_are_those_of_transformers(policy, temperature):
    logps, expected = transformers_logps(policy), []
    for prompt, replies in zip(PROMPTS, REPLIES, strict=True):
        for reply in replies:
            logps_TV = logps(prompt + reply, temperature)[len(prompt) - 1 :]
            expected += [logps_TV[t, token] for t, token in enumerate(reply)]
    scored, expected = torch.cat(score(policy, temperature=temperature)), torch.stack(expected).float()
    assert scored.dtype == torch.float32 and difference(scored, expected) < 1e-4 < expected.std()
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    assert_close(*(gradients(policy, (weights * x).sum()) for x in (scored, expected)))


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_samples_invert_the_distribution_of_transformers_at_the_uniform_numbers(policy, temperature):
    """Token by token; every sixth token ends a reply, so that replies end at different steps. The first is a
    part of its reply. END is the padding token too, and a reply is cut by its place."""
    policy.end_ids, (M, S), logps = (END, *range(3, 400, 6)), (5, 6), transformers_logps(policy)
    uniforms_PMS = uniforms(0, len(PROMPTS), M, S)
    groups = policy.sample(PROMPTS, uniforms_PMS, temperature)
    for prompt, group, uniforms_MS in zip(PROMPTS, groups, uniforms_PMS.tolist(), strict=True):
        for reply, uniforms_S in zip(group, uniforms_MS, strict=True):
            ids, expected = [], []
            while len(ids) < S and not set(ids) & set(policy.end_ids):
                with torch.no_grad():
                    logp_V = logps(prompt + ids, temperature or 1.0)[-1].tolist()
                u, below = uniforms_S[len(ids)], list(accumulate(map(math.exp, logp_V)))
                drawn = next(token for token, share in enumerate(below) if share > u)
                ids.append(drawn if temperature else logp_V.index(max(logp_V)))
                expected.append(logp_V[ids[-1]])
            assert reply.ids == ids and reply.logps == pytest.approx(expected, abs=1e-4)
            assert reply.ended == (ids[-1] in policy.end_ids)
            assert reply.text == policy.tokenizer.decode(ids[:-1] if reply.ended else ids)
    ends = {(len(reply.ids), reply.ended) for group in groups for reply in group}
    assert len(ends) > (5 if temperature else 1) and (S, False) in ends
    assert (S, True) in ends or temperature < 1  # an end may be the last token that is allowed


@pytest.mark.parametrize("name", ENGINES)
def test_a_uniform_number_at_either_end_draws_what_has_a_probability(name):
    """The first and the last tokens of these distributions have probability 0, and neither 0 nor the largest
    number below 1 draws them, though rounding lets the cumulative distribution end beside 1."""
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, 400:] = -200
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < 1 - 2**-24).any()
    for u, first, last in ((0.0, 100, 100), (1 - 2**-24, 380, 399)):
        uniforms_B = torch.full((200,), u)
        if name == "plain":
            tokens, logps = draw(logits, uniforms_B, 1.0)
        else:
            tokens, logps = map(torch.tensor, _draw(logits.clone(), list(range(200)), uniforms_B))
        assert first <= tokens.min() and tokens.max() <= last
        assert difference(logps, logits.log_softmax(-1)[range(200), tokens]) < 1e-5


@pytest.mark.parametrize("dtype, size", [("float32", 0.05), ("bfloat16", 0.05), ("bfloat16", 0.002)])
@pytest.mark.parametrize("name", ENGINES)
def test_after_the_merge_adapter_off_is_the_sft_policy(model_dir, name, dtype, size):
    """Also in bf16 after an SFT of small steps, which W + BA in bf16 would not keep."""
    policy = load_policy(model_dir, dtype, engine=name)
    base = torch.cat(score(policy))
    add_adapter(policy, size=size)
    sft = torch.cat(score(policy))
    lora.merge(policy.model)
    add_adapter(policy, seed=9, size=0)

    # So KL(pi, pi_ref) is exactly 0 at step 0, except in bf16 on the fast engine, which computes the products
    # of W and B as one.
    reference, now = torch.cat(score(policy, reference=True)), torch.cat(score(policy))
    assert difference(reference, now) <= (0.05 if (name, dtype) == ("fast", "bfloat16") else 0)
    assert difference(reference, sft) <= (1e-4 if dtype == "float32" else 0)
    assert difference(reference, base) > 2 * size
    assert now.requires_grad and not reference.requires_grad

    with torch.no_grad():  # a trained adapter moves pi and not pi_ref
        for layer in lora.lora_layers(policy.model).values():
            layer.B.fill_(0.05)
    assert torch.equal(torch.cat(score(policy, reference=True)), reference)
    assert difference(score(policy), reference) > 0.1


def test_there_is_no_dropout(model_dir, tmp_path):
    """Even where the model's config asks for it: what is sampled is what is scored."""
    folder = changed_copy(model_dir, tmp_path / "model", attention_dropout=0.5)
    for name in ENGINES:
        policy = engine(name, folder)
        assert policy.model.config.attention_dropout == 0.5
        assert torch.equal(*(torch.cat(score(policy)) for _ in range(2)))
        groups = policy.sample(PROMPTS, uniforms(0, len(PROMPTS), 2, 6))
        sampled = torch.tensor([logp for group in groups for reply in group for logp in reply.logps])
        assert difference(sampled, score(policy, PROMPTS, ids_of(groups))) < 1e-4


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_longer_than_the_context_is_an_input_error(model_dir, tmp_path, name):
    policy = engine(name, changed_copy(model_dir, tmp_path / "short", max_position_embeddings=16))
    assert len(policy.sample([[65] * 10, [65]], uniforms(0, 2, 1, 6))) == 2  # 16 tokens fit
    assert policy.sample([], uniforms(0, 0, 1, 6)) == []
    with pytest.raises(InputError, match="^a prompt of 11 tokens and 6 reply .* 16 tokens of "):
        policy.sample([[65], [65] * 11], uniforms(0, 2, 1, 6))
    with pytest.raises(InputError):
        score(policy, [[65] * 14], [[[1, 2, 3, 4]]])
    (fits,) = score(policy, [[65] * 10], [[[1, 2, 3, 4, 5, 6], [7, 2, 3, 4, 5, 6], [8] * 6]])
    assert len(fits) == 18  # a row of several replies may be longer


def test_prompts_and_replies_are_the_chat_template_of_the_conversation(model_dir):
    """A prompt and its reply are the beginning of the next prompt, and replies read back."""
    policy, how = load_policy(model_dir, engine="plain"), dict(families=(Family("bcz", "GE", 2),), noise=0.5)
    records = dataset.simulate_many(2, make_expert("second-best"), 0, PromptStyle(), (3, 3), **how)
    template, decode = policy.tokenizer.apply_chat_template, policy.tokenizer.decode
    lines = {}
    for r in records:
        prompt, reply = policy.encode_prompt(r.prompt), policy.encode_reply(r.reply)
        assert reply[-1] == END and END not in reply[:-1] and decode(reply[:-1]) == r.reply
        before = lines.get((r.game, r.seat), [])
        assert prompt[: len(before)] == before
        lines[r.game, r.seat] = prompt + reply
        assert decode(prompt) == template(r.prompt, add_generation_prompt=True, tokenize=False)
        answered = [*r.prompt, {"role": "assistant", "content": r.reply}]
        assert template(answered, tokenize=False).startswith(decode(prompt + reply))
    assert len(records) == 2 * 2 * 2 * 3 and len(lines) == 6

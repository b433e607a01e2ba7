"""What both engines promise, each on its own; that they say the same is tests/fast/test_engine.py.

The plain engine defines the others, so it is held here against what shares no line with it: transformers'
forward pass without a cache, one per reply and one per sampled token, on weights W + scaling B A, and a law
that is inverted by hand.
"""

import json
import math
import shutil
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
    score,
)
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import lora
from fast.engine import _draw
from models.load import load_policy
from policy import draw
from prompts import PromptStyle
from run import dataset
from run.files import InputError
from world.draws import Family


@pytest.fixture(params=ENGINES)
def policy(request, model_dir):
    return engine(request.param, model_dir)


def seed(number):
    return torch.Generator().manual_seed(number)


def changed_folder(source, folder, **config):
    """A copy of a model's folder with other values in its config."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def ids_of(groups):
    return [[o.reply_ids for o in group] for group in groups]


def sampled(groups):
    return torch.tensor([logp for group in groups for o in group for logp in o.sampled_logps])


# --- the law


def transformers_law(policy):
    """ids, temperature -> log softmax (length, vocabulary) in float64, with gradients for A and B."""
    model = AutoModelForCausalLM.from_pretrained(policy.name).eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, layer in lora.lora_layers(policy.model).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.scaling * layer.B @ layer.A

    def law(ids, temperature):
        out = functional_call(model, weights, (torch.tensor([ids]),), dict(use_cache=False))
        return (out.logits[0].double() / temperature).log_softmax(-1)

    return law


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_their_gradients_are_those_of_transformers(policy, temperature):
    law, expected = transformers_law(policy), []
    for prompt, replies in zip(PROMPTS, REPLIES):
        for reply in replies:
            law_TV = law(prompt + reply, temperature)[len(prompt) - 1 :]
            expected += [law_TV[t, token] for t, token in enumerate(reply)]
    scored, expected = torch.cat(score(policy, temperature=temperature)), torch.stack(expected).float()
    assert scored.dtype == torch.float32 and difference(scored, expected) < 1e-4 < expected.std()
    weights = torch.randn(len(expected), generator=seed(0))
    assert_close(*(gradients(policy, (weights * x).sum()) for x in (scored, expected)))


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_samples_invert_the_law_of_transformers_at_the_uniform_numbers(policy, temperature):
    """Token by token; every sixth token is said to end a reply, so that replies end at different steps."""
    policy.end_ids, (M, S), law = (END, *range(3, 400, 6)), (4, 8), transformers_law(policy)
    groups = policy.sample(PROMPTS, M, S, temperature, seed(0))
    uniforms_PMS = torch.rand(len(PROMPTS), M, S, generator=seed(0)).tolist()
    for prompt, group, uniforms_MS in zip(PROMPTS, groups, uniforms_PMS):
        for o, uniforms in zip(group, uniforms_MS, strict=True):
            expected, logps = [], []
            while len(expected) < S and not set(expected) & set(policy.end_ids):
                with torch.no_grad():
                    logp_V = law(prompt + expected, temperature or 1.0)[-1].tolist()
                u, below = uniforms[len(expected)], list(accumulate(map(math.exp, logp_V)))
                drawn = next(token for token, share in enumerate(below) if share > u)
                expected.append(drawn if temperature else logp_V.index(max(logp_V)))
                logps.append(logp_V[expected[-1]])
            assert (o.prompt_ids, o.reply_ids) == (prompt, expected)
            assert o.sampled_logps == pytest.approx(logps, abs=1e-4)
    lengths = {len(reply) for replies in ids_of(groups) for reply in replies}
    assert len(lengths) > (5 if temperature else 1) and S in lengths


@pytest.mark.parametrize("name", ENGINES)
def test_a_uniform_number_at_either_end_draws_what_the_law_has(name):
    """The first and the last tokens of these laws have probability 0, and neither 0 nor the largest number
    below 1 draws them, though rounding lets the distribution function end beside 1."""
    logits = torch.randn(200, 500, generator=seed(0))
    logits[:, :100] = logits[:, 400:] = -200
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < 1 - 2**-24).any()
    for u, first, last in ((0.0, 100, 100), (1 - 2**-24, 380, 399)):
        uniforms = torch.full((200,), u)
        if name == "plain":
            tokens, logps = draw(logits, uniforms, 1.0)
        else:
            tokens, logps = map(torch.tensor, _draw(logits.clone(), list(range(200)), uniforms))
        assert first <= tokens.min() and tokens.max() <= last
        assert difference(logps, logits.log_softmax(-1)[range(200), tokens]) < 1e-5


# --- sampling


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(policy):
    """A generator goes on where the prompt before left it; a list has one for each; `only` asks some."""
    together, one_by_one = ids_of(policy.sample(PROMPTS, 2, 8, 1.0, seed(5))), seed(5)
    for prompt, replies in zip(PROMPTS, together):
        assert ids_of(policy.sample([prompt], 2, 8, 1.0, one_by_one)) == [replies]
    assert len({tuple(reply) for replies in together for reply in replies}) == 2 * len(PROMPTS)
    assert ids_of(policy.sample(PROMPTS, 2, 8, 1.0, seed(5), only=[4, 1])) == [together[4], together[1]]
    assert policy.sample(PROMPTS, 2, 8, 1.0, seed(5), only=[]) == []
    own = ids_of(policy.sample(PROMPTS, 2, 8, 1.0, [seed(i) for i in range(6)]))
    for i in (0, 3):
        assert ids_of(policy.sample([PROMPTS[i]], 2, 8, 1.0, seed(i))) == [own[i]]
    some = policy.sample(PROMPTS, 2, 8, 1.0, [seed(i) for i in range(6)], only=[5, 2])
    assert ids_of(some) == [own[5], own[2]]


def test_sampling_is_fixed_by_its_generator_and_leaves_the_model_as_it_was(policy):
    before = {name: p.clone() for name, p in policy.model.named_parameters()}

    def draw(number):
        torch.manual_seed(torch.seed())  # the global state must not matter
        return ids_of(policy.sample(PROMPTS, 3, 8, 1.0, seed(number)))

    assert draw(1) == draw(1) != draw(2)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("limit", [1, 6])
def test_the_first_end_of_turn_is_part_of_the_reply(policy, limit):
    """Also where it is the last token allowed. It is the padding token, and a reply is cut by its place."""
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == END == policy.end_ids[0]
    policy.end_ids = (END, *range(3, 400, 5))
    (group,) = policy.sample(PROMPTS[:1], 60, limit, 1.0, seed(2))
    lengths = {True: set(), False: set()}
    for o in group:
        *before, last = o.reply_ids
        assert not set(before) & set(policy.end_ids) and o.ended == (last in policy.end_ids)
        assert o.text == policy.tokenizer.decode(before if o.ended else o.reply_ids)
        lengths[o.ended].add(len(o.reply_ids))
    assert lengths == {True: set(range(1, limit + 1)), False: {limit}}


# --- pi_ref


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

    # So KL(pi, pi_ref) is exactly 0 at step 0, but for products of bf16 that are taken in another order: the
    # fast engine's have grown by the columns of B.
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


def test_the_reference_is_the_base_at_the_same_temperature(policy):
    for temperature in (1.0, 0.7):
        off = torch.cat(score(policy, temperature=temperature, reference=True))
        base = load_policy(policy.name, engine="plain" if policy.new_history() is None else "fast")
        assert torch.equal(off, torch.cat(score(base, temperature=temperature)))


# --- the model and its limits


def test_there_is_no_dropout(model_dir, tmp_path):
    """Even where the model's config asks for it: what is sampled is what is scored."""
    folder = changed_folder(model_dir, tmp_path / "model", attention_dropout=0.5)
    for name in ENGINES:
        policy = engine(name, folder)
        assert policy.model.config.attention_dropout == 0.5
        assert torch.equal(*(torch.cat(score(policy)) for _ in range(2)))
        groups = policy.sample(PROMPTS, 2, 6, 1.0, seed(0))
        assert difference(sampled(groups), score(policy, PROMPTS, ids_of(groups))) < 1e-4


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_longer_than_the_context_is_an_input_error(model_dir, tmp_path, name):
    policy = engine(name, changed_folder(model_dir, tmp_path / "short", max_position_embeddings=16))
    assert len(policy.sample([[65] * 10, [65]], 1, 6, 1.0, seed(0))) == 2  # 16 tokens fit
    with pytest.raises(InputError, match="^a prompt of 11 tokens and 6 reply .* 16 tokens of [^\n]*$"):
        policy.sample([[65], [65] * 11], 1, 6, 1.0, seed(0))
    with pytest.raises(InputError):
        score(policy, [[65] * 14], [[[1, 2, 3, 4]]])
    (fits,) = score(policy, [[65] * 10], [[[1, 2, 3, 4, 5, 6], [7, 2, 3, 4, 5, 6], [8] * 6]])
    assert len(fits) == 18  # a row of several replies may be longer


# --- text and tokens


def test_prompts_and_replies_are_the_chat_template_of_the_conversation(model_dir):
    """A prompt and its reply are the beginning of the next prompt, and replies read back."""
    policy, games = load_policy(model_dir, engine="plain"), (Family("bcz", "GE", 2),)
    records = dataset.simulate_many(2, "second-best", 0, PromptStyle(), (3, 3), families=games, noise=0.5)
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

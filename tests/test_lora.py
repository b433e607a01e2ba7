"""LoRA against the formula written out by hand, against the base model, and against PEFT in both directions."""

import json
import os
import re
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models import adapters as adapter_files
import lora
from lora import LoRAConfig, LoRALinear

CONFIG = LoRAConfig(r=4, alpha=8, base_model="tiny")
TOKENS_BT = torch.arange(14).reshape(2, 7) * 5 % 64
Q = "model.layers.0.self_attn.q_proj"


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_key_value_heads": 2, "vocab_size": 64, **changes})).eval()


def randomize(model, seed=1):
    """Gives every B values, as training would: with B = 0 most of these tests could not fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.B.copy_(0.3 * torch.randn(layer.B.shape, generator=generator))
    return model


def adapted(config=CONFIG, seed=1, model=None):
    model = tiny() if model is None else model
    lora.inject(model, config, torch.Generator().manual_seed(seed))
    return randomize(model, seed)


@torch.no_grad()
def logits(model):
    return model(TOKENS_BT).logits


def differ(a, b):
    return (a - b).abs().max() > 1e-2


# --- the layer


def test_forward_is_the_formula():
    base = torch.nn.Linear(5, 3)
    layer = LoRALinear(base, 2, 0.75, torch.Generator().manual_seed(0))
    layer.B.data = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        for t in range(4):
            h = base.weight @ x[i, t] + base.bias + 0.75 * layer.B @ (layer.A @ x[i, t])
            torch.testing.assert_close(layer(x)[i, t], h)


def test_A_is_kaiming_uniform_from_its_own_generator():
    draw = lambda seed: LoRALinear(torch.nn.Linear(400, 3), 16, 1.0, torch.Generator().manual_seed(seed)).A
    A = draw(7)
    assert torch.equal(A, draw(7)) and not torch.equal(A, draw(8))
    bound = 400**-0.5  # gain sqrt(2 / (1 + 5)) times sqrt(3 / in)
    assert A.abs().max() <= bound and abs(A.std().item() - bound / 3**0.5) < 0.02 * bound
    model, state = tiny(), torch.get_rng_state()
    in_order = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    layers = lora.inject(model, CONFIG, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())  # the global random state is left alone
    generator = torch.Generator().manual_seed(0)
    expected = [LoRALinear(linear, 4, 2.0, generator).A for linear in in_order]
    assert len(layers) == 14 and all(torch.equal(layer.A, A) for layer, A in zip(layers, expected))


def test_bf16_base_keeps_fp32_master_weights():
    model = adapted(model=tiny().bfloat16())
    assert model(TOKENS_BT).logits.dtype == torch.bfloat16
    model(TOKENS_BT).logits.float().square().sum().backward()
    for p in lora.lora_parameters(model):
        assert p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0
    # a step below bf16's resolution arrives in the master weight
    p = lora.lora_parameters(model)[0]
    before = p.detach().clone()
    torch.optim.SGD([p], lr=1e-4 * p.abs().max().item() / p.grad.abs().max().item()).step()
    assert not torch.equal(p, before) and torch.allclose(p, before, atol=1e-3)


# --- the adapter in a model


def test_step_0_is_the_base_model_exactly():
    model = tiny()
    before = logits(model)
    layers = lora.inject(model, CONFIG, torch.Generator().manual_seed(0))
    assert len(layers) == 14 and [id(x) for x in layers] == [id(x) for x in lora.lora_layers(model).values()]
    assert torch.equal(logits(model), before)
    assert differ(logits(randomize(model)), before)


def test_only_A_and_B_get_gradients():
    model = adapted()
    model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {f"{name}.{letter}" for name in lora.lora_layers(model) for letter in "AB"}
    assert len(with_grad) == len(lora.lora_parameters(model)) == 28
    assert all(p.grad.abs().sum() > 0 for p in lora.lora_parameters(model))


def test_gradients_are_those_of_the_merged_weight():
    # h = (W + s B A) x: by the chain rule dA = s B^T dW and dB = s dW A^T
    model = adapted(LoRAConfig(4, 6, ("q_proj",)))
    model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
    layer = lora.lora_layers(model)[Q]
    A, B, dA, dB = layer.A.detach(), layer.B.detach(), layer.A.grad, layer.B.grad
    lora.merge(model)
    W = model.get_submodule(Q).weight.requires_grad_(True)
    model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
    torch.testing.assert_close(dA, 1.5 * B.T @ W.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(dB, 1.5 * W.grad @ A.T, rtol=1e-3, atol=1e-6)


def test_adapter_off_is_exact_nests_and_survives_exceptions():
    base, model = logits(tiny()), adapted()
    on = logits(model)
    assert differ(on, base)
    with lora.adapter_off(model):
        assert torch.equal(logits(model), base)
        with lora.adapter_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)  # the inner exit must not switch it on
    assert torch.equal(logits(model), on)
    with pytest.raises(KeyError):
        with lora.adapter_off(model):
            raise KeyError
    assert torch.equal(logits(model), on)


def naive_linear(layer, x):
    """h = W x + bias + scaling B A x, term by term."""
    h = x @ layer.base.weight.T + layer.scaling * (x @ layer.A.T) @ layer.B.T
    return h if layer.base.bias is None else h + layer.base.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 70)])
def test_layer_and_its_gradients_are_those_of_the_sum_written_out(bias, shape):
    layer = LoRALinear(torch.nn.Linear(6, 9, bias=bias).requires_grad_(False), 4, 1.5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.B)
    x = torch.randn(*shape, 6, requires_grad=True)
    weight = torch.randn(*shape, 9)
    got, expected = layer(x), naive_linear(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted = (x, layer.A, layer.B)
    for a, b in zip(*(torch.autograd.grad((h * weight).sum(), wanted) for h in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_working_copy_follows_every_change_of_its_parts():
    """An optimizer step, a loaded state, changed base weights: none may leave an old sum behind."""
    model = adapted()
    layer, x = lora.lora_layers(model)[Q], torch.randn(5, 32)

    def up_to_date():
        with torch.no_grad():
            return (layer(x) - naive_linear(layer, x)).abs().max() < 1e-5 and not differ(layer(x), layer(x))

    assert up_to_date()
    copy = layer.working()
    assert layer.working() is copy  # not made anew for every forward pass
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(lora.lora_parameters(model), lr=0.1, foreach=foreach)
        model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
        optimizer.step()
        assert layer.working() is not copy and up_to_date()
        copy = layer.working()
    lora.load_adapter_state(model, {key: 2 * p for key, p in lora.adapter_state(model).items()})
    assert layer.working() is not copy and up_to_date()
    with torch.no_grad():
        layer.base.weight.mul_(2)
    assert up_to_date()


def test_below_fp32_values_and_gradients_are_those_of_the_exact_sum_within_rounding():
    model = randomize(adapted(model=tiny().bfloat16()))
    layer, x = lora.lora_layers(model)[Q], torch.randn(3, 5, 32).bfloat16().requires_grad_()
    twin = LoRALinear(torch.nn.Linear(32, 32, bias=False).requires_grad_(False), layer.A.shape[0], layer.scaling, torch.Generator())
    with torch.no_grad():
        for ours, theirs in ((twin.base.weight, layer.base.weight), (twin.A, layer.A), (twin.B, layer.B)):
            ours.copy_(theirs)
        silent = layer(x)
    wide, weight = x.detach().float().requires_grad_(), torch.randn(3, 5, 32)
    h, exact = layer(x), naive_linear(twin, wide)
    assert h.dtype == torch.bfloat16 and torch.equal(h, silent)
    got = torch.autograd.grad((h * weight).sum(), (x, layer.A, layer.B))
    expected = torch.autograd.grad((exact * weight).sum(), (wide, twin.A, twin.B))
    assert got[1].dtype == got[2].dtype == torch.float32
    for a, b in zip((h, *got), (exact, *expected)):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_below_fp32_a_step_smaller_than_the_resolution_of_w_is_not_lost():
    """Rounded to bf16, W + scaling B A would be W itself; so would h of W be, if the rest were added to it. On average
    over many inputs the joint product moves by what it should."""
    model = randomize(adapted(model=tiny().bfloat16()))
    layer, x = lora.lora_layers(model)[Q], torch.randn(4000, 32).bfloat16()
    with torch.no_grad():
        W = layer.base.weight.float()
        layer.B.mul_(W.abs().median() / 1024 / (layer.scaling * layer.B @ layer.A).abs().max())
        delta = layer.scaling * layer.B @ layer.A
        assert ((W + delta).bfloat16() == layer.base.weight).float().mean() > 0.8
        wanted = x.float() @ delta.T
        got = layer(x).float() - layer.base(x).float()
    assert abs(float((got * wanted).sum() / (wanted * wanted).sum()) - 1) < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 1), (2, 40), (200,)])
def test_linear_is_the_layer_for_few_rows_and_for_many(bias, shape):
    layer = torch.nn.Linear(6, 9, bias=bias)
    x = torch.randn(*shape, 6)
    y = lora.linear(x, layer.weight, layer.bias)
    assert y.shape == (*shape, 9) and torch.allclose(y, layer(x), atol=1e-6)


def test_merge_is_adapter_on_and_leaves_a_plain_model():
    model = adapted()
    on, names = logits(model), list(tiny().state_dict())
    lora.merge(model)
    assert list(model.state_dict()) == names and not lora.lora_layers(model)
    torch.testing.assert_close(logits(model), on, rtol=1e-4, atol=1e-5)


def slight(model, part=1 / 1024):
    """Scales every B so that what an adapter adds is a small part of its W, as after training at a small rate."""
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            W = layer.base.weight[:, : layer.A.shape[1]].float()
            layer.B.mul_(part * W.abs().median() / (layer.scaling * layer.B @ layer.A).abs().max())
    return model


def test_below_fp32_merge_keeps_what_the_rounded_sum_would_lose():
    """Merged is adapter on to the bit, also where the sum is W itself nearly everywhere, and after a second adapter."""
    model = slight(adapted(model=tiny().bfloat16()))
    layer = lora.lora_layers(model)[Q]
    total = layer.base.weight.float() + layer.scaling * layer.B @ layer.A
    assert (total.bfloat16() == layer.base.weight).float().mean() > 0.8
    base = logits(tiny().bfloat16())
    for r in (2, 3):
        on = logits(model)
        assert not torch.equal(on, base)
        lora.merge(model)
        assert not lora.lora_layers(model) and torch.equal(logits(model), on)
        assert not any(p.requires_grad for p in model.parameters())
        base = on
        slight(adapted(LoRAConfig(r, 1.0, ("q_proj", "up_proj")), seed=r, model=model), 0.1)
        with lora.adapter_off(model):
            assert torch.equal(logits(model), on)
    assert model.get_submodule(Q).base.weight.shape == (32, 32 + 4 + 2)
    lora.remove(model)
    assert torch.equal(logits(model), base)


def test_below_fp32_an_adapter_on_a_merged_layer_has_the_gradients_of_the_exact_sum_within_rounding():
    model = lora.merge(adapted(LoRAConfig(4, 12.0), model=tiny().bfloat16()))
    merged = model.get_submodule(Q)
    W, A1, B1 = merged.weight[:, :32].float(), merged.A.float(), merged.weight[:, 32:].float()
    layer = lora.lora_layers(adapted(LoRAConfig(3, 6.0), seed=2, model=model))[Q]
    x, weight = torch.randn(3, 5, 32).bfloat16().requires_grad_(), torch.randn(3, 5, 32)
    wide, A, B = (p.detach().float().requires_grad_() for p in (x, layer.A, layer.B))
    h, exact = layer(x), wide @ (W + B1 @ A1 + 2.0 * B @ A).T
    assert not torch.allclose(exact, wide @ (W + 2.0 * B @ A).T, rtol=0.1)  # the first adapter counts
    got = torch.autograd.grad((h * weight).sum(), (x, layer.A, layer.B))
    expected = torch.autograd.grad((exact * weight).sum(), (wide, A, B))
    for a, b in zip((h, *got), (exact, *expected)):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_merge_leaves_tied_weights_alone():
    model = tiny(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    lora.merge(adapted(model=model))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embedding)
    on_head = adapted(LoRAConfig(4, 8, ("q_proj", "lm_head")), model=model)
    before = logits(on_head)
    with pytest.raises(ValueError, match="lm_head: it shares its weight with model.embed_tokens"):
        lora.merge(on_head)
    assert torch.equal(logits(on_head), before)
    untied = adapted(LoRAConfig(4, 8, ("lm_head",)), model=tiny())
    before = logits(untied)
    torch.testing.assert_close(logits(lora.merge(untied)), before, rtol=1e-4, atol=1e-5)


def test_adapter_off_after_sft_is_the_sft_policy():
    model = adapted(seed=1)
    sft = logits(lora.merge(model))
    adapted(LoRAConfig(r=2, alpha=4), seed=2, model=model)
    assert differ(logits(model), sft) and differ(logits(tiny()), sft)
    with lora.adapter_off(model):
        assert torch.equal(logits(model), sft)


@pytest.mark.parametrize(
    "targets, count",
    [
        (("q_proj",), 2),
        (("layers.1.self_attn.q_proj", "o_proj"), 3),
        ("all-linear", 14),
        (r".*\.layers\.1\..*_proj", 7),
        (r".*q_proj|.*\.0\..*down_proj", 3),
        (r"model\.layers\.0\.self_attn\.q_proj|.*v_pro|self_attn.*", 1),
    ],
)
def test_targets_are_matched_as_peft_does(targets, count):
    peft = pytest.importorskip("peft")
    model = adapted(LoRAConfig(4, 8, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = targets if isinstance(targets, str) else list(targets)
        other = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=theirs, r=4, task_type="CAUSAL_LM"))
    assert len(lora.lora_layers(model)) == count
    assert set(lora.adapter_state(model)) == set(peft.get_peft_model_state_dict(other))


# --- on disk


def test_save_and_load_round_trip_is_bit_exact(tmp_path):
    model = adapted()
    adapter_files.save_adapter(model, tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    other, state = tiny(), torch.get_rng_state()
    config = adapter_files.load_adapter(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (config.r, config.alpha, config.base_model) == (4, 8, "tiny")
    assert sorted(config.targets) == sorted(lora.DEFAULT_TARGETS) and config == adapter_files.load_config(tmp_path)
    ours, theirs = lora.adapter_state(model), lora.adapter_state(other)
    assert list(ours) == list(theirs) and len(ours) == 28
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(model), logits(other))


def test_adapter_state_is_a_copy():
    model = adapted()
    state = lora.adapter_state(model)
    before = {key: tensor.clone() for key, tensor in state.items()}
    for p in lora.lora_parameters(model):
        p.data += 1
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("targets", [lora.DEFAULT_TARGETS, r".*\.layers\.1\..*_proj"])
def test_peft_loads_ours(tmp_path, targets):
    peft = pytest.importorskip("peft")
    config = LoRAConfig(4, 6, targets, "tiny")
    model = adapted(config)
    adapter_files.save_adapter(model, tmp_path, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert not [w for w in caught if "nexpected" in str(w.message) or "issing" in str(w.message)]
    assert differ(logits(model), logits(tiny()))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.layers\.1\..*_proj"])
def test_we_load_pefts(tmp_path, targets):
    peft = pytest.importorskip("peft")
    other = peft.get_peft_model(
        tiny(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1)
    ).eval()
    for name, p in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    other.save_pretrained(tmp_path)
    model = tiny()
    config = adapter_files.load_adapter(model, tmp_path)
    assert (config.r, config.alpha, config.base_fingerprint) == (3, 5, None)
    assert differ(logits(model), logits(tiny()))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-6)


def test_a_killed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    old, new = adapted(seed=1), adapted(seed=2)
    adapter_files.save_adapter(old, tmp_path, CONFIG)

    def killed(*_):
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, killed)
            adapter_files.save_adapter(new, tmp_path, CONFIG)
        model = tiny()
        adapter_files.load_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(old)) and differ(logits(model), logits(new))
    adapter_files.save_adapter(new, tmp_path, CONFIG)  # and the next write is not disturbed by what was left
    model = tiny()
    adapter_files.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(new))
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("new", [LoRAConfig(4, 16), LoRAConfig(2, 4), LoRAConfig(4, 8, ("q_proj",))])
def test_a_write_killed_between_its_two_files_is_refused(tmp_path, monkeypatch, new):
    adapter_files.save_adapter(adapted(), tmp_path, CONFIG)
    real = os.replace

    def killed_at_config(source, target):
        if target.endswith(".json"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_at_config)
        adapter_files.save_adapter(adapted(new), tmp_path, new)
    with pytest.raises(ValueError, match="alpha = 16|has rank 2, but r = 4|adapter weights lack"):
        adapter_files.load_adapter(tiny(), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # a first write: never half a folder
        patch.setattr(os, "replace", killed_at_config)
        adapter_files.save_adapter(adapted(new), tmp_path / "first", new)
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        adapter_files.load_adapter(tiny(), tmp_path / "first")


# --- SFT + RFT as one adapter


@pytest.mark.parametrize(
    "targets1, targets2",
    [
        (lora.DEFAULT_TARGETS, lora.DEFAULT_TARGETS),
        (lora.DEFAULT_TARGETS, ("o_proj", "q_proj")),
        (("v_proj", "q_proj"), r".*\.layers\.1\..*_proj"),
    ],
)
def test_stacked_adapters_are_merge_then_adapt(tmp_path, targets1, targets2):
    config1, config2 = LoRAConfig(4, 6, targets1, "tiny"), LoRAConfig(3, 7, targets2, "tiny-sft")
    model = adapted(config1, 1)
    adapter_files.save_adapter(model, tmp_path / "sft", config1)
    sft = logits(lora.merge(model))
    adapted(config2, 2, model)
    adapter_files.save_adapter(model, tmp_path / "rft", config2)
    state, config = adapter_files.stack_adapters(*adapter_files.read_adapter(tmp_path / "sft"), *adapter_files.read_adapter(tmp_path / "rft"))
    assert (config.r, config.scaling, config.base_model) == (7, 1.0, "tiny")
    assert targets1 != targets2 or sorted(config.targets) == sorted(targets1)
    adapter_files.write_adapter(tmp_path / "both", state, config)
    stacked = tiny()
    adapter_files.load_adapter(stacked, tmp_path / "both")  # the fingerprint is that of the plain base
    assert differ(logits(model), sft) and differ(sft, logits(tiny()))
    torch.testing.assert_close(logits(stacked), logits(model), rtol=1e-4, atol=1e-5)
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(tiny(), tmp_path / "both").eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_stacking_across_base_models_is_refused():
    state1, state2 = (lora.adapter_state(adapted(model=tiny(hidden_size=size))) for size in (32, 48))
    with pytest.raises(ValueError, match="different base models"):
        adapter_files.stack_adapters(state1, CONFIG, state2, CONFIG)


# --- fingerprint


def test_fingerprint_sees_weights_not_adapter_or_dtype():
    base = lora.fingerprint(tiny())
    model = tiny()
    assert lora.fingerprint(model) == base != lora.fingerprint(tiny(seed=5))
    adapted(model=model)
    assert lora.fingerprint(model) == base
    assert lora.fingerprint(lora.merge(model)) != base
    assert lora.fingerprint(tiny().bfloat16()) == base


def test_adapter_of_another_base_of_the_same_shape_is_refused(tmp_path):
    model = lora.merge(adapted(seed=1))
    adapter_files.save_adapter(adapted(seed=2, model=model), tmp_path, LoRAConfig(4, 8, base_model="runs/sft"))
    for wrong in (tiny(), tiny(seed=5)):  # the plain base, that is SFT forgotten, and an unrelated one
        before = logits(wrong)
        with pytest.raises(ValueError, match="trained on runs/sft, not on this model: the base weights differ"):
            adapter_files.load_adapter(wrong, tmp_path)
        assert not lora.lora_layers(wrong) and torch.equal(logits(wrong), before)
    right = lora.merge(adapted(seed=1))
    adapter_files.load_adapter(right, tmp_path)
    assert torch.equal(logits(right), logits(model))


# --- refusals: one line that says what is wrong


def refused(error, message, function, *arguments):
    with pytest.raises(error, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    adapter_files.save_adapter(adapted(), tmp_path, CONFIG)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_inject_refusals():
    generator, model = torch.Generator(), tiny()
    refused(ValueError, "'c_attn' names no nn.Linear.*has: .*q_proj", lora.inject, model,
            LoRAConfig(4, 8, ("q_proj", "c_attn")), generator)  # fmt: skip
    refused(ValueError, "'_proj' names no nn.Linear", lora.inject, model, LoRAConfig(4, 8, ("_proj",)), generator)
    refused(ValueError, "targets are empty", lora.inject, model, LoRAConfig(4, 8, ()), generator)
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    refused(ValueError, "already has an adapter", lora.inject, adapted(), CONFIG, generator)
    refused(ValueError, "rank r must be a positive integer, got 0", LoRAConfig, 0, 8)
    refused(ValueError, "alpha must be a finite number, got nan", LoRAConfig, 4, float("nan"))
    refused(ValueError, "not a valid regex", LoRAConfig, 4, 8, "(q_proj")


def test_no_adapter_refusals(tmp_path):
    for function in (lora.merge, lora.adapter_state):
        refused(ValueError, "has no adapter", function, tiny())
    refused(ValueError, "has no adapter", lora.load_adapter_state, tiny(), {})
    refused(ValueError, "has no adapter", lora.adapter_off(tiny()).__enter__)
    refused(ValueError, "has no adapter", adapter_files.save_adapter, tiny(), tmp_path, CONFIG)


def test_save_refuses_a_config_of_another_adapter(tmp_path):
    refused(ValueError, "not the scaling", adapter_files.save_adapter, adapted(), tmp_path, LoRAConfig(4, 9))
    refused(ValueError, "has rank 4, but r = 8", adapter_files.save_adapter, adapted(), tmp_path, LoRAConfig(8, 16))
    assert not os.listdir(tmp_path)


def test_load_adapter_state_refusals_change_nothing():
    model = adapted()
    before, good = logits(model), lora.adapter_state(adapted(seed=2))
    key = f"base_model.model.{Q}.lora_B.weight"
    lacking = {k: v for k, v in good.items() if k != key}
    refused(ValueError, f"lack {re.escape(key)}", lora.load_adapter_state, model, lacking)
    refused(ValueError, "unexpected other", lora.load_adapter_state, model, {**good, "other": good[key]})
    refused(ValueError, r"q_proj.lora_B.weight has shape \(32, 5\), this model needs \(32, 4\)",
            lora.load_adapter_state, model, {**good, key: torch.ones(32, 5)})  # fmt: skip
    assert torch.equal(logits(model), before)
    lora.load_adapter_state(model, good)
    assert torch.equal(logits(model), logits(adapted(seed=2)))


def test_missing_files(folder):
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    refused(FileNotFoundError, "has no adapter_model.safetensors", adapter_files.load_adapter, tiny(), folder)
    os.remove(folder / "adapter_config.json")
    refused(FileNotFoundError, "has no adapter_config.json", adapter_files.load_adapter, tiny(), folder)
    refused(FileNotFoundError, "has no adapter_config.json", adapter_files.load_config, folder / "nowhere")


def test_damaged_files(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"x" * 1000):
        weights.write_bytes(damaged)
        refused(ValueError, "adapter_model.safetensors is damaged", adapter_files.load_adapter, tiny(), folder)
    weights.write_bytes(whole)
    whole = config.read_text()
    for damaged in (whole[:-20], "", "[]", "{}", "null", '{"peft_type": "LORA", "r": 4}'):
        config.write_text(damaged)
        refused(ValueError, "adapter_config.json", adapter_files.load_config, folder)
    config.write_text(whole)
    adapter_files.load_adapter(tiny(), folder)


def test_rank_of_the_file_differs_from_the_config(folder):
    edit_config(folder, r=8, lora_alpha=8)
    refused(ValueError, "lora_A.weight has rank 4, but r = 8", adapter_files.load_adapter, tiny(), folder)


def test_adapter_of_another_architecture(folder):
    message = r"trained on tiny, not on this model: .*has shape \(4, 32\), this model needs \(4, 48\)"
    refused(ValueError, message, adapter_files.load_adapter, tiny(hidden_size=48), folder)
    message = "trained on tiny, not on this model: adapter weights lack .*layers.2"
    refused(ValueError, message, adapter_files.load_adapter, tiny(num_hidden_layers=3), folder)
    message = "trained on tiny, not on this model: adapter weights have an unexpected .*layers.1"
    refused(ValueError, message, adapter_files.load_adapter, tiny(num_hidden_layers=1), folder)
    refused(ValueError, "already has an adapter", adapter_files.load_adapter, adapted(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["k_proj"]},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"a_field_of_a_future_peft": {"x": 1}},
        {"peft_type": "IA3"},
    ],
)
def test_more_than_plain_lora_is_refused(folder, changes):
    edit_config(folder, **changes)
    refused(ValueError, f"adapter_config.json: {next(iter(changes))} .*support", adapter_files.load_adapter, tiny(), folder)


def test_extra_tensors_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({**state, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(32)}, path)
    refused(ValueError, "unexpected .*lora_magnitude_vector", adapter_files.load_adapter, tiny(), folder)

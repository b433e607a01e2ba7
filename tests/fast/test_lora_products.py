"""The products of LoRA in one go, against the sum written out."""

import pytest
import torch
from test_lora import TOKENS_BT, Q, adapted, differ, logits, randomize, tiny

import lora
from lora import LoRAConfig, LoRALinear


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

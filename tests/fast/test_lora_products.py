"""LoRA in one product against lora.LoRALinear, which computes the formula term by term."""

import copy

import pytest
import torch
from test_lora import TOKENS_BT, Q, logits, randomize, tiny

import lora
from fast.lora_products import JointLoRALinear, linear
from lora import LoRAConfig, LoRALinear
from models import adapters


def adapted(model, r=4, alpha=8.0, seed=1, layer=JointLoRALinear, targets=lora.DEFAULT_TARGETS):
    """The model with an adapter as training would leave it; its last query layer."""
    lora.inject(model, LoRAConfig(r, alpha, targets), torch.Generator().manual_seed(seed), layer)
    randomize(model, seed)
    return lora.lora_layers(model)[Q]


def exact(layer):
    """The layer in fp32 and as the formula: a LoRALinear, on another one where an adapter was merged."""
    if isinstance(layer, torch.nn.Linear):
        return copy.deepcopy(layer).float()
    twin = LoRALinear(exact(layer.base), len(layer.A), layer.scaling, torch.Generator())
    with torch.no_grad():
        twin.A.copy_(layer.A), twin.B.copy_(layer.B)
    return twin.requires_grad_(True)


def values_and_gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    h = layer(x)
    return h, *torch.autograd.grad((h * weights).sum(), (x, layer.A, layer.B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 70)])
def test_values_and_gradients_are_those_of_the_formula(bias, shape):
    base = torch.nn.Linear(6, 9, bias=bias).requires_grad_(False)
    layer = JointLoRALinear(base, 4, 1.5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.B)
    x, weights = torch.randn(*shape, 6), torch.randn(*shape, 9)
    for a, b in zip(*(values_and_gradients(part, x, weights) for part in (layer, exact(layer))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), exact(layer)(x), rtol=1e-4, atol=1e-5)


def test_the_working_copy_follows_every_change_of_its_parts():
    """An optimizer step, a loaded state, changed base weights: none may leave an old sum behind."""
    model = tiny()
    layer, x = adapted(model), torch.randn(5, 32)

    def checked_copy():
        with torch.no_grad():
            torch.testing.assert_close(layer(x), exact(layer)(x), rtol=1e-4, atol=1e-5)
        made, _ = layer.working()
        assert layer.working()[0] is made  # not made anew for every forward pass
        return made

    copies = [checked_copy()]
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(lora.lora_parameters(model), lr=0.1, foreach=foreach)
        model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
        optimizer.step()
        copies.append(checked_copy())
    adapters.load_adapter_state(model, {key: 2 * p for key, p in adapters.adapter_state(model).items()})
    copies.append(checked_copy())
    with torch.no_grad():
        layer.base.weight.mul_(2)
    copies.append(checked_copy())
    assert len({id(made) for made in copies}) == 5


@pytest.mark.parametrize("merges", [0, 1, 2])
def test_below_fp32_values_and_gradients_are_those_of_the_formula_within_rounding(merges):
    """Also on top of adapters that were merged."""
    model = tiny().bfloat16()
    for k in range(merges):
        adapted(model, 5 + k, 6.0, seed=k + 2)
        lora.merge(model)
    layer = adapted(model)
    x, weights = torch.randn(3, 5, 32).bfloat16(), torch.randn(3, 5, 32)
    results = values_and_gradients(layer, x, weights)
    assert [a.dtype for a in results] == [torch.bfloat16] * 2 + [torch.float32] * 2
    with torch.no_grad():
        assert torch.equal(layer(x), results[0])
    for a, b in zip(results, values_and_gradients(exact(layer), x.float(), weights), strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()
    without = exact(layer.base if merges else layer)
    while isinstance(without, LoRALinear):
        without = without.base
    assert (without(x.float()) - results[0]).norm() > 0.1 * results[0].norm()


def test_below_fp32_a_step_smaller_than_the_resolution_of_w_is_not_lost():
    """Rounded to bf16, W + scaling B A would be W itself; so would h of W be, if the rest were added to it.
    On average over many inputs the joint product moves by what it should."""
    layer, x = adapted(tiny().bfloat16()), torch.randn(4000, 32).bfloat16()
    with torch.no_grad():
        W = layer.base.weight.float()
        layer.B.mul_(W.abs().median() / 1024 / (layer.scaling * layer.B @ layer.A).abs().max())
        delta = layer.scaling * layer.B @ layer.A
        assert ((W + delta).bfloat16() == layer.base.weight).float().mean() > 0.8
        wanted, got = x.float() @ delta.T, layer(x).float() - layer.base(x).float()
    assert abs(float((got * wanted).sum() / (wanted * wanted).sum()) - 1) < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 1), (2, 40), (200,)])
def test_linear_is_the_layer_for_few_rows_and_for_many(bias, shape):
    for width in (4, 9):  # narrower and wider than x
        layer, x = torch.nn.Linear(6, width, bias=bias), torch.randn(*shape, 6)
        y = linear(x, layer.weight, layer.bias)
        assert y.shape == (*shape, width) and torch.allclose(y, layer(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [lora.DEFAULT_TARGETS, ("q_proj", "up_proj")])
def test_merged_twice_the_model_has_the_parameters_of_the_plain_one(dtype, targets):
    """The second adapter may have fewer targets. Below fp32 merged is adapter on to the bit, and W is held
    once: with every frozen B it is a view of one storage."""
    fast, plain = tiny().to(dtype), tiny().to(dtype)
    for r, names in ((4, lora.DEFAULT_TARGETS), (2, targets)):
        for model, layer in ((fast, JointLoRALinear), (plain, LoRALinear)):
            adapted(model, r, 2.0, r, layer, names)
        on = logits(fast)
        for model in (fast, plain):
            lora.merge(model)
            assert not lora.lora_layers(model) and not any(p.requires_grad for p in model.parameters())
        assert torch.allclose(logits(fast), on, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 0)
        named = [dict(model.named_parameters()) for model in (fast, plain)]
        assert list(named[0]) == list(named[1])
        for name, p in named[1].items():
            assert torch.equal(named[0][name].bfloat16(), p.bfloat16()), name
        assert adapters.fingerprint(fast) == adapters.fingerprint(plain)

        if dtype == torch.bfloat16:
            for layer in (m for m in fast.modules() if isinstance(m, LoRALinear) and m.frozen):
                W, parts = layer, []
                while isinstance(W, LoRALinear):
                    parts, W = [*parts, W.B, W._working], W.base
                storages = {t.untyped_storage().data_ptr() for t in (W.weight, *parts)}
                columns = W.weight.shape[1] + sum(B.shape[1] for B in parts[::2])
                assert storages == {layer._working.data_ptr()} and layer._working.shape[1] == columns
    adapted(fast, 3)
    with lora.adapter_off(fast):
        assert torch.allclose(logits(fast), logits(plain), rtol=0.05, atol=0.05)
    lora.remove(fast)

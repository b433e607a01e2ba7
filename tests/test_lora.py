"""LoRA in a model: what an adapter leaves alone, merging it, and refusals. That forward and gradients are
those of W + scaling B A: tests/test_policy.py."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora
import settings
import train_sft
from lora import LoRAConfig, LoRALinear
from models import adapters
from run.errors import InputError
from run.seeds import Stream

CONFIG = LoRAConfig(r=4, alpha=8, base_model="tiny")
TOKENS_BT = torch.arange(14).reshape(2, 7) * 5 % 64
Q = "model.layers.0.self_attn.q_proj"


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


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


def test_A_is_kaiming_uniform_from_its_own_generator():
    draw = lambda seed: LoRALinear(torch.nn.Linear(400, 3), 16, 1.0, torch.Generator().manual_seed(seed)).A
    A = draw(7)
    assert torch.equal(A, draw(7)) and not torch.equal(A, draw(8))
    bound = 400**-0.5  # gain sqrt(2 / (1 + 5)) times sqrt(3 / in)
    assert A.abs().max() <= bound and abs(A.std().item() - bound / 3**0.5) < 0.02 * bound


def test_the_layers_draw_their_A_in_the_models_order():
    model, state = tiny(), torch.get_rng_state()
    in_order = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    lora.inject(model, CONFIG, torch.Generator().manual_seed(0))
    layers = list(lora.lora_layers(model).values())
    assert torch.equal(state, torch.get_rng_state())  # the global random state is left alone
    generator = torch.Generator().manual_seed(0)
    expected = [LoRALinear(linear, 4, 2.0, generator).A for linear in in_order]
    assert len(layers) == 14
    assert all(torch.equal(layer.A, A) for layer, A in zip(layers, expected, strict=True))


def test_adapter_off_is_exact_nests_and_survives_exceptions():
    base, model = logits(tiny()), adapted()
    on = logits(model)
    assert differ(on, base)
    with pytest.raises(KeyError), lora.adapter_off(model):
        with lora.adapter_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)  # the inner exit must not switch it on
        raise KeyError
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("merges", [1, 2])
def test_below_fp32_merge_freezes_the_adapter_beside_its_weight(merges):
    """Merged is adapter on to the bit, and the base of the next adapter."""
    model = adapted(model=tiny().bfloat16())
    for r in range(2, 2 + merges):
        on = logits(model)
        lora.merge(model)
        assert not lora.lora_layers(model) and torch.equal(logits(model), on)
        assert not any(p.requires_grad for p in model.parameters())
        adapted(LoRAConfig(r, 6.0, ("q_proj", "up_proj")), seed=r, model=model)
        assert len(lora.lora_layers(model)) == 4 and not torch.equal(logits(model), on)
        with lora.adapter_off(model):
            assert torch.equal(logits(model), on)
    layer = lora.lora_layers(model)[Q]
    exact, part = torch.zeros(32, 32), layer
    while isinstance(part, LoRALinear):
        exact, part = exact + part.scaling * part.B @ part.A, part.base
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.float() @ (exact + part.weight.float()).T
    assert (layer(x).float() - exact).norm() < 0.01 * exact.norm() and layer(x).dtype == torch.bfloat16
    model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {f"{name}.{letter}" for name in lora.lora_layers(model) for letter in "AB"}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora.lora_parameters(model))
    lora.remove(model)
    assert torch.equal(logits(model), on)


class Scaled(LoRALinear):
    """g times the rows of the sum, elementwise: a layer of another kind."""

    parts, stackable = ("A", "B", "g"), False

    def __init__(self, base, *more):
        super().__init__(base, *more)
        self.g = torch.nn.Parameter(torch.linspace(0.5, 1.5, self.out_features))

    def forward(self, x):
        return self.base(x) if self.disabled else self.g * super().forward(x)

    def merged_weight(self):
        return self.g[:, None] * super().merged_weight()


def test_another_kind_of_layer_is_a_subclass():
    model, base = tiny(), logits(tiny())
    lora.inject(model, CONFIG, torch.Generator().manual_seed(1), Scaled)
    on = logits(randomize(model))
    model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
    assert len(lora.lora_parameters(model)) == 42 and all(p.grad.any() for p in lora.lora_parameters(model))
    assert f"base_model.model.{Q}.lora_g" in adapters.adapter_state(model)
    with lora.adapter_off(model):
        assert torch.equal(logits(model), base) and differ(on, base)
    torch.testing.assert_close(logits(lora.merge(model)), on, rtol=1e-4, atol=1e-5)


def test_merge_leaves_tied_weights_alone():
    model = tiny(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    names = list(model.state_dict())
    lora.merge(adapted(model=model))
    assert list(model.state_dict()) == names and not lora.lora_layers(model)
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


def test_a_tied_layer_is_refused_before_training():
    policy = SimpleNamespace(model=tiny(tie_word_embeddings=True), name="tiny", layer=LoRALinear)
    with pytest.raises(InputError, match="lm_head: it shares its weight"):
        train_sft.new_adapter(policy, settings.LoRA(2, 4.0, ("lm_head",)), 0, Stream.SFT_ADAPTER)


def refuses(message, function, *arguments):
    """The call must raise a ValueError of one line that contains the message."""
    with pytest.raises(ValueError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def test_inject_refusals():
    generator, model = torch.Generator(), tiny()
    bad = {("q_proj", "c_attn"): "'c_attn' names no nn.Linear.*has: .*q_proj", (): "targets are empty"}
    for targets, message in {**bad, ("_proj",): "'_proj' names no nn.Linear"}.items():
        refuses(message, lora.inject, model, LoRAConfig(4, 8, targets), generator)
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    refuses("already has an adapter", lora.inject, adapted(), CONFIG, generator)
    refuses("rank r must be a positive integer, got 0", LoRAConfig, 0, 8)
    refuses("alpha must be a finite number, got nan", LoRAConfig, 4, float("nan"))
    for function in (lora.merge, adapters.adapter_state, lambda model: lora.adapter_off(model).__enter__()):
        refuses("has no adapter", function, tiny())


def test_a_state_is_loaded_whole_or_not_at_all_and_is_a_copy():
    model, load = adapted(), adapters.load_adapter_state
    before, good = logits(model), adapters.adapter_state(adapted(seed=2))
    key = f"base_model.model.{Q}.lora_B.weight"
    refuses("lack", load, model, {k: v for k, v in good.items() if k != key})
    refuses("unexpected other", load, model, {**good, "other": good[key]})
    shape = r"shape \(32, 5\), this model needs \(32, 4\)"
    refuses(shape, load, model, {**good, key: torch.ones(32, 5)})
    assert torch.equal(logits(model), before)
    load(model, good)
    saved, loaded = adapters.adapter_state(model), logits(model)
    assert torch.equal(loaded, logits(adapted(seed=2)))
    for p in lora.lora_parameters(model):
        p.data += 1
    assert all(torch.equal(saved[key], good[key]) for key in good)

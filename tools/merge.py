"""An adapter, or a chain of them, merged into its base model: a folder for transformers, vLLM and the hub.

python -m tools.merge runs/tompo/adapter --out FOLDER
python -m tools.merge runs/tompo/adapter --out FOLDER --only-adapter --dtype float16    # half the size
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import lora
from models import adapters
from models.load import DTYPES, load_policy, put_adapter
from models.pretrained import DEFAULT_MODEL
from run.errors import library_errors, reports_errors
from run.files import refuse_existing


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Merge an adapter into its base model; save a plain model.")
    add = parser.add_argument
    add("adapter", help="adapter folder, or several, each trained on those before: A+B")
    add("--out", required=True, help="new folder for the model and its tokenizer")
    base = f"the base: name, folder or hub id (default: {DEFAULT_MODEL}; of adapters what they name)"
    add("--model", help=base)
    add("--dtype", choices=(*DTYPES, "float16"), default="float32", help="of the saved weights")
    add("--only-adapter", action="store_true", help="save the adapters as one, without the base")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    dtype = getattr(torch, args.dtype)
    if args.only_adapter:
        with library_errors(args.adapter):
            state, config = adapters.read_chain(args.adapter)
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        base = args.model or config.base_model
        config = replace(config, base_model=os.path.abspath(base) if os.path.isdir(base) else base)
        adapters.write_adapter(args.out, state, config)
        size = sum(file.stat().st_size for file in Path(args.out).iterdir()) / 1e6
        print(f"{args.out}: rank {config.r}, {args.dtype}, {size:.1f} MB")
        return
    policy = load_policy(args.model or DEFAULT_MODEL, engine="plain")
    put_adapter(policy, args.adapter)
    with library_errors(f"cannot merge {args.adapter}"):
        model = lora.merge(policy.model)
    # The sum is taken in fp32 and rounded once: in bf16 much of a small adapter would be lost.
    model = model.to(dtype)
    out = Path(args.out)
    work = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # what a kill or an error has left
    with library_errors(f"cannot write {out}"):
        model.save_pretrained(work)
        policy.tokenizer.save_pretrained(work)
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors makes its file private, and a server may be another user
        os.rename(work, out)  # so OUT is either complete or not there
    print(f"{args.out}: {model.num_parameters():,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()

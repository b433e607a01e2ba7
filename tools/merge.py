"""An adapter, or a chain of them, merged into its base model: a folder for transformers, vLLM and the hub.

    python -m tools.merge runs/tompo/adapter --out FOLDER [--model NAME] [--dtype float32|bfloat16]

An adapter that was trained on top of another one is named with it: FIRST/adapter+SECOND/adapter.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

import lora
from models import adapters, pretrained
from run.files import InputError, library_errors, one_line, refuse_existing, reports_errors


def merge_into(model, name: str):
    """Merges an adapter folder, or several joined by "+", into the model. Raises InputError."""
    try:
        adapters.load_chain(model, name)
        return lora.merge(model)
    except (OSError, ValueError) as e:
        raise InputError(one_line(e)) from None


def save(model, tokenizer, out: Path) -> None:
    """Writes the folder beside its place and renames it: it is whole or not there. What a kill leaves always
    has the same name, so the same command takes it over. Raises InputError."""
    work = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with library_errors(f"cannot write {out}"):
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            for file in work.iterdir():
                file.chmod(0o644)  # safetensors makes its file private, and a server may be another user
            os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Merge an adapter into its base model and save a plain model."
    )
    parser.add_argument("adapter", help="adapter folder, or several, each trained on those before: A+B")
    parser.add_argument("--out", required=True, help="new folder for the model and its tokenizer")
    parser.add_argument("--model", default=pretrained.DEFAULT_MODEL, help="the base: name, folder or hub id")
    choices = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=choices, default="float32", help="of the saved weights")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    model, tokenizer = pretrained.load(args.model)
    # The sum is taken in fp32 and rounded once: in bf16 much of a small adapter would be lost.
    model = merge_into(model, args.adapter).to(getattr(torch, args.dtype))
    save(model, tokenizer, Path(args.out))
    print(f"{args.out}: {model.num_parameters():,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()

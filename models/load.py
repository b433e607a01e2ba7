"""From the values of --model, --engine, --dtype and --device to a policy, and adapters onto it."""

import argparse

import torch

from lora import LoRAConfig
from models import adapters, pretrained
from policy import Policy
from run.files import InputError, one_line

ENGINES = ("fast", "plain")


def device(name: str) -> str:
    """An argparse type: a torch device that this machine has, such as cpu, cuda or cuda:1."""
    found = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"]
    if found:
        here += [found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        raise argparse.ArgumentTypeError(f"this machine has no {name!r}, only {', '.join(here)}")
    return name


def load_policy(name: str, dtype: str = "float32", device: str = "cpu", engine: str = "fast") -> Policy:
    """The base model as a policy. dtype: of the frozen weights. Raises InputError."""
    if engine == "plain":
        policy_class = Policy
    else:
        from fast.cpu import prepare_cpu  # here: whoever runs the plain engine needs nothing of fast/
        from fast.engine import FastPolicy as policy_class

        if torch.device(device).type == "cpu":
            prepare_cpu()
    try:
        model, tokenizer = pretrained.load(name, dtype=getattr(torch, dtype), device=device)
        end_ids = pretrained.end_token_ids(model, tokenizer)
    except pretrained.ModelError as e:
        raise InputError(str(e)) from None
    return policy_class(model, tokenizer, name, end_ids)


def put_adapter(policy: Policy, name: str) -> LoRAConfig:
    """Puts the adapter of a folder on the policy's model, or the last of a chain (FOLDER+FOLDER) on the
    others, merged. Raises InputError for one that does not fit."""
    try:
        return adapters.load_chain(policy.model, str(name), layer=policy.layer)
    except (OSError, ValueError) as e:
        raise InputError(one_line(e)) from None

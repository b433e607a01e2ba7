"""From the values of --model, --engine and --dtype to a policy, and adapters onto it."""

import os

import torch

from lora import LoRAConfig
from models import adapters, pretrained
from policy import Policy
from run.errors import InputError, one_line

ENGINES = ("fast", "plain")


def default_device() -> str:
    """CUDA where there is a GPU; CUDA_VISIBLE_DEVICES chooses it, or hides it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_policy(name: str, dtype: str = "float32", device: str = "cpu", engine: str = "fast") -> Policy:
    """The base model as a policy. dtype: of the frozen weights. InputError: as in pretrained.load."""
    policy_class = Policy
    if engine == "fast":
        from fast.cpu import prepare_cpu  # here: whoever runs the plain engine needs nothing of fast/
        from fast.engine import FastPolicy as policy_class

        if torch.device(device).type == "cpu":
            prepare_cpu()
    model, tokenizer = pretrained.load(name, getattr(torch, dtype), device)
    return policy_class(model, tokenizer, name, pretrained.end_token_ids(model, tokenizer))


def put_adapter(policy: Policy, name: str | os.PathLike) -> LoRAConfig:
    """Puts the adapter of a folder on the policy's model, or the last one of a chain (FOLDER+FOLDER) after
    the others were merged. InputError: some adapter does not fit."""
    try:
        return adapters.load_chain(policy.model, name, policy.layer)
    except (OSError, ValueError) as e:
        raise InputError(one_line(e)) from None

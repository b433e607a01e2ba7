"""Several processes that train one policy together (data parallel), on torch.distributed.

    torchrun --nproc-per-node=4 -- train_rft.py --m 16

(The -- keeps torchrun from reading --m as an abbreviation of its own flags. It kills what has not ended 30 s
after a Ctrl-C; give it --shutdown-timeout 300 where a step takes longer.)

Every process has the whole model and does all that is cheap on the same data with the same random numbers.
What costs time is split: each process samples for, and takes the gradient of, its share of a step's prompts
(of SFT's conversations, of evaluation's games). Replies are exchanged and gradients summed, so all take the
same optimizer step, and K processes end in the adapter of one, up to rounding (which may turn a sampled
token). Rank 0 alone prints and writes. With one process all of this does nothing.
"""

import os
import sys
from collections.abc import Hashable, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from run.files import InputError


class LostRank(InputError):
    """Another process cannot be reached. What was exchanged before is the same in all that are left."""


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Is this the process that prints and writes?"""
    return rank() == 0


def start() -> None:
    """Joins the processes that torchrun has started, if it has.

    gloo on GPUs too: only adapter gradients and small objects travel, and it raises an error where a process
    has died. NCCL would end the whole process instead, and with it the chance to save."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
        if not first():
            sys.stdout = open(os.devnull, "w")


def device(name: str) -> str:
    """This process's own device."""
    if world() > 1 and name == "cuda":
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(name)
    return name


@contextmanager
def _collective():
    try:
        yield
    except RuntimeError as e:  # torch's DistBackendError is one
        raise LostRank(
            f"another process of this run cannot be reached ({str(e).splitlines()[0][:100]})"
        ) from None


@contextmanager
def first_goes_first():
    """Rank 0 does the body before the others do, so that they find what it leaves on disk."""
    with _collective():
        if world() > 1 and not first():
            dist.barrier()
    yield
    with _collective():
        if world() > 1 and first():
            dist.barrier()


def share(keys: Iterable[Hashable]) -> list[int]:
    """Indices of this process's items; those with the same key stay together."""
    number: dict[Hashable, int] = {}
    return [i for i, key in enumerate(keys) if number.setdefault(key, len(number)) % world() == rank()]


def exchange(value) -> list:
    """The value of every process, by rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    with _collective():
        dist.all_gather_object(values, value)
    return values


def whole(mine: list[int], values: list) -> list:
    """The values of all items, where every process has those of its share."""
    pairs = [pair for pairs in exchange(list(zip(mine, values))) for pair in pairs]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Every process's .grad becomes the sum of all of them; one that has had no item counts as 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world() == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters]).cpu()
    with _collective():
        dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p).to(p.device)

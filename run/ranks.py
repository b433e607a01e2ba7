"""Several processes that train one policy together (data parallel), on torch.distributed.

    torchrun --nproc-per-node=4 -- train_rft.py --m 16

(The -- keeps torchrun from reading --m as an abbreviation of its own flags. torchrun kills the processes that
have not ended 30 s after a Ctrl-C; give it --shutdown-timeout 300 where a step takes longer.)

Every process has the whole model and does all cheap work on the same data with the same random numbers. The
expensive work is split: each process computes its share of the items (prompts of a step, conversations of
SFT, games of evaluation). Results are exchanged and gradients summed, so all processes take the same
optimizer step, and K processes end in the adapter of one up to rounding, which may turn a sampled token.
Rank 0 alone prints and writes. With one process nothing is exchanged.
"""

import os
import sys
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from run.errors import InputError, one_line


class LostRank(InputError):
    """Another process cannot be reached. All that was exchanged before is the same in those that are left."""


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def start() -> None:
    """Joins the processes that torchrun has started, if it has.

    The backend is gloo on GPUs too: only adapter gradients and small objects travel, and gloo raises an error
    where a process has died. NCCL would end the whole process, and nothing could be saved."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
        if not first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def own_device(name: str) -> str:
    """The device of this process: the GPU of its local rank where several processes share "cuda"."""
    if world() > 1 and name == "cuda":
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(name)
    return name


@contextmanager
def _reports_lost_ranks():
    try:
        yield
    except RuntimeError as e:  # torch's DistBackendError is one
        raise LostRank(f"another process of this run cannot be reached ({one_line(e, 100)})") from None


def exchange(value) -> list:
    """The value of every process, by rank. It returns when all of them have called it."""
    if world() == 1:
        return [value]
    values = [None] * world()
    with _reports_lost_ranks():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def first_goes_first():
    """Rank 0 runs the block before the others do, so that they find what it leaves on the disk."""
    if not first():
        exchange(None)
    yield
    if first():
        exchange(None)


def share(keys: Iterable[Hashable]) -> list[int]:
    """The indices of this process's items; items with the same key stay together."""
    number: dict[Hashable, int] = {}
    return [i for i, key in enumerate(keys) if number.setdefault(key, len(number)) % world() == rank()]


def split(keys: Iterable[Hashable], compute: Callable[[list[int]], list]) -> list:
    """Computes one value for every item, each process those of its share, and returns the values of all items
    in their order. compute: the indices of some items -> their values."""
    mine = share(keys)
    pairs = [pair for part in exchange(list(zip(mine, compute(mine), strict=True))) for pair in part]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Every process's .grad becomes the sum of all of them. A parameter without a gradient counts as 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world() == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters]).cpu()
    with _reports_lost_ranks():
        dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p).to(p.device)

"""Checkpoints: everything a stopped run needs to end in the same adapter, bit for bit, as one that was never
stopped.

A checkpoint is a folder `step-000040` with two files, no pickle: tensors.safetensors (adapter, optimizer
moments) and state.json (steps done, memory, whatever else the loop keeps). It is written under another name
and renamed when it is complete, so a killed write is never taken for a checkpoint.

There are no random states to save: every random number of a run comes from a generator that is seeded by the
run's seed, its purpose and the step (`seeded`), so the number of steps done is the whole random state.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from run.files import InputError, write_json


def seeded(*numbers: int) -> torch.Generator:
    """A torch generator seeded by several numbers: (seed, purpose, step)."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    )


def shuffled(count: int, size: int, step: int, *seeds: int) -> list[int]:
    """The indices of the step-th batch of `size` when `count` items are gone through in a new order every
    epoch."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        indices.append(int(np.random.default_rng([*seeds, epoch]).permutation(count)[offset]))
    return indices


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"optimizer.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def save_checkpoint(
    folder: Path,
    step: int,
    adapter: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    extra: dict,
    keep: int = 2,
) -> Path:
    """Writes FOLDER/step-XXXXXX (`step` steps are done) and removes all but the newest `keep`."""
    final = Path(folder) / f"step-{step:06d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tensors = {f"adapter.{k}": v for k, v in adapter.items()} | _optimizer_tensors(optimizer)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
        write_json(temporary / "state.json", {"step": step, "extra": extra})
        os.rename(temporary, final)
    except OSError as e:
        raise InputError(
            f"cannot write the checkpoint {final}: {e.strerror}; older ones are untouched"
        ) from None
    for old in sorted(Path(folder).glob("step-??????"))[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none."""
    return max(Path(folder).glob("step-??????"), default=None)


def load_checkpoint(
    path: Path, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, torch.Tensor], dict]:
    """Restores the optimizer in place. Returns (steps done, adapter tensors, extra)."""
    try:
        tensors = load_file(path / "tensors.safetensors")
        state = json.loads((path / "state.json").read_text())
        step, extra = state["step"], state["extra"]
    except Exception as e:  # safetensors raises its own error type for a damaged file
        raise InputError(
            f"the checkpoint {path} cannot be read ({e}); remove it to continue from the one before"
        ) from None
    moments: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": moments, "param_groups": full["param_groups"]})
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    return step, adapter, extra

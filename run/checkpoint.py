"""Checkpoints: everything a stopped run needs to end in the same adapter, bit for bit, as one that was never
stopped.

A checkpoint is a folder `step-000040` with two files, no pickle: tensors.safetensors (adapter, optimizer
moments) and state.json (steps done, memory, whatever else the loop keeps, and a checksum of all this). It is
written under another name and renamed when it is complete, so a killed write is never taken for a checkpoint;
one that a disk or an editor has changed is passed over for the one before.

There are no random states to save: every random number of a run comes from a generator that is seeded by the
run's seed, its purpose and the step (`seeded`), so the number of steps done is the whole random state.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from run.files import InputError, library_errors, read_json, write_atomic, write_json


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
    """Writes FOLDER/step-XXXXXX (`step` steps are done) and keeps `keep` checkpoints."""
    final = Path(folder) / f"step-{step:06d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a kill
    with library_errors(f"cannot write the checkpoint {final}"):
        temporary.mkdir(parents=True)
        tensors = {f"adapter.{k}": v for k, v in adapter.items()} | _optimizer_tensors(optimizer)
        data = safetensors.torch.save({k: v.detach().contiguous() for k, v in tensors.items()})
        write_atomic(temporary / "tensors.safetensors", data)
        state = {"step": step, "extra": extra}
        write_json(temporary / "state.json", state | {"sha256": _checksum(data, state)})
        shutil.rmtree(final, ignore_errors=True)  # one that was passed over
        os.rename(temporary, final)
    prune(folder, step, keep)
    return final


def prune(folder: Path, step: int, keep: int = 2) -> None:
    """Removes the checkpoints before that of `step` but for `keep` - 1, and what kills have left: of a write,
    or of this."""
    before = [path for path in Path(folder).glob("step-??????") if path.name < f"step-{step:06d}"]
    for path in [*sorted(before)[: len(before) - keep + 1], *Path(folder).glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _checksum(tensors: bytes, state: dict) -> str:
    checksum = hashlib.sha256(tensors)
    checksum.update(json.dumps([state["step"], state["extra"]]).encode())
    return checksum.hexdigest()


def restore(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[int, dict, dict] | None:
    """Loads the newest checkpoint of a folder that is whole; None if there is none. InputError: none of them
    is (to begin anew without a word would cost the user the run)."""
    damaged = []
    for path in sorted(Path(folder).glob("step-??????"), reverse=True):
        try:
            found = load_checkpoint(path, optimizer)
        except InputError as e:
            damaged.append(e)
            continue
        if damaged:
            print(f"{damaged[0]}; going on from {path.name}, the newest one that is whole")
        return found
    if damaged:
        raise damaged[0]
    return None


def load_checkpoint(
    path: Path, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, torch.Tensor], dict]:
    """Restores the optimizer in place. Returns (steps done, adapter tensors, extra)."""
    with library_errors(f"the checkpoint {path} is damaged"):
        data, state = (path / "tensors.safetensors").read_bytes(), read_json(path / "state.json")
        if state.get("sha256") != _checksum(data, state):
            raise ValueError("its checksum is another")
        tensors, step, extra = safetensors.torch.load(data), state["step"], state["extra"]
    moments: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    full = optimizer.state_dict()
    optimizer.load_state_dict({"state": moments, "param_groups": full["param_groups"]})
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    return step, adapter, extra

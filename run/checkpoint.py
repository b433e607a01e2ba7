"""Checkpoints: what a stopped run needs to end in the same adapter, bit for bit, as one that was not stopped.

A checkpoint is a folder `step-000040` with two files, neither of them a pickle: tensors.safetensors
("adapter.NAME" for each parameter, "optimizer.INDEX.KEY" for its moments) and state.json (the steps done,
what else the stage keeps, and a checksum of all this). It is written under another name and renamed when it
is complete, so half of one is never taken for a checkpoint. One that a disk or an editor has changed is
passed over for the one before. Random states are not needed (run/seeds.py).
"""

import hashlib
import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from run.errors import InputError, library_errors
from run.files import read_json, replace, write_atomic, write_json


def save(
    folder: Path, step: int, parameters: dict[str, Parameter], optimizer: Optimizer, state: dict
) -> None:
    """Writes FOLDER/step-XXXXXX, where `step` is the number of steps done and `state` any JSON object."""
    final = Path(folder) / f"step-{step:06d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
    tensors = {f"adapter.{name}": p for name, p in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in moments.items()}
    with library_errors(f"cannot write the checkpoint {final}"):
        temporary.mkdir(parents=True)
        data = safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()})
        write_atomic(temporary / "tensors.safetensors", data)
        checksum = _checksum(data, step, state)
        write_json(temporary / "state.json", {"step": step, "extra": state, "sha256": checksum})
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
        replace(temporary, final)
    prune(folder, step)


def prune(folder: Path, step: int) -> None:
    """Of the checkpoints before that of `step`, leaves the newest one alone. Removes also what killed
    processes have left, of a write or of a removal."""
    before = [path for path in Path(folder).glob("step-??????") if path.name < f"step-{step:06d}"]
    for path in [*sorted(before)[:-1], *Path(folder).glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path, parameters: dict[str, Parameter], optimizer: Optimizer) -> tuple[int, dict] | None:
    """Copies the newest whole checkpoint of a folder into the parameters and the optimizer. Returns the
    number of steps done and the state; None if there is no checkpoint.

    InputError: none of them is whole (to begin anew without a word would cost the user the run), or the
    newest whole one has other parameters."""
    damaged = []
    for path in sorted(Path(folder).glob("step-??????"), reverse=True):
        try:
            step, tensors, state = _read(path)
        except InputError as e:
            damaged.append(e)
            continue
        if damaged:
            print(f"{damaged[0]}; going on from {path.name}, the newest one that is whole")
        with library_errors(f"{path} was saved with other settings than those in config.json"):
            _load(tensors, parameters, optimizer)
        return step, state
    if damaged:
        raise damaged[0]
    return None


def _checksum(tensors: bytes, step: int, state: dict) -> str:
    checksum = hashlib.sha256(tensors)
    checksum.update(json.dumps([step, state]).encode())  # a sum of both would be a copy of the tensors
    return checksum.hexdigest()


def _read(path: Path) -> tuple[int, dict[str, torch.Tensor], dict]:
    with library_errors(f"the checkpoint {path} is damaged"):
        data, content = (path / "tensors.safetensors").read_bytes(), read_json(path / "state.json")
        step, state = content["step"], content["extra"]
        if content["sha256"] != _checksum(data, step, state):
            raise ValueError("its checksum does not match")
        return step, safetensors.torch.load(data), state


@torch.no_grad()
def _load(tensors: dict[str, torch.Tensor], parameters: dict[str, Parameter], optimizer: Optimizer) -> None:
    """ValueError: the tensors are not those of the parameters; nothing is changed then."""
    values, moments = {}, {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "adapter":
            values[name] = tensor
        else:
            index, name = name.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    saved, here = ({name: tuple(t.shape) for name, t in group.items()} for group in (values, parameters))
    for name in [*here, *saved]:
        if saved.get(name) != here.get(name):
            shapes = f"{saved.get(name, 'none')} there and {here.get(name, 'none')} in this model"
            raise ValueError(f"the shape of {name} is {shapes}")
    for name, p in parameters.items():
        p.copy_(values[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

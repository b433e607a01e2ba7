"""Checkpoints: what they give back, what of them is removed, and that every damage is noticed."""

import hashlib
import json
import os
import re

import pytest
import safetensors.torch
import torch
from whole_runs import edited, given

from run import checkpoint
from run.errors import InputError


def made(steps=0):
    """Two parameters and their optimizer after some steps."""
    a = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    parameters = {"base_model.model.x.lora_A.weight": a, "b": torch.nn.Parameter(torch.ones(4))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    train(parameters, optimizer, steps)
    return parameters, optimizer


def train(parameters, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()


def values(parameters, optimizer):
    tensors = dict(parameters)
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {(i, key): t for key, t in moments.items()}
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items()}


def test_the_format_is_that_of_older_runs(tmp_path):
    """Their checkpoints can be restored: the file is written here by hand."""
    old, (parameters, optimizer) = made(3), made()
    tensors = {f"adapter.{name}": p.detach() for name, p in old[0].items()}
    for i, moments in old[1].state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": t for key, t in moments.items()}
    data, extra = safetensors.torch.save(tensors), {"memory": {"g": 0.5}, "lines": {"metrics.jsonl": 3}}
    sha256 = hashlib.sha256(data + json.dumps([3, extra]).encode()).hexdigest()
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "tensors.safetensors").write_bytes(data)
    state = json.dumps({"step": 3, "extra": extra, "sha256": sha256})
    (tmp_path / "step-000003" / "state.json").write_text(state)
    assert checkpoint.restore(tmp_path, parameters, optimizer) == (3, extra)
    assert values(parameters, optimizer) == values(*old)
    checkpoint.save(tmp_path / "new", 3, parameters, optimizer, extra)
    new = tmp_path / "new" / "step-000003"
    assert (new / "tensors.safetensors").read_bytes() == data
    assert json.loads((new / "state.json").read_text()) == json.loads(state)


def test_pruning_takes_what_kills_left_and_keeps_two(tmp_path):
    for name in ("step-000001", "step-000002", "step-000003", "step-000004", "step-000002.tmp"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 3)  # the newest one is damaged: the run went on from the one before
    left = ["step-000002", "step-000003", "step-000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == left


OTHERS = [("b", torch.ones(2, 2), "b is (4,) there and (2, 2)"), ("b", None, "b is (4,) there and none")]


@pytest.mark.parametrize("name, other, shapes", [*OTHERS, ("c", torch.ones(1), "c is none there and (1,)")])
def test_a_checkpoint_of_other_parameters_is_refused_and_nothing_is_changed(name, other, shapes, tmp_path):
    checkpoint.save(tmp_path, 1, *made(1), {})
    parameters, optimizer = made()
    parameters |= {name: other if other is None else torch.nn.Parameter(other)}
    parameters = {name: p for name, p in parameters.items() if p is not None}
    before = values(parameters, optimizer)
    with pytest.raises(InputError, match=f"other settings than .*{re.escape(shapes)} in this model"):
        checkpoint.restore(tmp_path, parameters, optimizer)
    assert values(parameters, optimizer) == before


def changed(change):
    return lambda folder: (folder / "state.json").write_bytes(
        edited((folder / "state.json").read_text(), change)
    )


def flip_a_bit(folder):
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "tensors.safetensors").write_bytes(data)


DAMAGE = {
    "a bit of a weight": flip_a_bit,
    "half of the weights": lambda folder: os.truncate(folder / "tensors.safetensors", 100),
    "no weights": lambda folder: (folder / "tensors.safetensors").unlink(),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "no end": lambda folder: (folder / "state.json").write_text("[" * 100_000),
} | {change: changed(change) for change in given("state.json")}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_every_damage_is_noticed(damage, tmp_path, capsys):
    """The checkpoint before is taken; where there is none, the run is not begun anew but refused."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, *made(step), {"memory": {"a": 1 / 3}})
    assert checkpoint.restore(tmp_path, *made())[0] == 2 and capsys.readouterr().out == ""
    damage(tmp_path / "step-000002")
    fresh = made()
    assert checkpoint.restore(tmp_path, *fresh) == (1, {"memory": {"a": 1 / 3}})
    assert values(*fresh) == values(*made(1))
    (line,) = capsys.readouterr().out.splitlines()
    assert "step-000002" in line and line.endswith("going on from step-000001, the newest one that is whole")
    damage(tmp_path / "step-000001")
    with pytest.raises(InputError, match="step-000002"):
        checkpoint.restore(tmp_path, *made())
    checkpoint.save(tmp_path, 2, *made(2), {})  # it takes the damaged one's place
    assert checkpoint.restore(tmp_path, *made())[0] == 2

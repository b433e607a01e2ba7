"""Runs that are stopped and resumed end bit for bit as one that was never stopped; checkpoints."""

import json
import os
import shutil
import signal

import pytest
import torch
from whole_runs import (
    Run,
    assert_same_run,
    ended,
    interrupted,
    latest_checkpoint,
    lines_of,
    rft_flags,
    run_rft,
    start,
    wait_for_lines,
    without_timings,
)

import train_rft
from run import checkpoint
from run.files import InputError


@pytest.fixture(scope="module")
def stopped(model_dir, tmp_path_factory):
    """A run that was stopped by Ctrl-C in its third step of RFT, which is not one that saves."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = interrupted(patch, rft_flags(model_dir, folder), folder / "metrics.jsonl", 3)
    assert f"--resume {folder}" in said and not (folder / "adapter").exists()
    assert latest_checkpoint(folder).name == "step-000003"
    return Run(folder, said=said)


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def resume(run, *argv):
    run_rft(["--resume", str(run.folder), *argv])
    return run


def test_every_setting_is_that_of_the_run_whatever_else_is_given(full, copied):
    config = (copied.folder / "config.json").read_bytes()
    assert_same_run(
        resume(copied, *"--seed 99 --m 2 --lr 1 --steps 1 --algo grpo --engine plain".split()), full
    )
    assert (copied.folder / "config.json").read_bytes() == config
    assert (copied.folder / "timing.json").exists()


def test_a_run_goes_on_without_the_flags_that_are_newer_than_it(full, copied):
    """They have their defaults, whatever is given."""
    config = json.loads((copied.folder / "config.json").read_text())
    for name in ("engine", "reward", "objective"):
        del config[name]
    (copied.folder / "config.json").write_text(json.dumps(config))
    assert_same_run(resume(copied, "--engine", "plain", "--reward", "local=9"), full)


def test_that_a_policy_loss_of_0_is_right_is_said_once(full, stopped, copied, capsys):
    resume(copied)
    for said, times in ((full.said, 1), (stopped.said, 1), (capsys.readouterr().out, 0)):
        assert said.count("RFT: ") == said.count("policy loss of 0 at step 0") == times


def test_a_run_that_was_stopped_in_sft_ends_the_same(full, model_dir, tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    log = run.folder / "sft" / "metrics.jsonl"  # it begins with the held-out losses
    said = interrupted(monkeypatch, rft_flags(model_dir, run.folder), log, 4)
    assert "stopping after this step" not in said and f"--resume {run.folder}" in said
    assert latest_checkpoint(run.folder / "sft").name == "step-000003"
    assert not (run.folder / "metrics.jsonl").exists() and not (run.folder / "sft" / "adapter").exists()
    assert_same_run(resume(run), full)


def test_a_run_that_was_killed_ends_the_same(full, model_dir, tmp_path):
    folder = tmp_path / "run"
    processes = start(rft_flags(model_dir, folder), tmp_path / "output")
    wait_for_lines(folder / "metrics.jsonl", 3)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert ended(processes) == [-signal.SIGKILL]
    assert len(lines_of(folder / "metrics.jsonl")) < 6, "the run was over before the signal came"
    # what a kill within a write would leave: none of it may be taken for whole
    # or one that removes an old checkpoint
    for number in ("000004.tmp", "000099.tmp", "000000"):
        half = folder / "checkpoints" / f"step-{number}"
        half.mkdir(exist_ok=True)
        (half / "tensors.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as f:
            f.write('{"step": 5, "rew')
    assert_same_run(resume(Run(folder)), full)
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert not list(folder.rglob("*.tmp")) and kept == ["step-000004", "step-000006"]


def test_pruning_takes_what_kills_left_and_keeps_two(tmp_path):
    for name in ("step-000001", "step-000002", "step-000003", "step-000004", "step-000002.tmp"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 3)  # the newest one is damaged: the run went on from the one before
    left = ["step-000002", "step-000003", "step-000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_resuming_a_finished_run_changes_nothing_of_it(full, tmp_path):
    shutil.copytree(full.folder, tmp_path / "copy")
    assert_same_run(resume(Run(tmp_path / "copy")), full)


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    (tmp_path / "step-000004.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.restore(folder, None) is None


def test_checkpoints_keep_the_newest_and_give_back_all(tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in (1, 2, 3, 10):
        sum((p**2).sum() for p in parameters).backward()
        optimizer.step()
        adapter = {f"p{i}": p for i, p in enumerate(parameters)}
        checkpoint.save_checkpoint(tmp_path, step, adapter, optimizer, {"memory": {"a": 1 / 3}}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    fresh = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters], lr=0.1)
    step, adapter, extra = checkpoint.restore(tmp_path, fresh)
    assert step == 10 and extra == {"memory": {"a": 1 / 3}}
    assert all(torch.equal(adapter[f"p{i}"], p) for i, p in enumerate(parameters))
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() == {0, 1}
    for i in old:
        assert old[i].keys() == new[i].keys() and all(torch.equal(old[i][k], new[i][k]) for k in old[i])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_lost_lines_are_named(full, copied, capsys):
    """The run ends in the same adapter; of the log all is there but what was lost."""
    flip_a_bit(copied.folder / "checkpoints" / "step-000003" / "tensors.safetensors")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (copied.folder / name).read_text().splitlines(keepends=True)
        (copied.folder / name).write_text("".join([*lines[1:], "[" * 5000, "\n[1]\n", '{"step": "a"}\n']))
    for name in ("prompts.jsonl", "probe.jsonl"):  # lines that are of this program as little
        with open(copied.folder / name, "a") as f:
            f.write('{"step": 0, "stage": "SFT"}\n')
    resume(copied)
    said = capsys.readouterr().out
    assert "step-000003 is damaged: its checksum is another; going on from step-000002" in said
    assert f"{copied.folder / 'metrics.jsonl'} has lost 1 of its 2 lines" in said
    assert f"{copied.folder / 'samples.jsonl'} has lost 1 of its 32 lines" in said
    assert "probe.jsonl has lost" not in said
    assert copied.weights() == full.weights()
    for name in ("metrics.jsonl", "samples.jsonl"):
        a, b = without_timings(copied.lines(name)), without_timings(full.lines(name))
        assert a == b[1:] and len(a) > 4


def test_a_probe_that_a_lost_process_cut_short_is_asked_again(full, copied):
    log = copied.folder / "probe.jsonl"
    *before, last = log.read_text().splitlines(keepends=True)
    assert json.loads(last)["stage"] == "TOMPO" and json.loads(last)["step"] == 3
    log.write_text("".join(before))
    assert_same_run(resume(copied), full)


def edited(**changes):
    return lambda folder: (folder / "state.json").write_text(
        json.dumps(json.loads((folder / "state.json").read_text()) | changes)
    )


DAMAGE = {
    "a bit of a weight": lambda folder: flip_a_bit(folder / "tensors.safetensors"),
    "half of the weights": lambda folder: os.truncate(folder / "tensors.safetensors", 100),
    "no weights": lambda folder: (folder / "tensors.safetensors").unlink(),
    "a step that is a word": edited(step="3"),
    "a step before the first": edited(step=-1),
    "no memory": edited(extra={}),
    "no checksum": edited(sha256=None),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "no end": lambda folder: (folder / "state.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_every_damage_of_a_checkpoint_is_noticed(damage, tmp_path, capsys):
    """The one before is taken; where there is none, the run is not begun anew but refused."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    assert checkpoint.restore(tmp_path, optimizer) is None
    for step in (1, 2):
        p.grad = torch.ones(3)
        optimizer.step()
        checkpoint.save_checkpoint(tmp_path, step, {"p": p}, optimizer, {"memory": {"a": 1 / 3}})
    assert checkpoint.restore(tmp_path, optimizer)[0] == 2 and capsys.readouterr().out == ""
    damage(tmp_path / "step-000002")
    step, adapter, extra = checkpoint.restore(tmp_path, optimizer)
    assert step == 1 and extra == {"memory": {"a": 1 / 3}}
    (line,) = capsys.readouterr().out.splitlines()
    assert "step-000002" in line and line.endswith("going on from step-000001, the newest one that is whole")
    damage(tmp_path / "step-000001")
    with pytest.raises(InputError, match="step-000002") as caught:
        checkpoint.restore(tmp_path, optimizer)
    assert "\n" not in str(caught.value)
    checkpoint.save_checkpoint(tmp_path, 2, {"p": p}, optimizer, {})  # it takes the damaged one's place
    assert checkpoint.restore(tmp_path, optimizer)[0] == 2


def test_settings_that_were_changed_after_the_checkpoint_are_named(full, stopped, copied, tmp_path, capsys):
    """In one line; the run goes on with them. One that is as it was, but in another place, has nothing to
    say."""
    shutil.copytree(stopped.folder, tmp_path / "moved")
    assert_same_run(resume(Run(tmp_path / "moved")), full)
    assert "was changed" not in capsys.readouterr().out
    config = json.loads((copied.folder / "config.json").read_text())
    changes = {"lr": 1e-3, "seed": 4, "reward": None, "agents": [4, 4], "max_steps": 4}
    (copied.folder / "config.json").write_text(json.dumps(config | changes))
    resume(copied)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "was changed after" in line]
    assert line.startswith(f"{copied.folder}: config.json") and len(copied.lines("metrics.jsonl")) == 4
    for what in ("lr 0.005 -> 0.001", "seed 3 -> 4", "agents [3, 3] -> [4, 4]", "max_steps None -> 4"):
        assert what in line
    assert "reward ['local=0.5', 'global=0.5'] -> None" in line and line.count("->") == len(changes)


def test_a_checkpoint_of_other_settings_is_refused(copied, refused):
    config = json.loads((copied.folder / "config.json").read_text()) | {"rank": 3}
    (copied.folder / "config.json").write_text(json.dumps(config))
    (copied.folder / "sft" / "adapter" / "adapter_config.json").unlink()
    said = refused(train_rft.main, ["--resume", copied.folder])
    assert "is of other settings than its config.json" in said and "has shape" in said


def test_a_run_with_settings_that_are_gone_is_refused_not_changed(copied, refused):
    """Else an old `all_seats: true` would silently become training in seat 0."""
    config = json.loads((copied.folder / "config.json").read_text()) | {"all_seats": True}
    (copied.folder / "config.json").write_text(json.dumps(config))
    assert "settings that are gone (all_seats)" in refused(train_rft.main, ["--resume", copied.folder])

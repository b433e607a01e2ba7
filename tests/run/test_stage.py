"""A stage, here of a model of four numbers: a stopped one that is resumed ends bit for bit as an unbroken
one, and what goes wrong is reported. Whole runs of language models: test_resume.py and test_ranks.py."""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from whole_runs import tree

from run import checkpoint, files, ranks, stage
from run.errors import InputError
from run.seeds import torch_generator

STEPS = 6


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    monkeypatch.setattr(stage, "SAVE_EVERY", 2)


def train(folder, event=lambda *_: None, steps=STEPS, probe=None, **flags):
    """A training run. event: is called in each step before the update ("gradient") and after it ("update"),
    and may return another loss for the log."""
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer, flags = torch.optim.AdamW([p], lr=0.1), {"out": str(folder), "agents": (3, 4)} | flags
    with (
        files.StopSignal() as stop,
        stage.Stage(folder / "sft", "SFT", steps, {"a.b.A": p}, optimizer, stop, flags) as run,
    ):
        run.probe, samples = probe, run.open_log("samples")
        for step in run.steps():
            target = torch.randn(4, generator=torch_generator(0, step))
            loss = ((p - target) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            event("gradient", step, p)
            optimizer.step()
            logged = event("update", step, p) or {"loss": loss.item()}
            samples.write({"step": step, "target": target.tolist()})
            run.state.setdefault("losses", []).append(loss.item())
            run.end_step(logged, f"loss {loss:.3f}")
    return run


def at(step, what, point="gradient"):
    """An event that does something once."""
    return lambda at_point, at_step, p: what() if (at_point, at_step) == (point, step) else None


def raises(error):
    def event():
        raise error

    return event


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def result(folder):
    """All that a run leaves, by file, but its seconds."""
    left = tree(folder)
    for name in left:
        if name.endswith("state.json"):
            state = json.loads(left[name])
            del state["sha256"], state["extra"]["seconds"]
            left[name] = state
    return left


def final(folder):
    """The same without the checkpoint before the last, whose step depends on the stops."""
    left = result(folder)
    last = max(name for name in left if "step-" in name).rpartition("/")[0]
    return {name: left[name] for name in left if "step-" not in name or name.startswith(last)}


@pytest.fixture
def whole(tmp_path):
    train(tmp_path / "whole")
    return result(tmp_path / "whole")


def saved(folder):
    return sorted(path.name for path in (folder / "sft" / "checkpoints").glob("*"))


def test_a_whole_run_leaves_its_logs_and_the_last_two_checkpoints(tmp_path, whole):
    assert saved(tmp_path / "whole") == ["step-000004", "step-000006"]
    lines = [json.loads(line) for line in whole["sft/metrics.jsonl"].splitlines()]
    state = whole["sft/checkpoints/step-000006/state.json"]["extra"]
    assert lines == [{"step": step, "loss": loss} for step, loss in enumerate(state["losses"])]
    assert state["lines"] == {"metrics.jsonl": STEPS, "samples.jsonl": STEPS} and len(lines) == STEPS
    assert state["settings"] == {"agents": [3, 4]} and len(whole) == 6


@pytest.mark.parametrize("point", ["gradient", "update"])
@pytest.mark.parametrize("step", range(STEPS))
def test_what_ctrl_c_has_stopped_ends_the_same(step, point, tmp_path, whole, capsys):
    stopped = train(tmp_path / "run", at(step, ctrl_c, point))
    assert (
        stopped.steps_done == step + 1 and not stopped.finished
    )  # nor does what follows the last step begin
    assert saved(tmp_path / "run")[-1] == f"step-{step + 1:06d}"  # the step in progress was saved
    assert "stopping after this step" in capsys.readouterr().err
    assert train(tmp_path / "run").finished
    assert final(tmp_path / "run") == final(tmp_path / "whole")


@pytest.mark.parametrize("point", ["gradient", "update"])
@pytest.mark.parametrize("step", range(STEPS))
def test_what_was_killed_ends_the_same(step, point, tmp_path, whole):
    with pytest.raises(Killed):
        train(tmp_path / "run", at(step, raises(Killed), point))
    checkpoints = tmp_path / "run" / "sft" / "checkpoints"
    (checkpoints / "step-000099.tmp").mkdir(parents=True)  # a kill in the midst of a write
    with open(tmp_path / "run" / "sft" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    began = []
    train(tmp_path / "run", lambda point, step, p: began.append(step))
    assert began[0] == step // 2 * 2 and result(tmp_path / "run") == whole


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
    for name in ("step-000001", "step-000006.tmp"):  # a kill within the last save left them
        (tmp_path / "whole" / "sft" / "checkpoints" / name).mkdir()
    run = train(tmp_path / "whole", raises(Killed))
    assert run.finished and result(tmp_path / "whole") == whole
    assert saved(tmp_path / "whole") == ["step-000004", "step-000006"]
    assert train(tmp_path / "whole", raises(Killed), steps=4).finished  # a number of steps that was lowered


def test_a_second_signal_stops_at_once_unless_it_is_the_same_one_sent_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with files.StopSignal() as stop:
        for now[0] in (0.0, 0.9):
            ctrl_c()
        assert stop.requested
        now[0] = 1.1
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_the_probe_is_asked_before_the_first_step_and_after_each(tmp_path, monkeypatch, capsys):
    """Its time is not that of the steps."""
    now, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def probe(step, seconds):
        asked.append((step, seconds))
        now[0] += 100
        return f", probe: {step}"

    def second(point, step, p):
        now[0] += point == "update"
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, second, probe=probe)
    assert asked == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)] and ", probe: 3" in capsys.readouterr().err
    asked.clear()
    run = train(tmp_path, at(9, ctrl_c), probe=probe)
    assert asked == [(2, 2.0), *((step, 2.0) for step in range(3, STEPS + 1))] and run.seconds == 2.0


NOT_FINITE = [({"loss": math.nan}, "step 3: the loss is nan")]
NOT_FINITE += [({"loss": 1.0, "grad_norm": math.inf}, "step 3: the gradient norm is inf")]


@pytest.mark.parametrize(("logged", "said"), NOT_FINITE)
def test_a_loss_that_is_not_finite_ends_the_run_and_the_checkpoint_before_stays(logged, said, tmp_path):
    for _ in range(2):  # resumed, it comes again
        with pytest.raises(InputError, match=f"{said}, and training ends here; the checkpoints in"):
            train(tmp_path, at(3, lambda: logged, "update"))
        assert saved(tmp_path) == ["step-000002"]
        metrics = (tmp_path / "sft" / "metrics.jsonl").read_text()
        assert "NaN" not in metrics and "Infinity" not in metrics and metrics.count("\n") == 3


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    def spoil(point, step, p):
        if (point, step) == ("update", 3):
            p.data[2] = math.nan

    with pytest.raises(InputError, match="after step 3, a.b.A holds values that are not finite, and"):
        train(tmp_path, spoil)
    assert saved(tmp_path) == ["step-000002"]


LOST = [("gradient", 3, "step-000003"), ("update", 3, "step-000002"), ("probe", 3, "step-000003")]


@pytest.mark.parametrize(("point", "step", "newest"), [*LOST, ("gradient", 0, None)])
def test_what_is_complete_is_saved_when_another_process_is_lost(point, step, newest, tmp_path, whole):
    """Within a step, after the update, the parameters are not those of a step."""
    lost = raises(ranks.LostRank("another process cannot be reached"))
    how = {"event": at(step, lost, point)}
    if point == "probe":
        how = {"probe": lambda at_step, seconds: lost() if at_step == step else ""}
    with pytest.raises(InputError, match="reached; continue from the newest checkpoint with") as caught:
        train(tmp_path / "run", **how)
    assert str(caught.value).endswith(f"--resume {tmp_path / 'run'}")
    assert (saved(tmp_path / "run") or [None])[-1] == newest
    train(tmp_path / "run")
    assert final(tmp_path / "run") == final(tmp_path / "whole")


def test_logs_are_on_the_disk_before_the_checkpoint_that_is_newer(tmp_path, monkeypatch):
    order, sync, save = [], files.JsonLines.sync, checkpoint.save
    monkeypatch.setattr(files.JsonLines, "sync", lambda log: order.append(log.path.stem) or sync(log))
    monkeypatch.setattr(checkpoint, "save", lambda *args: order.append(args[1]) or save(*args))
    train(tmp_path)
    assert order == ["metrics", "samples", 2, "metrics", "samples", 4, "metrics", "samples", 6]


def test_damage_lost_lines_and_changed_settings_are_reported(tmp_path, whole, capsys):
    """The run goes on from the checkpoint before. Its folder, and a newer setting, are no change."""
    train(tmp_path / "first", at(4, ctrl_c), lr=0.1, gone=1)
    shutil.move(tmp_path / "first", tmp_path / "run")
    folder = tmp_path / "run" / "sft"
    with open(folder / "checkpoints" / "step-000005" / "tensors.safetensors", "ab") as f:
        f.write(b"more")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[1:], "[" * 5000, "\n[1]\n", '{"step": "a"}\n']))
    capsys.readouterr()
    train(tmp_path / "run", lr=0.2, new=1)
    said = capsys.readouterr().out.splitlines()
    assert "step-000005 is damaged: its checksum does not match; going on from step-000004" in said[0]
    assert said[1].startswith(f"{folder}: this was changed after the checkpoint: lr 0.1 -> 0.2. So it is")
    assert said[2] == f"{folder / 'metrics.jsonl'} has lost 1 of its 4 lines; the weights are not touched"
    left = result(tmp_path / "run")
    assert left["sft/samples.jsonl"] == whole["sft/samples.jsonl"] and len(said) == 3
    assert left["sft/metrics.jsonl"] == b"".join(whole["sft/metrics.jsonl"].splitlines(keepends=True)[1:])

"""Whole runs of the training scripts on the tiny model, for the tests that start, stop or read them.

Replies of a random model are garbage, so every reward would be the same and every advantage 0: RFT would do
nothing, and tests of it could not fail. So in these runs the parser of train_rft.py alone is replaced by one
that reads a decision from the reply's checksum (`fake_parse`): rewards vary, adapters move, and memory fills.
Checkpoints and probes are more frequent than in real runs, which are longer, and ask less. All is on the CPU.
"""

import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lora
import settings
import train_rft
import train_sft
from decisions import EFFORTS, LINKS
from games import Decision
from play import probe
from run import files, stage

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("tokens_per_s", "sample_s", "update_s", "seconds")

# Every setting is given, so that config.json can be compared with what was asked for.
SHARED = dict(preset="small", dtype="float32", engine="fast", rounds=1, game=["bcz"], stages=["GE"])
SHARED |= dict(expert="second-best", information="full", games=4, agents=3, noise=0.3, seat="all")
SHARED |= dict(rank=4, lora_alpha=8, targets=lora.DEFAULT_TARGETS, train_on="both", sft_steps=6, sft_batch=3)
SHARED |= dict(sft_lr=1e-3, seed=3, micro_batch=2, label_noise=0.0)
RFT_ONLY = dict(algo="tompo", steps=6, prompts=[2, 2], m=4, lr=5e-3, inner_epochs=1, temperature=1.0)
RFT_ONLY |= dict(reward_from="expert", weights=["A_S=0.8", "A_G=0.2"], clip_eps=[0.2], beta=0.02)
RFT_ONLY |= dict(objective=["aggregation=sequence"], eval_games=2, max_new_tokens=14)
GENTLE = 2e-4  # a learning rate of RFT at which rounding does not grow until it turns a sampled token


def flags(values):
    argv = []
    for name, value in values.items():
        if value is not None:
            several = value if isinstance(value, (list, tuple)) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, several)]
    return argv


def given(section):
    """The bad inputs of a section of campaign/inputs.txt, which the campaign tries on whole processes."""
    text = (ROOT / "tests" / "campaign" / "inputs.txt").read_text()
    (lines,) = re.findall(rf"(?m)^# {section}\b.*\n((?:[^#].*\n)+)", text)
    return re.split("[|\n]", lines.strip())


def edited(text, change):
    """An object of JSON with another value: NAME=VALUE, where VALUE may name the old ones."""
    values = json.loads(text)
    name, _, value = change.partition("=")
    return json.dumps(values | {name: eval(value, {}, values)}).encode()


def sft_flags(model, out, **changes):
    return flags(SHARED | {"model": model, "out": out} | changes)


def rft_flags(model, out, **changes):
    return flags(SHARED | RFT_ONLY | {"model": model, "out": out} | changes)


def parsed(argv, script=train_rft):
    """-> (its parser, the settings) of a training script with these flags; it does nothing else."""

    class Enough(Exception):
        pass

    def stop(parser, name, argv):
        raise Enough(parser, settings.parse_training(parser, name, argv))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough) as enough:
        patch.setattr(script, "parse_training", stop)
        script.main(argv)
    return enough.value.args


def fake_parse(text, state, seat):
    number, game = zlib.crc32(text.encode()), state.game
    if number % 5 == 0:
        return None
    if state.kind is LINKS:
        row_N = np.array([number >> (3 + i) & 1 for i in range(game.N)])
        row_N[seat] = 0
        return Decision(LINKS, row_N)
    return Decision(EFFORTS, float(game.caps[seat]) * (number % 997) / 996)


def replace_as_on_windows(old, new, replace=os.replace):
    """It fails where this process has the file open, or mapped into its memory. (Where Linux tells.)"""
    own = Path("/proc/self")
    if own.exists():
        names = {os.path.realpath(own / "fd" / n) for n in os.listdir(own / "fd")}
        names |= {
            line.split(maxsplit=5)[-1] for line in (own / "maps").read_text().splitlines() if "/" in line
        }
        for path in map(os.path.realpath, (old, new)):
            if any(name == path or name.startswith(f"{path}/") for name in names):
                raise PermissionError(13, "Permission denied (it is open)", str(path))
    replace(old, new)


# What is different in these runs: (module, name, value).
REPLACED = [(train_rft, "parse_reply", fake_parse), (stage, "SAVE_EVERY", 2)]
REPLACED += [(train_sft, "PROBE_EVERY", 3), (train_rft, "PROBE_EVERY", 3)]
REPLACED += [(train_sft, "HELD_OUT_GAMES", 4), (probe, "GAMES", 5), (os, "replace", replace_as_on_windows)]
WITHOUT_CURVES = [(module, "plot_curves", lambda folder: None) for module in (train_rft, probe)]


def on_device(name, change=setattr):
    """From now on all scripts compute on this device. change: monkeypatch.setattr, to undo it later."""
    change(settings, "default_device", lambda: name)


def run_rft(argv, curves=False):
    """train_rft.py in this process with what is REPLACED and, to save time, without the picture."""
    with pytest.MonkeyPatch.context() as patch:
        for replacement in REPLACED + (WITHOUT_CURVES if not curves else []):
            patch.setattr(*replacement)
        train_rft.main(argv)


def short_run(model_dir, sft_adapter, folder, **changes):
    """A few steps on a finished SFT adapter -> its lines of metrics.jsonl and samples.jsonl."""
    changes = dict(sft_adapter=sft_adapter, steps=2, eval_games=1) | changes
    run_rft(rft_flags(model_dir, folder, **changes))
    metrics, samples = (lines_of(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    assert len(metrics) == changes["steps"] and samples
    return metrics, samples


def interrupted(monkeypatch, argv, log, count):
    """run_rft that gets a Ctrl-C when the log has that many lines. Returns what it said."""
    said, write = io.StringIO(), files.JsonLines.write

    def counted(self, value):
        write(self, value)
        if self.path == log and self.count == count:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, redirect_stdout(said), pytest.raises(SystemExit) as stop:
        patch.setattr(files.JsonLines, "write", counted)
        run_rft(argv)
    assert stop.value.code == 130
    return said.getvalue()


def driver(argv, environment=None, output=None, script="train_rft", before=None, device="cpu"):
    """A script in a process of its own, with what is REPLACED. before: is called first."""
    os.environ.update(environment or {})
    if output:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    on_device(device)
    for replacement in REPLACED:
        setattr(*replacement)
    if before:
        before()
    importlib.import_module(script).main(argv)


def start(argv, output, ranks=1, method="forkserver", environment=None, **more):
    """Starts a run in processes of its own: forks of one that has loaded all modules, which takes seconds
    (`fork`: of this one). more: for `driver`."""
    forks = multiprocessing.get_context(method)
    if method == "forkserver":
        forks.set_forkserver_preload(["whole_runs"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for rank in range(ranks):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {})
            processes.append(forks.Process(target=driver, args=(argv, own, str(output)), kwargs=more))
            processes[-1].start()
    return processes


def ended(processes, seconds=180):
    """The exit status of each process; one that takes longer is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def wait_for_lines(path, count):
    deadline = time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the run wrote too few lines in time"
        time.sleep(0.002)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def latest_checkpoint(folder):
    return max((folder / "checkpoints").glob("step-??????"), default=None)


def without_timings(lines):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


@dataclass
class Run:
    folder: Path
    rates: list = ()  # learning rates in the optimizer at the time of each of its steps
    said: str = ""

    def lines(self, name):
        return lines_of(self.folder / name)

    def tensors(self, name="adapter"):
        return load_file(self.folder / name / "adapter_model.safetensors")

    def weights(self, name="adapter"):
        """Every tensor's bytes, by name; the config beside them."""
        config = json.loads((self.folder / name / "adapter_config.json").read_text())
        return {k: v.numpy().tobytes() for k, v in self.tensors(name).items()} | config


def results(run):
    """By name, all that a run leaves which no stop, kill or resume may change: everything but timings."""
    files_left = {name: run.weights(name) for name in ("adapter", "sft/adapter")}
    logs = ("metrics.jsonl", "samples.jsonl", "sft/metrics.jsonl", "prompts.jsonl", "probe.jsonl")
    files_left |= {name: without_timings(run.lines(name)) for name in logs}
    return files_left | {"eval.json": json.loads((run.folder / "eval.json").read_text())["results"]}


def assert_same_run(run, full):
    """All but timings, and how much was compared."""
    a, b = results(run), results(full)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name
    counts = {"metrics.jsonl": 6, "samples.jsonl": 96, "sft/metrics.jsonl": 8}
    counts["probe.jsonl"] = 6  # the levels; SFT at 0, 3, 6; RFT at 3, 6
    assert {name: len(a[name]) for name in counts} == counts
    prompts = a["prompts.jsonl"]
    assert len({(p["game"], p["stage"], p["seat"]) for p in prompts}) == len(prompts) > 10
    assert sum(len(r["instances"]) for r in a["eval.json"].values()) == 12


def assert_same_up_to_rounding(run, gentle):
    for name in ("sft/adapter", "adapter"):
        a, b = run.tensors(name), gentle.tensors(name)
        assert a.keys() == b.keys()
        # Adam turns the rounding of a gradient near 0 into a step of up to lr, in a few of the numbers
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a])
        moved = torch.cat([b[key].flatten() for key in b if "lora_B" in key])
        assert apart.norm() < 1e-3 * moved.norm() and apart.abs().max() < GENTLE
    samples, expected = run.lines("samples.jsonl"), gentle.lines("samples.jsonl")
    assert len(samples) == 96
    for key in ("reply", "compliance", "sample", "r_S"):
        assert [s[key] for s in samples] == [s[key] for s in expected]
    assert [s["advantage"] for s in samples] == pytest.approx([s["advantage"] for s in expected])
    keys = {"metrics": ("loss", "kl", "grad_norm", "s", "R_G"), "sft/metrics": ("loss", "grad_norm")}
    for name in keys:
        for line, other in zip(run.lines(f"{name}.jsonl"), gentle.lines(f"{name}.jsonl"), strict=True):
            for key in keys[name]:
                near = pytest.approx(other[key], rel=1e-2, abs=1e-4) if key in other else None
                assert line.get(key) == near
    final = [latest_checkpoint(r.folder) / "state.json" for r in (run, gentle)]
    memories = [json.loads(path.read_text())["extra"]["memory"] for path in final]
    assert memories[0] == memories[1] != {}


def whole_run(model_dir, folder):
    """SFT, ToMPO, evaluation, curves."""
    rates, said = [], io.StringIO()
    hook = register_optimizer_step_pre_hook(
        lambda o, args, kwargs: rates.append([g["lr"] for g in o.param_groups])
    )
    try:
        with redirect_stdout(said):
            run_rft(rft_flags(model_dir, folder), curves=True)
    finally:
        hook.remove()
    return Run(folder, rates, said.getvalue())

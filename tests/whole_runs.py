"""Whole runs of the training scripts on the tiny model, for the tests that start, stop or read them.

Replies of a random model are garbage, so every reward would be the same and every advantage 0: RFT would do nothing,
and tests of it could not fail. So in these runs the parser of train_rft.py alone is replaced by one that reads a
decision out of the reply's checksum (`fake_parse`): rewards vary, adapters move, and memory fills.
"""

import json
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lora
import train_rft
from prompts import Decision

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("tokens_per_s", "sample_s", "update_s")
DRIVER = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import whole_runs; whole_runs.driver()"

SHARED = dict(
    preset="small", device="cpu", dtype="float32", rounds=1, game=["bcz"], stages=["GE"], alpha=None, delta=None,
    endowment=None, factor=None, size_exponent=None, cost=None, expert="second-best", information="full", games=4,
    agents=3, noise=0.3, rank=4, lora_alpha=8, targets=lora.DEFAULT_TARGETS, train_on="both", sft_steps=6, sft_batch=3,
    sft_lr=1e-3, sft_held_out=1, seed=3, micro_batch=2, save_every=2, max_grad_norm=1.0,
)  # fmt: skip
RFT_ONLY = dict(
    algo="tompo", steps=6, graph_prompts=2, effort_prompts=2, m=4, lr=5e-3, inner_epochs=1, temperature=1.0, w_sample=0.8, w_graph=0.2,
    w_local=0.5, w_global=0.5, clip_eps=0.2, beta=0.02, aggregation="sequence", seat=0, eval_agents=3, eval_games=2,
    eval_temperature=1.0, max_new_tokens=14, eval_seed=0,
)  # fmt: skip


def flags(values):
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return argv


def sft_flags(model, out, **changes):
    return ["--all-seats", *flags(SHARED | {"model": model, "out": out} | changes)]


def rft_flags(model, out, **changes):
    return ["--all-seats", *flags(SHARED | RFT_ONLY | {"model": model, "out": out} | changes)]


def fake_parse(text, kind, seat, N, cap):
    number = zlib.crc32(text.encode())
    if number % 5 == 0:
        return None
    if kind == "G":
        row_N = np.array([number >> (3 + i) & 1 for i in range(N)])
        row_N[seat] = 0
        return Decision("G", row_N)
    return Decision("E", cap * (number % 997) / 996)


def run_rft(argv, curves=False):
    """train_rft.py in this process, with the parser replaced and, for time's sake, without the picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rft, "parse_reply", fake_parse)
        if not curves:
            patch.setattr(train_rft, "plot_curves", lambda *args: None)
        train_rft.main(argv)


def driver():
    """train_rft.py in a process of its own, with the parser replaced."""
    train_rft.parse_reply = fake_parse
    train_rft.main(sys.argv[1:])


def start(argv):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_lines(process, path, count):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    raise AssertionError("the run wrote too few lines in time")


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_timings(lines):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@dataclass
class Run:
    folder: Path
    rates: list  # learning rates in the optimizer at the time of each of its steps

    def lines(self, name):
        return lines_of(self.folder / name)

    def weights(self, name="adapter"):
        """Every tensor's bytes, by name; the config beside them."""
        tensors = load_file(self.folder / name / "adapter_model.safetensors")
        config = json.loads((self.folder / name / "adapter_config.json").read_text())
        return {k: v.numpy().tobytes() for k, v in tensors.items()} | config


def assert_same_run(run, full):
    """All but timings, and how much was compared."""
    assert run.weights() == full.weights() and run.weights("sft/adapter") == full.weights("sft/adapter")
    compared = 0
    for name, count in (("metrics.jsonl", 6), ("samples.jsonl", 96), ("sft/metrics.jsonl", 8)):
        a, b = without_timings(run.lines(name)), without_timings(full.lines(name))
        assert len(a) == len(b) == count
        assert a == b
        compared += len(a)
    assert compared == 110
    results = [json.loads((r.folder / "eval.json").read_text())["results"] for r in (run, full)]
    assert results[0] == results[1] and sum(len(r["instances"]) for r in results[0].values()) == 10


def whole_run(model_dir, folder):
    """SFT, ToMPO, evaluation, curves."""
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, args, kwargs: rates.append([g["lr"] for g in o.param_groups]))
    try:
        run_rft(rft_flags(model_dir, folder), curves=True)
    finally:
        hook.remove()
    return Run(folder, rates)

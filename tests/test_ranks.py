"""Several processes on torch.distributed (gloo) against one: the same samples, the same adapter, a death survived."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from run import checkpoint
from run import ranks
from whole_runs import ROOT, lines_of, rft_flags, run_rft, wait_for_lines

DRIVER = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
open(os.environ["PIDS"] + "/" + os.environ["RANK"], "w").write(str(os.getpid()))
import whole_runs
whole_runs.driver()
"""
LR = 2e-4  # with the 5e-3 of the other tests, rounding grows until it turns a sampled token


def torchrun(folder, processes, argv):
    script = folder / "driver.py"
    script.write_text(DRIVER)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--", str(script), *argv]
    environment = os.environ | {"PIDS": str(folder), "OMP_NUM_THREADS": "1"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *command], env=environment, **pipe)


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_rft(rft_flags(model_dir, folder, lr=LR))
    return folder


def assert_same_up_to_rounding(folder, alone):
    for name in ("sft/adapter", "adapter"):
        a, b = (load_file(f / name / "adapter_model.safetensors") for f in (folder, alone))
        assert a.keys() == b.keys()
        # Adam turns the rounding of a gradient near 0 into a step of up to lr, in a few of the numbers
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a])
        moved = torch.cat([b[key].flatten() for key in b if "lora_B" in key])
        assert apart.norm() < 1e-3 * moved.norm() and apart.abs().max() < LR
    samples, expected = (lines_of(f / "samples.jsonl") for f in (folder, alone))
    assert len(samples) == 96 and [s["reply"] for s in samples] == [s["reply"] for s in expected]
    assert [s["advantage"] for s in samples] == pytest.approx([s["advantage"] for s in expected])
    for name, keys in (("metrics", ("loss", "kl", "grad_norm", "s", "R_G")), ("sft/metrics", ("loss", "grad_norm"))):
        lines, wanted = (lines_of(f / f"{name}.jsonl") for f in (folder, alone))
        assert len(lines) == len(wanted)
        for line, other in zip(lines, wanted):
            for key in keys:
                assert line.get(key) == (pytest.approx(other[key], rel=1e-2, abs=1e-4) if key in other else None)
    final = [checkpoint.latest_checkpoint(f / "checkpoints") / "state.json" for f in (folder, alone)]
    assert final[0].read_text() == final[1].read_text()  # the memory of every game too


@pytest.mark.parametrize("processes", [2, 3])  # 3: one of them has no conversation of RFT, which has 2 a step
def test_many_processes_end_in_the_adapter_of_one(alone, model_dir, tmp_path, processes):
    process = torchrun(tmp_path, processes, rft_flags(model_dir, tmp_path / "run", lr=LR))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert output.count("adapter (SFT and tompo in one)") == 1  # one process speaks
    assert_same_up_to_rounding(tmp_path / "run", alone)
    results = [(f / "eval.json").read_text() for f in (tmp_path / "run", alone)]
    assert '"replies"' in results[0] and len(results[0]) == pytest.approx(len(results[1]), rel=0.05)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_line_and_a_checkpoint(alone, model_dir, tmp_path, dies):
    folder = tmp_path / "run"
    process = torchrun(tmp_path, 2, rft_flags(model_dir, folder, lr=LR))
    try:
        wait_for_lines(process, folder / "metrics.jsonl", 3)
        os.kill(int((tmp_path / str(dies)).read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if "error: another process of this run cannot be reached" in line]
    assert f"with --resume {folder}" in line
    assert not (folder / "adapter").exists(), "the run was over before the process died"
    saved = int(checkpoint.latest_checkpoint(folder / "checkpoints").name.removeprefix("step-"))
    done = len(lines_of(folder / "metrics.jsonl"))
    assert saved == done if dies else saved in (done - 1, done)  # rank 0 dead: the last periodic one
    run_rft(["--resume", str(folder)])  # with another number of processes
    assert_same_up_to_rounding(folder, alone)


def test_one_process_exchanges_nothing():
    assert (ranks.world(), ranks.rank(), ranks.first(), ranks.device("cuda")) == (1, 0, True, "cuda")
    assert ranks.share(["a", "b", "a"]) == [0, 1, 2] and ranks.exchange(5) == [5] and ranks.whole([1, 0], "ba") == ["a", "b"]
    p = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([p])
    assert p.grad is None


@pytest.mark.parametrize(("rank", "mine"), [(0, [0, 2, 4]), (1, [1, 3])])
def test_items_with_the_same_key_stay_together(monkeypatch, rank, mine):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    assert ranks.share(["a", "b", "a", "b", "c"]) == mine


def test_ctrl_c_ends_all_processes_after_the_same_step(alone, model_dir, tmp_path):
    folder = tmp_path / "run"
    process = torchrun(tmp_path, 2, rft_flags(model_dir, folder, lr=LR))
    try:
        wait_for_lines(process, folder / "metrics.jsonl", 2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert f"continue with: python train_rft.py --resume {folder}" in output and "Error" not in output.split("stopped and saved")[0]
    assert output.count("stopping after this step") == 1
    done = len(lines_of(folder / "metrics.jsonl"))
    assert checkpoint.latest_checkpoint(folder / "checkpoints").name == f"step-{done:06d}" and done < 6
    run_rft(["--resume", str(folder)])
    assert_same_up_to_rounding(folder, alone)

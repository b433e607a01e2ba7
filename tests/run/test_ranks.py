"""Several processes on torch.distributed (gloo) against one: the same samples and adapter, and deaths."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import whole_runs as runs

from run import ranks

UNDER_TORCHRUN = f"""
import os, sys
sys.path[:0] = [{str(runs.ROOT)!r}, {str(runs.ROOT / "tests")!r}]
import whole_runs
open(os.environ["PIDS"] + "/" + os.environ["RANK"], "w").write(str(os.getpid()))
whole_runs.driver(sys.argv[1:])
"""


def torchrun(folder, processes, argv):
    """Starts torchrun with that many processes; each leaves its id in folder/RANK."""
    script = folder / "driver.py"
    script.write_text(UNDER_TORCHRUN)
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--", str(script)]
    environment = os.environ | {"PIDS": str(folder), "OMP_NUM_THREADS": "1"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, "-m", *command, *argv], env=environment, **pipe)


def test_many_processes_end_in_the_adapter_of_one(gentle, model_dir, tmp_path):
    """Three: one of them has no conversation of RFT, which has 2 a step."""
    folder, output = tmp_path / "run", tmp_path / "output"
    codes = runs.ended(runs.start(runs.rft_flags(model_dir, folder, lr=runs.GENTLE), output, 3), 240)
    assert codes == [0, 0, 0], output.read_text()
    assert output.read_text().count("adapter (SFT and tompo in one)") == 1  # one process speaks
    runs.assert_same_up_to_rounding(runs.Run(folder), gentle)
    results = [(f / "eval.json").read_text() for f in (folder, gentle.folder)]
    assert '"replies"' in results[0] and len(results[0]) == pytest.approx(len(results[1]), rel=0.05)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_line_and_a_checkpoint(gentle, model_dir, tmp_path, dies):
    """Rank 0 among processes that are left to themselves; rank 1 under torchrun, which ends the others."""
    folder, argv = tmp_path / "run", runs.rft_flags(model_dir, tmp_path / "run", lr=runs.GENTLE)
    if dies == 0:
        processes = runs.start(argv, tmp_path / "output", 2)
        runs.wait_for_lines(folder / "metrics.jsonl", 3)
        os.kill(processes[0].pid, signal.SIGKILL)
        assert runs.ended(processes) == [-signal.SIGKILL, 2]
        output = (tmp_path / "output").read_text()
    else:
        process = torchrun(tmp_path, 2, argv)
        runs.wait_for_lines(folder / "metrics.jsonl", 3)
        os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
    told = "error: another process of this run cannot be reached"
    (line,) = [line for line in output.splitlines() if told in line]
    assert f"with --resume {folder}" in line
    assert not (folder / "adapter").exists(), "the run was over before the process died"
    saved = int(runs.latest_checkpoint(folder).name.removeprefix("step-"))
    done = len(runs.lines_of(folder / "metrics.jsonl"))
    assert saved == done if dies else saved in (done - 1, done)  # rank 0 dead: the last periodic one
    runs.run_rft(["--resume", str(folder)])  # with another number of processes
    runs.assert_same_up_to_rounding(runs.Run(folder), gentle)


def test_ctrl_c_ends_all_processes_after_the_same_step(gentle, model_dir, tmp_path):
    """It comes twice, as launchers may send it, and not to all at the same time."""
    folder, output = tmp_path / "run", tmp_path / "output"
    processes = runs.start(runs.rft_flags(model_dir, folder, lr=runs.GENTLE), output, 2)
    runs.wait_for_lines(folder / "metrics.jsonl", 2)
    for rank in (0, 1):
        with contextlib.suppress(ProcessLookupError):  # it may have ended on the first one of rank 0
            os.kill(processes[rank].pid, signal.SIGINT)
            os.kill(processes[rank].pid, signal.SIGINT)
        time.sleep(0.005)
    assert runs.ended(processes) == [130, 130]
    told = output.read_text()
    assert f"continue with: python train_rft.py --resume {folder}" in told
    assert "Error" not in told.split("stopped and saved")[0] and told.count("stopping after this step") == 1
    done = len(runs.lines_of(folder / "metrics.jsonl"))
    assert runs.latest_checkpoint(folder).name == f"step-{done:06d}" and done < 6
    runs.run_rft(["--resume", str(folder)])
    runs.assert_same_up_to_rounding(runs.Run(folder), gentle)


@pytest.mark.parametrize(("rank", "mine"), [(0, [0, 2, 4]), (1, [1, 3])])
def test_items_with_the_same_key_stay_together(monkeypatch, rank, mine):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    assert ranks.share(["a", "b", "a", "b", "c"]) == mine


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_split_gives_everybody_the_values_of_all_items_in_order(monkeypatch, processes):
    """Also where a process has no item, and where values cannot be compared."""
    keys, parts, computed = ["a", "b", "a", "c"], [], []
    monkeypatch.setattr(ranks, "world", lambda: processes)

    def compute(mine):
        computed.extend(mine)
        return [{"item": i} for i in mine]

    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "exchange", lambda part: parts.append(part) or [part])
        ranks.split(keys, compute)
    assert sorted(computed) == [0, 1, 2, 3]  # each item was computed once
    monkeypatch.setattr(ranks, "exchange", lambda part: parts)
    assert ranks.split(keys, compute) == [{"item": i} for i in range(4)]
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    with pytest.raises(ValueError, match="shorter"):
        ranks.split(keys, lambda mine: [])


def test_the_error_of_a_lost_process_is_one_line(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    lost = Mock(side_effect=RuntimeError("closed by peer \x1b\na second line"))
    monkeypatch.setattr(ranks.dist, "all_gather_object", lost)
    with pytest.raises(ranks.LostRank, match=r"cannot be reached \(closed by peer \? a second line\)"):
        ranks.exchange(1)

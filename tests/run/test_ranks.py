"""Several processes on torch.distributed (gloo) against one: the same samples and adapter, and deaths."""

import contextlib
import os
import signal
import time
from unittest.mock import Mock

import pytest
import whole_runs as runs

from run import ranks


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
    folder, output = tmp_path / "run", tmp_path / "output"
    processes = runs.start(runs.rft_flags(model_dir, folder, lr=runs.GENTLE), output, 2)
    runs.wait_for_lines(folder / "metrics.jsonl", 3)
    os.kill(processes[dies].pid, signal.SIGKILL)
    assert runs.ended(processes) == ([-signal.SIGKILL, 2] if dies == 0 else [2, -signal.SIGKILL])
    told = "error: another process of this run cannot be reached"
    (line,) = [line for line in output.read_text().splitlines() if told in line]
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

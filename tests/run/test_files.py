"""Run folders and logs: what is refused with one line and left as it was, what a kill leaves, full disks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from whole_runs import ROOT, rft_flags, sft_flags, tree

import train_rft
import train_sft
from lora import LoRAConfig
from models import adapters
from run import checkpoint, files
from run.curves import plot_curves
from run.files import InputError, JsonLines, library_errors, reports_errors, write_atomic


def test_a_folder_that_holds_something_is_refused_and_unchanged(
    full, model_dir, sft_adapter, tmp_path, refused
):
    before = tree(full.folder)
    argv = rft_flags(model_dir, full.folder, sft_adapter=sft_adapter)
    assert str(full.folder) in refused(train_rft.main, argv)
    refused(train_sft.main, sft_flags(model_dir, full.folder))
    assert tree(full.folder) == before and len(before) > 10
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for out in ("used", "file"):
        refused(train_sft.main, sft_flags(model_dir, tmp_path / out))
    assert tree(tmp_path) == {"used/notes.txt": b"mine", "file": b"mine too"}


def test_a_folder_that_is_empty_or_of_a_run_without_a_step_is_taken(model_dir, tmp_path):
    for name in ("empty", "failed"):
        (tmp_path / name).mkdir()
    for file in ("config.json", "config.json.tmp", ".lock"):  # the second one by a kill
        (tmp_path / "failed" / file).write_text("{}")
    for name in ("empty", "failed"):
        train_sft.main(sft_flags(model_dir, tmp_path / name, max_steps=1))
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").exists()


def test_resume_of_what_is_no_run_is_refused(full, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"script": "train_sft.py"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = tree(tmp_path)
    for name in ("empty", "missing", "broken", "list", "other"):
        assert name in refused(train_rft.main, ["--resume", tmp_path / name])
    refused(train_sft.main, ["--resume", full.folder])
    assert tree(tmp_path) == before


def test_a_log_goes_on_where_the_checkpoint_was(tmp_path):
    """Without the steps after it, and without what a kill left in the midst of a line."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2}\n{"other": 3}\n{"step": 1, "a"')
    done = lambda row: row.get("step", 9) < 2
    log = JsonLines(path, done)
    log.write({"step": 2, "a": 9})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "a": 1},
        {"step": 1, "a": 2},
        {"step": 2, "a": 9},
    ]
    JsonLines(path, done, writes=False).write({"step": 0})
    assert len(path.read_text().splitlines()) == 3


# -------------------- disks, kills, terminals


@pytest.fixture
def disk(tmp_path):
    """A folder that holds 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing(disk):
    p = torch.nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.ones(2, 4)
    optimizer.step()
    old, config = {"base_model.model.x.lora_A.weight": torch.ones(2, 4)}, LoRAConfig(2, 4, ("x",))
    new = {"base_model.model.x.lora_A.weight": torch.zeros(2, 20_000)}
    checkpoint.save_checkpoint(disk, 1, {"p": p}, optimizer, {"memory": {}})
    adapters.write_adapter(disk / "adapter", old, config)
    log = JsonLines(disk / "log.jsonl", lambda row: True)
    log.write({"step": 0})
    (disk / "other").write_bytes(b"x" * 8192)
    before = {k: v for k, v in tree(disk).items() if k != "log.jsonl"}

    writers = {
        "log.jsonl": lambda: [log.write({"step": 1, "text": "x" * 1000}) for _ in range(100)],
        "step-000002": lambda: checkpoint.save_checkpoint(disk, 2, new, optimizer, {}),
        "adapter_model.safetensors": lambda: adapters.write_adapter(disk / "adapter", new, config),
        "new.json": lambda: write_atomic(disk / "new.json", b"x" * 100_000),
    }
    for name, write in writers.items():
        with pytest.raises(InputError) as caught:
            write()
        said = str(caught.value)
        assert name in said and "No space left" in said and "\n" not in said
    left = tree(disk)
    assert left | before == left and not [name for name in left if "step-000002/" in name]
    step, adapter, extra = checkpoint.restore(disk, optimizer)
    assert step == 1 and torch.equal(adapter["p"], p) and extra == {"memory": {}}
    assert torch.equal(
        *(s["base_model.model.x.lora_A.weight"] for s in (adapters.read_adapter(disk / "adapter")[0], old))
    )
    (disk / "other").unlink()
    again = JsonLines(disk / "log.jsonl", lambda row: row["step"] < 1)  # what a resume does, with room again
    again.write({"step": 1})
    assert [json.loads(line)["step"] for line in (disk / "log.jsonl").read_text().splitlines()] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line():
    code = "from run.files import reports_errors; reports_errors(lambda: print('the results'))()"
    with open("/dev/full", "w") as full:
        how = dict(cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_log_that_cannot_be_drawn_costs_no_run(tmp_path, capsys):
    (tmp_path / "curves.png").write_bytes(b"old")
    (tmp_path / "probe.jsonl").write_text('{"stage": "SFT"}\n')
    plot_curves(tmp_path)
    assert capsys.readouterr().out == f"no {tmp_path / 'curves.png'}: 'seconds'\n"
    assert (tmp_path / "curves.png").read_bytes() == b"old"


def test_errors_of_strangers_cannot_steer_the_terminal(capsys):
    @reports_errors
    def main():
        with library_errors("the server"):
            raise ValueError("\x1b]0;owned\x07\x1b[2J and\na second line \ud800")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: the server: ?]0;owned??[2J and a second line ?\n"


def test_what_a_kill_leaves_of_a_write_is_taken_over(tmp_path):
    (tmp_path / "a.json.tmp").write_text("half")
    write_atomic(tmp_path / "a.json", b"whole")
    assert tree(tmp_path) == {"a.json": b"whole"}


def test_a_run_folder_is_of_one_process_and_free_when_that_is_dead(tmp_path):
    code = f"from run import files\nwith files.run_folder({str(tmp_path / 'run')!r}, {{}}):\n"
    code += "    print('held', flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    try:
        assert other.stdout.readline().strip() == b"held"
        for arguments in (None, {"a": 1}):  # a resume, and a second start of the same command
            with pytest.raises(InputError, match="another process is training in"):
                with files.run_folder(str(tmp_path / "run"), arguments):
                    pass
        assert files.read_json(tmp_path / "run" / "config.json") == {}
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):
        with files.run_folder(str(tmp_path / "run"), None) as folder:
            assert folder == tmp_path / "run"


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"], ids=["long", "nul"])
def test_names_that_no_file_has_are_one_line(name, tmp_path, model_dir, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(train_sft.main, sft_flags(model_dir, name, max_steps=1, games=1))
    refused(train_sft.main, ["--resume", name])

"""Run folders and logs: what is refused with one line and left as it was, and what a kill leaves."""

import json

from whole_runs import rft_flags, sft_flags, tree

import train_rft
import train_sft
from run.files import JsonLines


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
    (tmp_path / "failed" / "config.json").write_text("{}")
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

"""Whole runs that are stopped and resumed end bit for bit as one that was not stopped. Every step of a stage
at which one can be stopped, and damaged checkpoints: test_stage.py, test_checkpoint.py."""

import json
import os
import shutil
import signal
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
import whole_runs as runs
from transformers import AutoTokenizer

import train_rft
from models import adapters
from run import files
from run.errors import InputError


@pytest.fixture(scope="module")
def stopped(model_dir, tmp_path_factory):
    """A run that was stopped by Ctrl-C in its third step of RFT, which is not one that saves."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = runs.interrupted(patch, runs.rft_flags(model_dir, folder), folder / "metrics.jsonl", 3)
    assert f"--resume {folder}" in said and not (folder / "adapter").exists()
    assert runs.latest_checkpoint(folder).name == "step-000003"
    return runs.Run(folder, said=said)


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped.folder, tmp_path / "run")
    return runs.Run(tmp_path / "run")


def resume(run, *argv):
    runs.run_rft(["--resume", str(run.folder), *argv])
    return run


def edit_config(run, **changes):
    config = json.loads((run.folder / "config.json").read_text()) | changes
    (run.folder / "config.json").write_text(json.dumps(config))


def test_a_stopped_run_ends_the_same_whatever_flags_are_given(full, stopped, copied, capsys):
    """What the loss shows is said once."""
    config = (copied.folder / "config.json").read_bytes()
    resume(copied, *"--seed 99 --m 2 --lr 1 --steps 1 --algo grpo --engine plain".split())
    runs.assert_same_run(copied, full)
    assert (copied.folder / "config.json").read_bytes() == config
    assert (copied.folder / "timing.json").exists()
    for said, times in ((full.said, 1), (stopped.said, 1), (capsys.readouterr().out, 0)):
        assert said.count("RFT: ") == said.count("watch the reward") == times


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_that_was_stopped_in_sft_ends_the_same(full, model_dir, tmp_path, monkeypatch, step):
    """In the last step, too: neither the held-out loss nor RFT begins."""
    run = runs.Run(tmp_path / "run")
    log = run.folder / "sft" / "metrics.jsonl"  # it begins with the held-out losses
    said = runs.interrupted(monkeypatch, runs.rft_flags(model_dir, run.folder), log, step + 1)
    assert "stopping after this step" not in said and f"--resume {run.folder}" in said
    assert runs.latest_checkpoint(run.folder / "sft").name == f"step-00000{step}"
    assert len(runs.lines_of(log)) == step + 1
    assert not (run.folder / "metrics.jsonl").exists() and not (run.folder / "sft" / "adapter").exists()
    runs.assert_same_run(resume(run), full)


def test_a_run_that_was_killed_ends_the_same(full, model_dir, tmp_path):
    folder = tmp_path / "run"
    processes = runs.start(runs.rft_flags(model_dir, folder), tmp_path / "output")
    runs.wait_for_lines(folder / "metrics.jsonl", 3)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert runs.ended(processes) == [-signal.SIGKILL]
    assert len(runs.lines_of(folder / "metrics.jsonl")) < 6, "the run was over before the signal came"
    (folder / "checkpoints" / "step-000000").mkdir()  # a kill within its removal
    with open(folder / "samples.jsonl", "a") as f:
        f.write('{"step": 5, "rew')
    runs.assert_same_run(resume(runs.Run(folder)), full)
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert not list(folder.rglob("*.tmp")) and left == ["step-000004", "step-000006"]


def test_an_sft_policy_that_was_replaced_is_refused(model_dir, sft_adapter, tmp_path):
    """The new adapter of RFT belongs to the old one."""
    folder = shutil.copytree(sft_adapter, tmp_path / "sft")
    begun = runs.parsed([*runs.rft_flags(model_dir, tmp_path / "run"), "--sft-adapter", str(folder)])[1]
    train_rft.prepare(begun)
    again = replace(begun, flags=json.loads(json.dumps(begun.flags)))  # as config.json has them
    train_rft.prepare(again)
    state, config = adapters.read_adapter(folder)
    adapters.write_adapter(folder, {name: -tensor for name, tensor in state.items()}, config)
    with pytest.raises(InputError, match="began with another --sft-adapter; take"):
        train_rft.prepare(again)


def test_resuming_a_finished_run_changes_nothing_of_it(full, tmp_path):
    shutil.copytree(full.folder, tmp_path / "copy")
    runs.assert_same_run(resume(runs.Run(tmp_path / "copy")), full)


def test_a_probe_that_a_lost_process_cut_short_is_asked_again(full, copied):
    log = copied.folder / "probe.jsonl"
    *before, last = log.read_text().splitlines(keepends=True)
    assert json.loads(last)["stage"] == "TOMPO" and json.loads(last)["step"] == 3
    log.write_text("".join(before))
    runs.assert_same_run(resume(copied), full)


def test_a_resumed_run_says_where_its_numbers_may_differ_and_reads_no_other_prompts(
    copied, model_dir, tmp_path, refused, capsys, monkeypatch
):
    """Libraries may have been updated for a good reason; but a run of two chat templates is none."""

    def resumed():
        capsys.readouterr(), read.clear()
        settings = runs.parsed(["--resume", str(copied.folder)])[1]
        policy = settings.load_model()
        assert read == [copied.folder / "config.json"]  # once
        return policy, capsys.readouterr().out.splitlines()[1:]

    read, read_json = [], files.read_json
    monkeypatch.setattr(files, "read_json", lambda path: read.append(path) or read_json(path))

    begun = json.loads((copied.folder / "config.json").read_text())
    policy, said = resumed()
    assert begun["chat_template_sha256"] == policy.template.checksum and said == []
    edit_config(copied, versions="torch 1.0, transformers 2.0")
    (line,) = resumed()[1]
    assert line.startswith(f"warning: {copied.folder} began with torch 1.0, transformers 2.0 and goes on")
    assert line.endswith(f"{begun['versions']}; it may end in other numbers than without the stop")
    other = shutil.copytree(model_dir, tmp_path / "model")
    with open(other / "chat_template.jinja", "a") as f:
        f.write("{{ 'x' }}")
    for change in ({"model": str(other)}, {"template": ["tail=7"]}):
        edit_config(copied, **begun | change)
        line = refused(train_rft.main, ["--resume", copied.folder])
        assert f"{copied.folder} began with another chat template, --template or date in it; take" in line
    edit_config(copied, **begun | {"noise": 0.9})
    line = refused(train_rft.main, ["--resume", copied.folder])
    assert f"{copied.folder} began with another expert games; take those of that time, or remove" in line
    for new in ("chat_template_sha256", "versions"):  # as in the folders of older versions of the code
        del begun[new]
    (copied.folder / "config.json").write_text(json.dumps(begun | {"model": str(other)}))
    assert resumed()[1] == []


def tomorrow(monkeypatch):
    """From now on templates are told that it is the next day."""

    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls):
            return super().now() + timedelta(days=1)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_run_that_is_killed_before_midnight_and_resumed_after_it_ends_the_same(
    sft_adapter, model_dir, tmp_path, monkeypatch
):
    """With a template that prints the date, as Llama 3.1's."""
    dated = shutil.copytree(model_dir, tmp_path / "model") / "chat_template.jinja"
    text = "{{ '<|im_start|>' + strftime_now('%d %b %Y') }}" + dated.read_text()
    dated.write_text(text)
    folders = tmp_path / "whole", tmp_path / "killed"
    how = dict(sft_adapter=sft_adapter, steps=5, eval_games=0)
    whole, killed = (runs.rft_flags(str(dated.parent), folder, **how) for folder in folders)
    runs.run_rft(whole)
    processes = runs.start(killed, tmp_path / "output")
    runs.wait_for_lines(folders[1] / "metrics.jsonl", 3)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert runs.ended(processes) == [-signal.SIGKILL] and not (folders[1] / "adapter").exists()
    tomorrow(monkeypatch)
    chat, told = [{"role": "user", "content": ""}], AutoTokenizer.from_pretrained(dated.parent)
    tells = told.apply_chat_template(chat, tokenize=False)
    assert f"{datetime.now() + timedelta(days=1):%d %b %Y}" in tells
    resume(runs.Run(folders[1]))
    a, b = map(runs.Run, folders)
    assert a.weights() == b.weights()
    for name in ("samples.jsonl", "prompts.jsonl", "metrics.jsonl"):
        assert runs.without_timings(a.lines(name)) == runs.without_timings(b.lines(name))


def test_settings_that_are_gone(copied, refused):
    """Else an old `all_seats: true` would silently become training in seat 0."""
    edit_config(copied, all_seats=True)
    assert "settings that are gone (all_seats)" in refused(train_rft.main, ["--resume", copied.folder])

"""Runs that are stopped, resumed or damaged, and everything that is refused with one line."""

import json
import re
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import torch

from run import checkpoint
import experts
import train_rft
import train_sft
from policy import load_policy, put_adapter
from prompts import PromptStyle
from run.files import InputError
from whole_runs import Run, assert_same_run, lines_of, rft_flags, run_rft, sft_flags, start, tree, wait_for_lines


# --- stop and resume


def interrupt(model_dir, folder, log, count, with_signal):
    process = start(rft_flags(model_dir, folder))
    try:
        wait_for_lines(process, folder / log, count)
        process.send_signal(with_signal)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


@pytest.mark.parametrize(
    ("log", "count", "with_signal", "steps"),
    [
        ("sft/metrics.jsonl", 2, signal.SIGINT, 6),  # in SFT: its log begins with the held-out losses
        ("metrics.jsonl", 2, signal.SIGINT, 6),
        ("metrics.jsonl", 3, signal.SIGKILL, 6),
    ],
    ids=["ctrl-c-in-sft", "ctrl-c-in-rft", "kill-in-rft"],
)
def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(full, model_dir, tmp_path, log, count, with_signal, steps):
    folder = tmp_path / "run"
    code, output = interrupt(model_dir, folder, log, count, with_signal)
    done = [line for line in lines_of(folder / log) if "lr" in line] if with_signal == signal.SIGINT else []
    assert len(done) < steps and not (folder / "adapter").exists(), "the run was over before the signal came"
    if with_signal == signal.SIGINT:
        assert code == 130
        assert f"--resume {folder}" in output and "Traceback" not in output
        where = folder / Path(log).parent / "checkpoints"
        assert checkpoint.latest_checkpoint(where).name == f"step-{len(done):06d}"
    else:
        assert code == -signal.SIGKILL
        # what a kill within a write would leave: none of it may be taken for whole
        for number in (4, 99):
            half = folder / "checkpoints" / f"step-{number:06d}.tmp"
            half.mkdir(exist_ok=True)
            (half / "tensors.safetensors").write_bytes(b"half")
        for name in ("metrics.jsonl", "samples.jsonl"):
            with open(folder / name, "a") as f:
                f.write('{"step": 5, "rew')
    config = (folder / "config.json").read_bytes()
    # every setting is that of config.json, whatever else is given
    run_rft(["--resume", str(folder), "--seed", "99", "--m", "2", "--lr", "1", "--steps", "1", "--algo", "grpo"])
    assert (folder / "config.json").read_bytes() == config
    assert_same_run(Run(folder, []), full)
    assert (folder / "timing.json").exists()


def test_an_adapted_beta_goes_on_where_it_was(model_dir, sft_adapter, tmp_path, monkeypatch):
    """Stopped after 3 of 5 steps, with another beta than the one of the flags."""
    changes = dict(kl_target=0.001, sft_adapter=sft_adapter, steps=5, eval_games=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_rft(rft_flags(model_dir, whole, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(train_rft, "agreed_stop", lambda *args: len(lines_of(stopped / "metrics.jsonl")) == 3)
        with pytest.raises(SystemExit):
            run_rft(rft_flags(model_dir, stopped, **changes))
    assert len(lines_of(stopped / "metrics.jsonl")) == 3 and not (stopped / "adapter").exists()
    run_rft(["--resume", str(stopped)])
    betas = [[line["beta"] for line in lines_of(folder / "metrics.jsonl")] for folder in (whole, stopped)]
    assert betas[0] == betas[1] and len(betas[0]) == 5 and betas[0][0] == 0.02 != betas[0][3]
    assert Run(stopped, []).weights() == Run(whole, []).weights()


def test_resuming_a_finished_run_changes_nothing_of_it(full, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(full.folder, folder)
    run_rft(["--resume", str(folder)])
    assert_same_run(Run(folder, []), full)


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    for name in ("step-000002", "step-000004.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / "step-000002").rmdir()
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.latest_checkpoint(tmp_path / "missing") is None


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
    step, adapter, extra = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path), fresh)
    assert step == 10 and extra == {"memory": {"a": 1 / 3}}
    assert all(torch.equal(adapter[f"p{i}"], p) for i, p in enumerate(parameters))
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() == {0, 1}
    for i in old:
        assert old[i].keys() == new[i].keys() and all(torch.equal(old[i][k], new[i][k]) for k in old[i])


def test_a_damaged_checkpoint_is_an_input_error(full, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(full.folder, folder)
    tensors = checkpoint.latest_checkpoint(folder / "checkpoints") / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "step-000006" in refused(capsys, train_rft.main, ["--resume", str(folder)])


# --- what is refused


def refused(capsys, main, argv, code=2):
    """The run ends with that exit status and exactly one `error:` line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and re.match(r"([\w.]+: )?error: ", errors[0])  # argparse names the script first
    return errors[0]


def test_a_folder_that_holds_something_is_refused_and_unchanged(full, model_dir, sft_adapter, tmp_path, capsys):
    before = tree(full.folder)
    argv = rft_flags(model_dir, full.folder, sft_adapter=sft_adapter)
    assert str(full.folder) in refused(capsys, train_rft.main, argv)
    refused(capsys, train_sft.main, sft_flags(model_dir, full.folder))
    assert tree(full.folder) == before and len(before) > 10
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for out in ("used", "file"):
        refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / out))
    assert tree(tmp_path) == {"used/notes.txt": b"mine", "file": b"mine too"}


def test_an_empty_folder_is_taken(model_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    train_sft.main(sft_flags(model_dir, tmp_path / "empty", max_steps=1))
    assert (tmp_path / "empty" / "adapter" / "adapter_model.safetensors").exists()


def test_resume_of_what_is_no_run_is_refused(full, model_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"script": "train_sft.py"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = tree(tmp_path)
    for name in ("empty", "missing", "broken", "list", "other"):
        assert name in refused(capsys, train_rft.main, ["--resume", str(tmp_path / name)])
    refused(capsys, train_sft.main, ["--resume", str(full.folder)])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["0", "-1"])
def test_temperature_zero_is_refused(model_dir, tmp_path, capsys, value):
    argv = rft_flags(model_dir, tmp_path / "run", temperature=value)
    assert "--temperature" in refused(capsys, train_rft.main, argv)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    for name in ("no-one/no-such-model", "no//such:model"):
        assert name in refused(capsys, train_sft.main, sft_flags(name, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_folder_that_is_missing_or_incomplete_is_refused(model_dir, tmp_path, capsys):
    incomplete = tmp_path / "no-weights"
    shutil.copytree(model_dir, incomplete)
    (incomplete / "model.safetensors").unlink()
    for main, arguments in ((train_sft.main, sft_flags), (train_rft.main, rft_flags)):
        for name in (incomplete, tmp_path / "missing"):
            assert str(name) in refused(capsys, main, arguments(name, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_adapters_that_do_not_fit_are_refused(model_dir, sft_adapter, tmp_path, capsys):
    from tiny import make_tiny_model

    def changed(name, edit):
        shutil.copytree(sft_adapter, tmp_path / name)
        edit(tmp_path / name)
        return tmp_path / name

    def rank(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))

    def cut(folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])

    bad = [changed("rank", rank), changed("corrupt", cut), tmp_path / "missing"]
    bad += [changed("no-config", lambda f: (f / "adapter_config.json").unlink())]
    bad += [changed("no-weights", lambda f: (f / "adapter_model.safetensors").unlink())]
    for adapter in bad:
        assert str(adapter) in refused(
            capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", sft_adapter=adapter)
        )
    other = make_tiny_model(tmp_path / "other", seed=1)  # the same shapes, other weights
    refused(capsys, train_rft.main, rft_flags(other, tmp_path / "run", sft_adapter=sft_adapter))
    assert not (tmp_path / "run").exists()


def test_invalid_data_is_refused_with_its_line(model_dir, tmp_path, capsys):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    data = tmp_path / "data.jsonl"

    def with_line_2(text):
        experts.write_records(data, records)
        lines = data.read_text().splitlines()
        data.write_text("\n".join([lines[0], text if text is not None else lines[1], *lines[2:]]) + "\n")
        return sft_flags(model_dir, tmp_path / "run", data=data)

    good = json.loads(json.dumps(records[1].__dict__))
    wrong = [
        "{",
        "[]",
        "null",
        json.dumps({k: v for k, v in good.items() if k != "label"}),
        json.dumps(good | {"label": "whatever"}),
        json.dumps(good | {"kind": "X"}),
        json.dumps(good | {"seat": 3}),
        json.dumps(good | {"prompt": "text"}),
        json.dumps(good | {"instance": {}}),
        json.dumps(good | {"more": 1}),
    ]
    for text in wrong:
        message = refused(capsys, train_sft.main, with_line_2(text))
        assert "line 2" in message and str(data) in message, text
    data.write_text("")
    refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", data=data))
    refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", data=tmp_path / "missing.jsonl"))
    assert not (tmp_path / "run").exists()


def test_data_that_lacks_a_seat_is_refused_in_rft(model_dir, sft_adapter, tmp_path, capsys):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    experts.write_records(tmp_path / "data.jsonl", [r for r in records if (r.seat, r.kind) != (1, "E")])
    changes = dict(data=tmp_path / "data.jsonl", sft_adapter=sft_adapter)
    assert "seat" in refused(capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", **changes))


def test_a_prompt_longer_than_the_context_is_refused(model_dir, sft_adapter, tmp_path, capsys):
    folder = tmp_path / "short"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "64" in refused(capsys, train_sft.main, sft_flags(folder, tmp_path / "sft"))
    assert "64" in refused(capsys, train_rft.main, rft_flags(folder, tmp_path / "rft", sft_adapter=sft_adapter))


def test_lora_targets_that_name_nothing_are_refused(model_dir, tmp_path, capsys):
    assert "no_proj" in refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", targets=["no_proj"]))


@pytest.mark.parametrize(
    "changes", [{"expert": "nobody"}, {"seat": 3}, {"eval_agents": 2}, {"expert": "noisy:nash:2"}], ids=str
)
def test_wrong_values_are_refused_before_anything_is_made(model_dir, tmp_path, capsys, changes):
    refused(capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_put_adapter_names_the_folder(model_dir, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        put_adapter(load_policy(model_dir), str(tmp_path / "nowhere"))

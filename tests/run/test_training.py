"""What SFT and RFT have in common: the learning rate, the trained seats, and flags that are paths."""

import argparse
import json
import math
import re

import pytest
import torch
import whole_runs
from whole_runs import sft_flags

import train_rft
import train_sft
from play import held_out
from prompts import PromptStyle
from run import checkpoint, files, rft_flags, training
from run.dataset import simulate_many


def test_learning_rate_by_hand():
    def rate(step):
        return training.learning_rate(step, 40, 2.0)  # a tenth of 40 steps is warm-up

    assert [rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(22) == pytest.approx(1.0) and rate(40) == pytest.approx(0.0)
    assert rate(13) == pytest.approx(1 + math.sqrt(0.5))
    assert training.learning_rate(0, 10, 3.0) == 1.0  # never less than 3 steps of warm-up
    assert training.learning_rate(2, 3, 1.0) == training.learning_rate(3, 3, 1.0) == 1.0  # no division by 0


def test_a_random_seat_is_one_per_game_and_belongs_to_the_seed():
    records = simulate_many(40, "second-best", 0, PromptStyle(), (4, 8))

    def seats(seed):
        chosen = training.in_trained_seats(argparse.Namespace(seat="random", seed=seed), records)
        of_game = {r.game: {q.seat for q in chosen if q.game == r.game} for r in chosen}
        assert set(of_game) == set(range(40)) and all(len(s) == 1 for s in of_game.values())
        assert len(chosen) == 80  # both decisions of the seat
        return [s.pop() for s in of_game.values()]

    assert seats(1) == seats(1) != seats(2) and set(seats(1)) >= {0, 1, 2, 3, 4}


def test_a_run_can_be_resumed_from_another_working_directory(tmp_path, monkeypatch):
    """So config.json has whole paths, of every adapter of a chain. A folder with a + in its name is none."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, "out")
    rft_flags.add_rft_arguments(parser)
    (tmp_path / "one+two").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, whole in (("a+b", f"{tmp_path}/a+{tmp_path}/b"), ("one+two", f"{tmp_path}/one+two")):
        args = training.parse(parser, "train_rft.py", ["--sft-adapter", given, "--data", "games.jsonl"])
        assert (args.sft_adapter, args.data) == (whole, f"{tmp_path}/games.jsonl")


# -------------------- values that ruin a run


def parser():
    made = argparse.ArgumentParser()
    training.add_training_arguments(made, "runs/tompo")
    rft_flags.add_rft_arguments(made)
    held_out.add_eval_arguments(made, seat=False, fewest=0)
    return made


ODD = "--agents 3-5 --seat random --no-belief --no-hints --credit --label-noise 0.1 1 --types 1 2.5"
ODD += " --preset paper --reward local=0 belief=1 --clip-eps 0.1 0.30000000000000004"
ODD += " --sft-lr 1e-300 --out=-a --max-steps 3"


@pytest.mark.parametrize("argv", [[], ODD.split()], ids=["defaults", "odd"])
def test_a_config_is_the_command_line_that_made_it(argv):
    kept = json.dumps(vars(parser().parse_args(argv)))
    again = parser().parse_args(files.argv_of(parser(), json.loads(kept)))
    assert json.dumps(vars(again)) == kept


BAD = [("sft_lr", v) for v in (math.nan, math.inf, -1, "x", None)] + [("lr", v) for v in (math.nan, -1)]
BAD += [("lora_alpha", v) for v in (0, -1, math.nan)] + [("m", v) for v in (1, 0, 2.5)]
BAD += [("device", v) for v in ("cuda:99", "nosuch", "meta", "cpu:7", 3)]
# those that only an edited config.json can hold
EDITED = [("rank", "x"), ("save_every", 0), ("dtype", "foo"), ("seed", None), ("prompts", [1])]
EDITED += [("belief", "no"), ("agents", [5, 4]), ("agents", 4.5), ("targets", []), ("games", [[1]])]
EDITED += [("seed", {"a": 1}), ("preset", 7)]


@pytest.mark.parametrize("name, value", BAD + EDITED, ids=str)
def test_a_value_that_ruins_a_run_is_refused_as_a_flag_and_in_a_config(name, value, tmp_path, refused):
    of_run = vars(parser().parse_args([])) | {"script": "train_rft.py", "resumed": False, name: value}
    (tmp_path / "config.json").write_text(json.dumps(of_run))
    flag = "--" + name.replace("_", "-")
    ways = [["--resume", str(tmp_path)]] + [[f"{flag}={value}"]] * ((name, value) in BAD)
    for argv in ways:
        said = refused(lambda argv: training.parse(parser(), "train_rft.py", argv), argv)
        assert flag in said


def test_a_device_that_is_not_here_is_told_what_is(refused):
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in ("cuda:99", "cuda")[: 1 + (not torch.cuda.is_available())]:
        said = refused(lambda argv: training.parse(parser(), "x", argv), ["--device", name])
        assert f"this machine has no '{name}', only" in said and all(device in said for device in here)
    assert all(training.device(name) == name for name in here)


@pytest.mark.parametrize("flag", ["rank 5000", "rounds 101", "lora-alpha nan", "sft-lr -1", "m 1"])
def test_values_that_no_run_could_use_are_refused(flag, model_dir, tmp_path, refused):
    argv, (name, value) = whole_runs.rft_flags(model_dir, tmp_path / "run"), flag.split()
    assert f"argument --{name}" in refused(train_rft.main, [*argv, f"--{name}", value])
    assert not (tmp_path / "run").exists()


def test_evaluation_that_may_outgrow_the_context_is_refused_before_training(model_dir, tmp_path, refused):
    """The games of training, of 3 agents and with one reply before the last question, fit; so does every
    first question of the evaluation."""
    argv = whole_runs.rft_flags(model_dir, tmp_path / "run", max_new_tokens=800, eval_agents=12, max_steps=1)
    assert "reply tokens do not fit into" in refused(train_rft.main, argv)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_the_checkpoint_before_stays(
    model_dir, tmp_path, monkeypatch, capsys
):
    """After the first step at such a rate the weights are finite, and nothing that they compute is."""
    order, sync, save = [], files.JsonLines.sync, checkpoint.save_checkpoint
    monkeypatch.setattr(files.JsonLines, "sync", lambda log: order.append(log.path.name) or sync(log))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: order.append(args[1]) or save(*args))
    argv = sft_flags(model_dir, tmp_path / "run", sft_lr=1e30, save_every=1, games=2, probes=0)
    said = []
    for again in (argv, ["--resume", str(tmp_path / "run")]):
        with pytest.raises(SystemExit) as stop:
            train_sft.main(again)
        err = capsys.readouterr().err
        said += [line for line in err.splitlines() if line.startswith("error:")]
        assert stop.value.code == 2 and "Traceback" not in err
    assert len(said) == 2 and said[0] == said[1]
    assert re.match("error: step 1: the (loss|gradient norm) is (nan|inf), and training ends here", said[0])
    assert order == ["metrics.jsonl", 1]  # the log is on the disk before the checkpoint that is newer
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "run" / "adapter").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines

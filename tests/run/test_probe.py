"""The probe: which questions it asks, what it makes of the answers, and that training does not notice."""

import argparse
import json

import numpy as np
import pytest
from whole_runs import Run, lines_of, rft_flags, run_rft, sft_flags

import train_sft
from experts import make_expert
from prompts import Decision
from run import dataset, probe, training
from run.probe import levels, measure, probe_targets
from world.draws import split_of


@pytest.fixture(scope="module")
def asked():
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, "runs")
    return probe_targets(parser.parse_args([]))


def test_the_questions_are_held_out_of_both_kinds_and_always_the_same(asked):
    targets = [target for target, _ in asked]
    assert [t.kind for t in targets] == list("GEGGG" * 5) and probe.GAMES == 20
    assert {t.seat for t in targets} == {0} and len({t.game.key for t in targets}) == probe.GAMES
    assert all(split_of(t.game) == "held-out" for t in targets)
    assert {len(set(t.game.types)) for t in targets} == {1, 2, 4}  # every pattern of types
    for target, chat in asked:
        experts = make_expert("second-best")
        answers = [experts(target.state, i, None).action for i in range(4)]
        assert np.array_equal(target.actions, answers)  # and what came before was the experts' too:
        said = [m["content"] for m in chat if m["role"] == "assistant"]
        assert len(said) == len(target.state.history) == (target.kind == "E")


def test_measures_by_hand(asked):
    targets = [target for target, _ in asked]
    teacher = make_expert("second-best")
    right = [teacher(t.state, t.seat, None) for t in targets]
    values = measure(right, targets)
    assert values | {"U2": 1} == dict(U1=1, row=1, s=1, U2=1, belief=1) and 0.9 < values["U2"] < 1
    nothing = measure([None] * len(targets), targets)
    silent = [Decision(t.kind, np.zeros(4, int) if t.kind == "G" else 0.0) for t in targets]
    assert nothing == dict(U1=0, row=0, s=0, U2=measure(silent, targets)["U2"], belief=0)
    # one graph decision of twenty that differs in one of three others, and one reply that is none
    first = right[0].action.copy()
    first[2] = 1 - first[2]
    values = measure([Decision("G", first), None, *right[2:]], targets)
    assert values["row"] == pytest.approx(1 - 1 / 3 / probe.GAMES)
    assert values["U1"] == pytest.approx(1 - 1 / len(targets))
    assert values["belief"] == pytest.approx(1 - 2 / len(targets))  # nor do they state one


def test_the_levels_are_those_of_the_same_questions(asked):
    targets = [target for target, _ in asked]
    found = levels(targets)
    assert found["expert"]["row"] == found["expert"]["belief"] == 1
    assert found["random play"]["row"] == pytest.approx(0.5, abs=0.044)  # 1,200 coins: 3 standard deviations
    constant = found["best constant answer"]
    everybody = [Decision("G", np.array([0, 1, 1, 1])) for t in targets if t.kind == "G"]
    always = measure(everybody, [t for t in targets if t.kind == "G"])
    assert always["s"] == constant["s"] == 1  # a proposal that nobody answers costs nothing in s
    assert 0.5 < always["row"] <= constant["row"] < 0.7
    assert found["random play"]["U2"] < constant["U2"] < 1


def test_training_is_the_same_without_the_probe(full, model_dir, tmp_path):
    run_rft(rft_flags(model_dir, tmp_path / "run", probes=0))
    assert Run(tmp_path / "run").weights() == full.weights()
    assert not (tmp_path / "run" / "probe.jsonl").exists()


def test_a_run_is_asked_as_often_as_said(full):
    first, *lines = full.lines("probe.jsonl")
    assert list(first["levels"]) == ["expert", "random play", "best constant answer"]
    asked = [(line["stage"], line["step"]) for line in lines]
    assert asked == [("SFT", 0), ("SFT", 3), ("SFT", 6), ("TOMPO", 3), ("TOMPO", 6)]
    for stage in ("SFT", "TOMPO"):
        seconds = [line["seconds"] for line in lines if line["stage"] == stage]
        assert seconds == sorted(seconds) and seconds[-1] > 0


def test_the_same_policy_gives_the_same_answers(model_dir, tmp_path):
    """With a learning rate of 0 it stays as it is; the values are those of the real parser."""
    train_sft.main(sft_flags(model_dir, tmp_path / "run", sft_lr=0, max_steps=4))
    lines = lines_of(tmp_path / "run" / "probe.jsonl")[1:]
    assert [line["step"] for line in lines] == [0, 2, 4]
    values = [{key: line[key] for key in probe.KEYS} for line in lines]
    assert values[0] == values[1] == values[2]


def test_a_stopped_run_leaves_its_picture(model_dir, tmp_path, monkeypatch):
    from whole_runs import interrupted

    drawn = []
    monkeypatch.setattr("train_rft.plot_curves", lambda folder: drawn.append(folder))
    folder = tmp_path / "run"
    argv, log = rft_flags(model_dir, folder), folder / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("whole_runs.run_rft", lambda argv: run_rft(argv, curves=True))
        interrupted(monkeypatch, argv, log, 1)
    assert drawn == [folder] and (folder / "curves.png").stat().st_size > 10_000  # the probe's own picture
    lines = [json.loads(text) for text in (folder / "probe.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 0, 3, 6]


def test_no_probe_without_style(asked):
    """The prompts are those of the run: without hints there is none of the worked numbers."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, "runs")
    plain = probe_targets(parser.parse_args(["--no-hints"]))
    assert dataset.style_of(parser.parse_args(["--no-hints"])).hints is False
    for (a, with_hints), (b, without) in zip(asked, plain, strict=True):
        assert a.game == b.game and len(str(without)) < len(str(with_hints))

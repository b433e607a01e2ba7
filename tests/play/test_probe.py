"""The probe: which questions it asks and when, what it makes of the answers, and that it changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from tables import STYLE
from whole_runs import Run, interrupted, lines_of, rft_flags, run_rft, sft_flags

import train_rft
import train_sft
from decisions import EFFORTS, LINKS
from games import Decision
from play import probe
from play.cast import make_expert
from play.probe import Probe, levels, measure, probe_targets
from prompts import PromptStyle, Reply
from run.curves import plot_curves
from run.files import JsonLines
from world.draws import Family, split_of

EXPERT = make_expert("second-best")


def questions(style=STYLE):
    return probe_targets((Family(),), 4, 0, EXPERT, style)


@pytest.fixture(scope="module")
def targets():
    return [target for target, _ in questions()]


def test_the_questions_are_held_out_of_both_kinds_and_always_the_same(targets):
    assert [t.kind.letter for t in targets] == list("GEGGG" * 5) and probe.GAMES == 20
    assert {t.seat for t in targets} == {0} and len({t.game.key for t in targets}) == probe.GAMES
    assert all(split_of(t.game) == "held-out" for t in targets)
    assert {len(set(t.game.types)) for t in targets} == {1, 2, 4}  # every pattern of types
    assert len(str(questions(PromptStyle(hints=False)))) < len(str(questions()))
    for target, chat in questions():
        answers = [EXPERT(target.state, i, None).action for i in range(4)]
        assert np.array_equal(target.actions, answers)  # and what came before was the experts' too:
        replies = [m["content"] for m in chat if m["role"] == "assistant"]
        assert len(replies) == len(target.state.history) == (target.kind is EFFORTS)


def test_measures_by_hand(targets):
    right = [EXPERT(t.state, t.seat, None) for t in targets]
    values = measure(right, targets)
    assert values | {"U2": 1} == dict(U1=1, row=1, s=1, U2=1, belief=1) and 0.9 < values["U2"] < 1
    silent = measure([t.kind.fallback(4) for t in targets], targets)
    assert measure([None] * len(targets), targets) == dict(U1=0, row=0, s=0, U2=silent["U2"], belief=0)
    # one graph decision of twenty that differs in one of three others, and one reply that is none
    first = right[0].action.copy()
    first[2] = 1 - first[2]
    values = measure([Decision(LINKS, first), None, *right[2:]], targets)
    assert values["row"] == pytest.approx(1 - 1 / 3 / probe.GAMES)
    assert values["U1"] == pytest.approx(1 - 1 / len(targets))
    assert values["belief"] == pytest.approx(1 - 2 / len(targets))  # nor do they state one


def test_the_levels_are_those_of_the_same_questions(targets):
    by_name = levels(targets)
    assert by_name["expert"]["row"] == by_name["expert"]["belief"] == 1
    assert by_name["random play"]["row"] == pytest.approx(0.5, abs=0.044)  # of 1,200 coins
    constant, graph = by_name["best constant answer"], [t for t in targets if t.kind is LINKS]
    always = measure([Decision(LINKS, np.array([0, 1, 1, 1])) for _ in graph], graph)
    assert always["s"] == constant["s"] == 1  # a proposal that nobody answers costs nothing in s
    assert 0.5 < always["row"] <= constant["row"] < 0.7
    assert by_name["random play"]["U2"] < constant["U2"] < 1


def asked_at(folder, name, steps, every, done=0):
    """The steps at which a probe asks a stage that has so many steps and is resumed after `done` of them."""
    policy = SimpleNamespace(encode_prompt=lambda chat: [1], check_length=lambda *_: None)
    policy.encode_reply = lambda text: [1]
    policy.sample = lambda prompts, *_: [[Reply("no", [], [], True)] for _ in prompts]
    stage = SimpleNamespace(steps_done=done)
    stage.open_log = lambda log, keep, folder: JsonLines(folder / f"{log}.jsonl", keep)
    ask = Probe(stage, name, every, policy, questions(), STYLE, folder, 0)
    for step in range(done, steps + 1):
        stage.finished = step == steps
        text = ask(step, 0.0)
    assert text.startswith(", probe: row 0.00, U2 ")
    return [line["step"] for line in lines_of(folder / "probe.jsonl") if line.get("stage") == name]


def test_the_rhythm(tmp_path, monkeypatch):
    """The second stage begins with what the first has ended in, so it is not asked before its first step."""
    monkeypatch.setattr(probe, "plot_curves", lambda folder: None)
    assert asked_at(tmp_path, "SFT", 40, 10) == [0, 10, 20, 30, 40]
    assert asked_at(tmp_path, "TOMPO", 20, 5) == [5, 10, 15, 20]
    assert asked_at(tmp_path, "TOMPO", 12, 5, done=5) == [5, 10, 12]  # lines of steps that are done again go
    assert asked_at(tmp_path / "new", "GRPO", 3, 5) == [0, 3]


def test_training_is_the_same_without_the_probe(full, model_dir, tmp_path, monkeypatch):
    for script in (train_sft, train_rft):
        monkeypatch.setattr(script, "make_probe", lambda *args: None)
    run_rft(rft_flags(model_dir, tmp_path / "run"))
    assert Run(tmp_path / "run").weights() == full.weights()
    assert not (tmp_path / "run" / "probe.jsonl").exists()


def test_the_same_policy_gives_the_same_answers(model_dir, tmp_path, monkeypatch):
    """With a learning rate of 0 it stays as it is; the values are those of the real parser."""
    monkeypatch.setattr(train_sft, "PROBE_EVERY", 2)
    train_sft.main(sft_flags(model_dir, tmp_path / "run", sft_lr=0, sft_steps=4))
    lines = lines_of(tmp_path / "run" / "probe.jsonl")[1:]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert len({str([line[key] for key in probe.KEYS]) for line in lines}) == 1


def test_a_stopped_run_leaves_its_picture(model_dir, tmp_path, monkeypatch):
    drawn, folder = [], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("whole_runs.run_rft", lambda argv: run_rft(argv, curves=True))
        patch.setattr("train_rft.plot_curves", drawn.append)
        interrupted(monkeypatch, rft_flags(model_dir, folder), folder / "metrics.jsonl", 1)
    assert drawn == [folder] and (folder / "curves.png").stat().st_size > 10_000  # the probe's own picture
    assert [line.get("step") for line in lines_of(folder / "probe.jsonl")] == [None, 0, 3, 6]


def test_in_the_picture_steps_are_whole_and_levels_that_are_equal_are_told_apart(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda own, *path, **how: drawn.append(own) or save(own, *path, **how)
    )
    values = dict.fromkeys(probe.KEYS, 0.5)
    names = "expert", "random play", "best constant answer"
    log = JsonLines(tmp_path / "probe.jsonl", lambda row: True)
    log.write({"levels": {name: {"row": 1.0, "U2": 0.9} for name in names}})
    for step in (0, 4):
        log.write({"stage": "SFT", "step": step, "seconds": 60.0 * step} | values)
    steps = JsonLines(tmp_path / "metrics.jsonl", lambda row: True)
    for step in range(4):  # by default matplotlib would write 0.5, 1.5
        steps.write({"step": step, "reward_graph": 1.0, "kl": 0.1})
    plot_curves(tmp_path)
    (figure,) = drawn
    for axis in figure.axes:
        assert all(tick == int(tick) for tick in axis.get_xticks())
    lines = {line.get_label().split(":")[0]: line for line in figure.axes[0].lines}
    looks = [(line.get_color(), line.get_linestyle()) for line in map(lines.get, names)]
    widths = [line.get_linewidth() for line in map(lines.get, names)]
    assert len(set(looks)) == 3 and widths[0] > max(widths[1:]) + 2

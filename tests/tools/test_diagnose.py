"""Diagnosis: a healthy run is silent, each failure is named and nothing else, and no log can end a run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import games
import rewards
import tompo
from policy import Rollout
from prompts import parse_reply
from run import rft_log
from tools import diagnose
from world.bcz import BCZ
from world.pgg import PGG

STEPS = 16
GAME = BCZ((1.0,) * 4, 0.1, 0.1, 3.0)
ROWS = ["[0, 0, 0, 0]", "[0, 1, 0, 0]", "[0, 1, 1, 0]", "[0, 1, 1, 1]"]


def reply(decision, belief="[0, 1, 1, 1]"):
    return f"Belief: {belief}\nDecision: {decision}"


def sample(step, game, decision, expert, kind="G", stage=0):
    where = {"step": step, "game": game, "stage": stage, "kind": kind, "seat": 0}
    return where | {"reply": reply(decision), "expert": reply(expert), "broken": None}


def healthy():
    """(metrics, samples, results, config): 8 prompts a step, 16 games that are each met every second step, 4
    replies, of which one is another one than the expert's."""
    usual = {"U1": 0.99, "zero_variance_groups": 0.3, "distinct_replies": 0.4}
    usual |= {"clip_fraction": 0.0, "max_ratio_error": 1e-5, "approx_kl": 1e-12}
    metrics = [usual | {"step": t, "kl": 0.001 * t} for t in range(STEPS)]
    samples = []
    for t in range(STEPS):
        for k in range(8):
            game = k + 8 * (t % 2)
            answers = [ROWS[game % 4]] * 3 + [ROWS[(game + t) % 4]]
            samples += [sample(t, game, a, ROWS[game % 4]) for a in answers]
            efforts = [f"{1 + 0.1 * game + error:.2f}" for error in (0, 0.01)]
            samples += [sample(t, game, effort, efforts[0], "E", stage=1) for effort in efforts]
    return metrics, samples, results_of(0.95, 0.87), {"inner_epochs": 1, "dtype": "float32"}


def results_of(u2, u3, expert=0.88, replies=(), u1=0.99, **of_game):
    game = replace(GAME, **of_game)

    def summary(U2, U3):
        return {
            "all rounds": {"U1": {"mean": u1}, "U2": {"mean": U2}, "U3": {"mean": U3}},
            "instances": [{"instance": game.to_json()}] * max(1, len(replies)),
            "replies": list(replies),
        }

    rows = {"tompo": (u2, u3), "sft": (0.1, 0.1), "expert:second-best": (0.97, expert)}
    return {name: summary(*means) for name, means in (rows | {"expert:random": (0.5, 0.1)}).items()}


def write(folder, metrics, samples, results, config):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results is not None:
        (folder / "eval.json").write_text(json.dumps({"results": results}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def levels(folder):
    return {f.name: diagnose.LEVELS[f.level] for f in diagnose.diagnose(folder) if f.level}


def test_a_healthy_run_is_silent(tmp_path, capsys):
    folder = write(tmp_path / "run", *healthy())
    assert levels(folder) == {}
    assert "none of 7" in diagnose.summary(folder)
    diagnose.main([str(folder)])
    out = capsys.readouterr().out
    assert out.count("ok     ") == 7 and "->" not in out
    (folder / "eval.json").unlink()
    assert levels(folder) == {}
    write(folder, [row | {"kl": None} for row in healthy()[0]], *healthy()[1:])
    assert levels(folder) == {} and "not measured" in diagnose.format_findings(diagnose.diagnose(folder))


NOT_UPDATED = dict.fromkeys(("kl", "approx_kl", "clip_fraction", "max_ratio_error"))


@pytest.mark.parametrize("idle_steps", [range(4), range(12, 16), range(STEPS)])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_steps_in_which_all_groups_were_idle_are_left_out(tmp_path, idle_steps, inner_epochs):
    metrics, samples, results, config = healthy()
    metrics[11]["kl"] = 0.3  # a spike that is still seen
    metrics = [row | (NOT_UPDATED if row["step"] in idle_steps else {}) for row in metrics]
    folder = write(tmp_path / "run", metrics, samples, results, config | {"inner_epochs": inner_epochs})
    findings = {f.name: f for f in diagnose.diagnose(folder)}
    everywhere = len(idle_steps) == STEPS
    assert ("not measured" in findings["clipped updates"].numbers) == everywhere
    kl = findings["KL from the SFT policy that runs away"]
    assert ("not measured" in kl.numbers) == everywhere and kl.level == (0 if everywhere else 1)
    assert "no diagnosis" not in diagnose.summary(folder)


def non_compliant(run, share):
    metrics, samples, *_ = run
    for row in metrics[-4:]:
        row["U1"] = 1 - share
    for s in samples[:: int(1 / share)]:
        s["broken"] = "wrong length" if s["kind"] == "G" else "number outside [0, cap]"


def flip(run):
    for s in run[1]:
        if s["kind"] == "G":
            s["reply"] = reply(ROWS[(s["game"] + s["step"] // 2) % 4])


def one_answer(run):
    for s in run[1]:
        if s["step"] >= 12 and s["kind"] == "G":
            s["reply"] = reply(ROWS[3])
    # (The answers differ from those before in 3 of 4 games once: 12 of 112 occasions do not "keep changing".)


def idle(run, share):
    for row in run[0][8:]:
        row["zero_variance_groups"] = share


CHANGED = [reply(ROWS[1]), reply(ROWS[2]), reply("1.0")]  # two link stages in a row, and efforts
SELFISH = "good for itself, bad for all (high U2, low U3)"
FAILURES = {
    "format, watch": (lambda run: non_compliant(run, 0.1), "replies that break the format", "watch"),
    "format, bad": (lambda run: non_compliant(run, 0.25), "replies that break the format", "bad"),
    "welfare, watch": (lambda run: run[2].update(results_of(0.9, 0.80)), SELFISH, "watch"),
    "welfare, bad": (lambda run: run[2].update(results_of(0.9, 0.50)), SELFISH, "bad"),
    "links between steps": (flip, "links that keep changing", "bad"),
    "links within a round": (
        lambda run: run[2].update(results_of(0.95, 0.87, stages="GGE", replies=[CHANGED] * 10)),
        "links that keep changing",
        "bad",
    ),
    "idle, watch": (lambda run: idle(run, 0.7), "groups without variance", "watch"),
    "idle, bad": (lambda run: idle(run, 0.95), "groups without variance", "bad"),
    "collapse": (one_answer, "one answer to everything", "bad"),
    "KL, bad": (
        lambda run: [row.update(kl=0.1 * row["step"]) for row in run[0]],
        "KL from the SFT policy that runs away",
        "bad",
    ),
    "KL, a spike": (lambda run: run[0][7].update(kl=2.0), "KL from the SFT policy that runs away", "watch"),
    "ratio": (lambda run: run[0][3].update(max_ratio_error=0.2), "clipped updates", "bad"),
    "ratio in bf16": (
        lambda run: [run[3].update(dtype="bfloat16"), run[0][3].update(max_ratio_error=0.6, approx_kl=0.002)],
        "clipped updates",
        "bad",
    ),
    "clipped": (
        lambda run: (
            [run[3].update(inner_epochs=4)]
            + [row.update(clip_fraction=0.2, max_ratio_error=0.5) for row in run[0]]
        ),
        "clipped updates",
        "watch",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_named_and_nothing_else(case, tmp_path):
    change, name, level = FAILURES[case]
    run = healthy()
    change(run)
    folder = write(tmp_path / "run", *run)
    assert levels(folder) == {name: level}
    (found,) = [f for f in diagnose.diagnose(folder) if f.level]
    assert (
        found.advice.endswith(".")
        and name in diagnose.summary(folder)
        and "1 of 7" in diagnose.summary(folder)
    )
    first, *_ = diagnose.format_findings(diagnose.diagnose(folder)).splitlines()
    assert first == f"{level:7}{name}"


def test_the_numbers_are_those_of_the_run(tmp_path):
    run = healthy()
    non_compliant(run, 0.25)
    text = diagnose.diagnose(write(tmp_path / "run", *run))[0].numbers
    total = len(run[1])
    graph, effort = (sum(s["broken"] is not None and s["kind"] == kind for s in run[1]) for kind in "GE")
    assert f"U1 0.990 early, 0.750 late; {graph + effort} of {total} replies" in text
    assert f"wrong length (G) {graph}" in text and f"number outside [0, cap] (E) {effort}" in text


def pairs_of(replies, **of_game):
    return diagnose.repeated_link_stages(results_of(0.95, 0.87, replies=replies, **of_game))


def test_only_link_stages_that_follow_one_another_in_a_round_are_compared():
    """Efforts after links, and the links of the next round, may be others; N seats have N replies a stage."""
    one, other, effort = CHANGED
    a, b = ROWS[1:3]
    assert pairs_of([[one, effort]] * 10) == []
    assert pairs_of([[one, "x", one, other, "x", other]] * 10, stages="GEG", rounds=2) == []
    assert pairs_of([[one, other] * 2 + ["x", "x"]] * 10, stages="GGE") == [(a, a), (b, b)] * 10
    assert pairs_of([CHANGED * 2], stages="GGE", rounds=2) == [(a, b), (a, b)]


def test_a_pair_of_link_stages_with_a_reply_that_is_not_compliant_is_not_counted():
    """What was played there are no links."""
    good, other, effort = CHANGED
    for text in ("[0, 1, 2, 0]", "[0, 1, 0]", "[1, 1, 1, 1]", "[0, 1, 0, 0].", ""):
        for pair in ((good, reply(text)), (reply(text), good), (reply(text), reply(text))):
            assert pairs_of([[*pair, effort]], stages="GGE") == []
    # two seats: the first one's pair counts, the second one's does not
    assert len(pairs_of([[good, "x", other, other, effort, effort]], stages="GGE")) == 1


def test_the_number_of_agents_is_asked_of_the_game_itself(tmp_path, monkeypatch):
    """Of any game, also of one that is registered by its own file and has types of another name."""

    class Third(PGG):
        name = "third"

    monkeypatch.setitem(games.GAMES, "third", Third)
    monkeypatch.setattr(Third, "types", property(lambda self: (1.0,) * 4))
    results = results_of(0.95, 0.87, stages="GGE", replies=[CHANGED] * 10)
    for game in (PGG((10.0,) * 4, 1.25, 0.5, 1.0, "GGE"), Third((10.0,) * 3, 1.25, 0.5, 1.0, "GGE")):
        results["tompo"]["instances"] = [{"instance": game.to_json()}] * 10
        assert len(diagnose.repeated_link_stages(results)) == 10
    monkeypatch.delitem(games.GAMES, "third")
    folder = write(tmp_path / "run", *healthy()[:2], results, healthy()[3])
    assert diagnose.summary(folder).startswith("no diagnosis: ")  # a game that this program does not know


def test_bad_play_and_silence_are_no_social_dilemma(tmp_path):
    run = healthy()
    for results in (results_of(0.4, 0.3), results_of(0.9, 0.3, u1=0.1)):
        run[2].update(results)
        assert levels(write(tmp_path / "run", *run)) == {}


def test_the_rounding_of_bf16_is_no_mismatch(tmp_path):
    run = healthy()
    run[3].update(dtype="bfloat16")
    run[0][3].update(max_ratio_error=0.4, approx_kl=2e-4)
    assert levels(write(tmp_path / "run", *run)) == {}


def test_a_level_kl_with_a_small_hump_is_no_spike(tmp_path):
    run = healthy()
    for row in run[0]:
        row["kl"] = 0.12 if row["step"] == 7 else 0.08
    assert levels(write(tmp_path / "run", *run)) == {}


def test_groups_that_fail_alike_get_another_advice(tmp_path):
    run = healthy()
    for row in run[0]:
        row |= {"zero_variance_groups": 1.0, "U1": 0.0}
    advice = {f.name: f.advice for f in diagnose.diagnose(write(tmp_path / "run", *run))}[
        "groups without variance"
    ]
    assert "SFT" in advice and "harder" not in advice


def test_an_expert_that_changes_its_answer_is_not_followed_by_blame(tmp_path):
    """Where the state of the same stage differs (a noisy history), another answer is right."""
    run = healthy()
    for s in run[1]:
        if s["kind"] == "G":
            s["reply"] = s["expert"] = reply(ROWS[(s["game"] + s["step"] // 2) % 4])
    assert levels(write(tmp_path / "run", *run)) == {}


UNREADABLE = {
    "no logs": lambda folder: [path.unlink() for path in folder.iterdir()],
    "an empty log": lambda folder: (folder / "metrics.jsonl").write_text(""),
    "a log of something else": lambda folder: (folder / "metrics.jsonl").write_text('{"a": 1}\n[2]\n'),
    "not text": lambda folder: (folder / "samples.jsonl").write_bytes(b"\xff\n"),
    "half a line within": lambda folder: (folder / "samples.jsonl").write_text('{"step": \n{"step": 1}\n'),
    "a folder in a log's place": lambda folder: [
        (folder / "samples.jsonl").unlink(),
        (folder / "samples.jsonl").mkdir(),
    ],
    "an evaluation of another form": lambda folder: (folder / "eval.json").write_text('{"results": [1]}'),
    "an evaluation cut off": lambda folder: (folder / "eval.json").write_text('{"results": {'),
    "an unknown game": lambda folder: (folder / "eval.json").write_text(
        (folder / "eval.json").read_text().replace('"bcz"', '"chess"')
    ),
    "no settings": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_logs_that_cannot_be_read_are_one_line_and_never_end_a_run(case, tmp_path, capsys):
    metrics, samples, _, config = healthy()
    results = results_of(0.9, 0.9, stages="GGE", replies=[CHANGED])
    folder = write(tmp_path / "run", metrics, samples, results, config)
    assert diagnose.summary(folder).startswith("diagnosis: none of 7")
    UNREADABLE[case](folder)
    line = diagnose.summary(folder)
    assert line.startswith("no diagnosis: ") and str(folder) in line and "\n" not in line
    with pytest.raises(SystemExit) as stop:
        diagnose.main([str(folder)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_an_error_in_a_finding_does_not_end_a_run(tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(diagnose, "FINDINGS", (broken,))
    assert diagnose.summary(write(tmp_path / "run", *healthy())) == "no diagnosis: of another kind"


def test_what_a_step_of_training_logs_is_read(tmp_path):
    """The lines of run/rft_log.py themselves, with a reply that breaks a rule."""
    record = SimpleNamespace(game=0, stage=0, kind="G", seat=0, label=reply(ROWS[1]))
    target = SimpleNamespace(kind="G", place=("G", 0, GAME.N, 3.0))
    prompt = SimpleNamespace(record=record, target=target)
    group = []
    for text in (reply(ROWS[1]), reply("[0, 1]")):
        o = Rollout([1], [2, 3], [-1.0, -1.0], text, True, parse_reply(text, "G", 0, 4, 3.0))
        terms = dict.fromkeys(rewards.TERMS, 0.0) | {"r_S": 1.0, "s": 1.0, "R_G": 1.0}
        o.rewards = terms | {"compliance": rewards.compliance(o.decision)}
        group.append(o)
    logp_T = torch.zeros(4)
    _, sums = tompo.objective_loss(logp_T, logp_T, logp_T, logp_T, logp_T, beta=0.1)
    metrics = [{"step": t} | rft_log.step_metrics([prompt], [group], sums) for t in range(2)]
    samples = [line for t in range(2) for line in rft_log.sample_lines(t, [prompt], [group])]
    found = diagnose.diagnose(write(tmp_path / "run", metrics, samples, None, healthy()[3]))
    assert "2 of 4 replies broke a rule, wrong length (G) 2" in found[0].numbers
    assert {f.name for f in found if f.level} == {found[0].name, "groups without variance"}


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    folder = write(tmp_path / "run", *healthy())
    with open(folder / "samples.jsonl", "a") as f:
        f.write('{"step": 3, "ga')
    assert levels(folder) == {}

"""Diagnosis: a healthy run is silent, each failure is named and nothing else, rules against the strict parser."""

import json

import numpy as np
import pytest

from tools import diagnose
from tools.diagnose import broken_rule, rule_of
from prompts import parse_reply

STEPS = 16
ROWS = ["[0, 0, 0, 0]", "[0, 1, 0, 0]", "[0, 1, 1, 0]", "[0, 1, 1, 1]"]


def reply(decision, belief="[0, 1, 1, 1]"):
    return f"Belief: {belief}\nDecision: {decision}"


def sample(step, game, decision, expert, kind="G", ok=True, stage=0):
    return {
        "step": step, "game": game, "stage": stage, "kind": kind, "seat": 0, "reply": reply(decision),
        "expert": reply(expert), "compliance": 0.5 if ok else -0.5,
    }  # fmt: skip


def healthy():
    """(metrics, samples, results, config): 8 prompts a step, 16 games that are each met every second step, 4 replies,
    of which one is another one than the expert's."""
    metrics = [
        {"step": t, "U1": 0.99, "kl": 0.001 * t, "clip_fraction": 0.0, "max_ratio_error": 1e-5, "approx_kl": 1e-12, "zero_variance_groups": 0.3,
         "distinct_replies": 0.4} for t in range(STEPS)
    ]  # fmt: skip
    samples = []
    for t in range(STEPS):
        for k in range(8):
            game = k + 8 * (t % 2)
            answers = [ROWS[game % 4]] * 3 + [ROWS[(game + t) % 4]]
            samples += [sample(t, game, a, ROWS[game % 4]) for a in answers]
            efforts = [f"{1 + 0.1 * game + error:.2f}" for error in (0, 0.01)]
            samples += [sample(t, game, effort, efforts[0], "E", stage=1) for effort in efforts]
    return metrics, samples, results_of(0.95, 0.87), {"inner_epochs": 1}


def results_of(u2, u3, expert=0.88, stages="GE", replies=(), u1=0.99):
    def summary(U2, U3):
        return {
            "all rounds": {"U1": {"mean": u1}, "U2": {"mean": U2}, "U3": {"mean": U3}},
            "instances": [{"instance": {"stages": stages, "rounds": 1, "alpha": [1.0] * 4}}] * max(1, len(replies)),
            "replies": list(replies),
        }

    rows = {"tompo": (u2, u3), "sft": (0.1, 0.1), "expert:second-best": (0.97, expert), "expert:random": (0.5, 0.1)}
    return {name: summary(*means) for name, means in rows.items()}


def write(folder, metrics, samples, results, config):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results is not None:
        (folder / "eval.json").write_text(json.dumps({"results": results}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def levels(folder):
    return {f.name: f.level for f in diagnose.diagnose(folder) if f.level != "ok"}


def test_a_healthy_run_is_silent(tmp_path, capsys):
    folder = write(tmp_path / "run", *healthy())
    assert levels(folder) == {}
    assert "none of 7" in diagnose.summary(folder)
    diagnose.main([str(folder)])
    out = capsys.readouterr().out
    assert out.count("ok     ") == 7 and "->" not in out
    write(folder, healthy()[0], healthy()[1], None, {})
    (folder / "eval.json").unlink()
    assert levels(folder) == {}


def non_compliant(run, share):
    metrics, samples, *_ = run
    for row in metrics[-4:]:
        row["U1"] = 1 - share
    for s in samples[:: int(1 / share)]:
        s |= {"compliance": -0.5, "reply": reply("[0, 1.54, 0, 1]" if s["kind"] == "G" else "99")}


def flip(run):
    for s in run[1]:
        if s["kind"] == "G":
            s["reply"] = reply(ROWS[(s["game"] + s["step"] // 2) % 4])


def one_answer(run):
    for s in run[1]:
        if s["step"] >= 12 and s["kind"] == "G":
            s["reply"] = reply(ROWS[3])
    # the answers differ from those before in 3 of 4 games once: 12 of 112 occasions, which is not "keeps changing"


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
    "KL, bad": (lambda run: [row.update(kl=0.1 * row["step"]) for row in run[0]], "KL from the SFT policy that runs away", "bad"),
    "KL, a spike": (lambda run: run[0][7].update(kl=2.0), "KL from the SFT policy that runs away", "watch"),
    "ratio": (lambda run: run[0][3].update(max_ratio_error=0.2), "clipped updates", "bad"),
    "ratio in bf16": (
        lambda run: [run[3].update(dtype="bfloat16"), run[0][3].update(max_ratio_error=0.6, approx_kl=0.002)],
        "clipped updates",
        "bad",
    ),
    "clipped": (
        lambda run: [run[3].update(inner_epochs=4)] + [row.update(clip_fraction=0.2, max_ratio_error=0.5) for row in run[0]],
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
    (found,) = [f for f in diagnose.diagnose(folder) if f.level != "ok"]
    assert found.advice.endswith(".") and name in diagnose.summary(folder) and "1 of 7" in diagnose.summary(folder)
    first, *_ = diagnose.format_findings(diagnose.diagnose(folder)).splitlines()
    assert first == f"{level:7}{name}"


def test_the_numbers_are_those_of_the_run(tmp_path):
    run = healthy()
    non_compliant(run, 0.25)
    text = diagnose.diagnose(write(tmp_path / "run", *run))[0].numbers
    total = len(run[1])
    graph = sum(s["compliance"] < 0 and s["kind"] == "G" for s in run[1])
    effort = sum(s["compliance"] < 0 and s["kind"] == "E" for s in run[1])
    assert f"U1 0.990 early, 0.750 late; {graph + effort} of {total} replies" in text
    assert f"an entry that is not 0 or 1 (graph) {graph}" in text and f"number outside [0, cap] (effort) {effort}" in text


def test_only_link_stages_that_follow_one_another_in_a_round_are_compared(tmp_path):
    """Efforts after links, and the links of the next round, may be others; games of self-play have N replies a stage."""
    cases = [("GE", 1, CHANGED[:1] + CHANGED[2:]), ("GEG", 2, [CHANGED[0], "x", CHANGED[0], CHANGED[1], "x", CHANGED[1]])]
    cases += [("GGE", 1, CHANGED[:2] * 2 + ["x", "x"])]  # two seats, each says the same twice
    for stages, rounds, replies in cases:
        results = results_of(0.95, 0.87, stages=stages, replies=[replies] * 10)
        for row in results["tompo"]["instances"]:
            row["instance"]["rounds"] = rounds
        run = *healthy()[:2], results, {}
        assert levels(write(tmp_path / stages, *run)) == {}
    assert diagnose._repeated_link_stages(results) == (20, 0)


def test_a_pair_of_link_stages_with_a_reply_that_is_not_compliant_is_not_counted(tmp_path):
    """Neither as moved nor as repeated: what was played there are no links. BCZ's alpha and PGG's endowments say N."""
    good, other = CHANGED[:2]
    bad = ["x", "", reply("[0, 1, 2, 0]"), reply("[0, 1, 0]"), reply("[1, 1, 1, 1]"), reply("[0, 1, 0, 0].")]
    pairs = [pair for b in bad for pair in ((good, b), (b, good), (b, b))]
    for types in ("alpha", "endowment"):
        results = results_of(0.95, 0.87, stages="GGE", replies=[[*pair, "1.0"] for pair in pairs[:10]])
        for summary in results.values():
            summary["instances"] = [{"instance": {"stages": "GGE", "rounds": 1, types: [2.0] * 4}}] * 10
        assert diagnose._repeated_link_stages(results) == (0, 0)
        results["tompo"]["replies"] = [[*pair, "1.0"] for pair in pairs[8:]]
        assert diagnose._repeated_link_stages(results) == (0, 0)
        results["tompo"]["replies"] = [[good, other, "1.0"], [good, good, "1.0"], [good, bad[2], "1.0"]]
        assert diagnose._repeated_link_stages(results) == (2, 1)
        # two seats: the first one's pair counts, the second one's does not
        results["tompo"]["replies"] = [[good, bad[3], other, other, "1.0", "1.0"]] * 10
        assert diagnose._repeated_link_stages(results) == (10, 10)
        found = {f.name: f for f in diagnose.diagnose(write(tmp_path / types, *healthy()[:2], results, {}))}
        assert found["links that keep changing"].level == "bad" and "10 of 10" in found["links that keep changing"].numbers


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
    advice = {f.name: f.advice for f in diagnose.diagnose(write(tmp_path / "run", *run))}["groups without variance"]
    assert "SFT" in advice and "harder" not in advice


def test_an_expert_that_changes_its_answer_is_not_followed_by_blame(tmp_path):
    """Where the state of the same stage differs (a noisy history), another answer is right."""
    run = healthy()
    for s in run[1]:
        if s["kind"] == "G":
            s["reply"] = s["expert"] = reply(ROWS[(s["game"] + s["step"] // 2) % 4])
    assert levels(write(tmp_path / "run", *run)) == {}


@pytest.mark.parametrize(
    "decision, kind, rule",
    [
        ("[0, 1, 0, 1]", "G", None),
        ("[0, 1, 1]", "G", "wrong length"),
        ("[1, 1, 0, 1]", "G", "own position not 0"),
        ("[0, 2, 0, 1]", "G", "a digit above 1"),
        ("[0, 1.54, 0, 1]", "G", "an entry that is not 0 or 1"),
        ("[0, a, 0, 1]", "G", "an entry that is no number"),
        ("[0, 1, 0, 1].", "G", "text around the list"),
        ("[0, 1, 0, 1", "G", "no closed list in brackets"),
        ("", "G", "nothing after Decision:"),
        ("1.5", "E", None),
        ("6", "E", "number outside [0, cap]"),
        ("-1", "E", "number outside [0, cap]"),
        ("nan", "E", "not finite"),
        ("1e999", "E", "not finite"),
        ("1.5 units", "E", "text around the number"),
        ("some", "E", "no number"),
        ("[1.5]", "E", "a list instead of one number"),
    ],
)
def test_rules_by_hand(decision, kind, rule):
    assert broken_rule(f"Belief: [0, 1, 1, 1]\nDecision: {decision}", kind, 0, 4, 5.0) == rule
    assert broken_rule(decision, kind, 0, 4, 5.0) == "no Decision line"


def test_a_rule_is_broken_exactly_where_the_strict_parser_refuses():
    """Replies of random pieces; the logged form of the rule (no cap known) agrees."""
    rng, refused, kept = np.random.default_rng(0), 0, 0
    pieces = ["[", "]", "0", "1", "2", ", ", ".", " ", "-", "5", "[0, 1, 1]", "[0, 1, 0]", "nan", "x", "1.5", "e9"]
    pieces += ["\n", "Decision: "]
    for _ in range(4000):
        text = "Decision: " * int(rng.integers(2)) + "".join(rng.choice(pieces, rng.integers(1, 5)))
        for kind in "GE":
            decision = parse_reply(text, kind, 0, 3, 5.0)
            rule = broken_rule(text, kind, 0, 3, 5.0)
            assert (rule is None) == (decision is not None), text
            expert = reply("[0, 1, 1]" if kind == "G" else "1.00", "[0, 1, 1]")
            line = {"reply": text, "kind": kind, "seat": 0, "expert": expert, "compliance": 0.5 if decision else -0.5}
            assert rule_of(line) == rule, text
            refused, kept = refused + (rule is not None), kept + (rule is None)
    assert refused > 1000 and kept > 100


def test_no_run_is_one_line(tmp_path, capsys):
    for text in (None, "", '{"a": 1}\n'):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stop:
            diagnose.main([str(tmp_path)])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    metrics, samples, *_ = healthy()
    del metrics[0]["U1"], samples[0]["reply"]
    write(tmp_path, metrics, samples, None, {})
    with pytest.raises(SystemExit):
        diagnose.main([str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    folder = write(tmp_path / "run", *healthy())
    with open(folder / "samples.jsonl", "a") as f:
        f.write('{"step": 3, "ga')
    assert levels(folder) == {}

"""Diagnosis: a healthy run is silent, each failure is named and nothing else, and no log can end a run."""

import json

import pytest

from tools import diagnose

STEPS = 16
ROWS = ["[0, 0, 0, 0]", "[0, 1, 0, 0]", "[0, 1, 1, 0]", "[0, 1, 1, 1]"]


def reply(decision, belief="[0, 1, 1, 1]"):
    return f"Belief: {belief}\nDecision: {decision}"


def sample(step, game, decision, expert, kind="G", stage=0):
    place = {"step": step, "game": game, "stage": stage, "kind": kind, "seat": 0}
    return place | {"reply": reply(decision), "expert": reply(expert), "broken": None, "ended": True}


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
    return metrics, samples, results_of(0.95, 0.87), {"inner_epochs": 1, "dtype": "float32", "belief": True}


def results_of(u2, u3, u1=0.99):
    rows = {"tompo": (u2, u3), "sft": (0.1, 0.1), "expert:always-link": (0.97, 0.2)}
    rows |= {"expert:second-best": (0.97, 0.88), "expert:random": (0.5, 0.1)}
    tables = {
        name: {"U1": {"mean": u1}, "U2": {"mean": a}, "U3": {"mean": b}} for name, (a, b) in rows.items()
    }
    return {name: {"all rounds": table} for name, table in tables.items()}


def write(folder, metrics, samples, results, config):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results is not None:
        (folder / "eval.json").write_text(json.dumps({"results": results}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def findings(folder):
    return dict(diagnose.diagnose(folder))


def levels(folder):
    return {name: diagnose.LEVELS[level] for name, (level, *_) in findings(folder).items() if level}


def test_a_healthy_run_is_silent(tmp_path, capsys):
    folder = write(tmp_path / "run", *healthy())
    assert levels(folder) == {} and "none of 8" in diagnose.summary(folder)
    diagnose.main([str(folder)])
    out = capsys.readouterr().out
    assert out.count("ok     ") == 8 and "->" not in out
    with open(folder / "samples.jsonl", "a") as f:
        f.write('{"step": 3, "ga')  # a line that a kill has cut
    (folder / "eval.json").unlink()
    assert levels(folder) == {}
    write(folder, [row | {"kl": None} for row in healthy()[0]], *healthy()[1:])
    assert levels(folder) == {} and "not measured" in diagnose.format_findings(diagnose.diagnose(folder))


KL, CLIPPED = "KL from the SFT policy that runs away", "clipped updates"
NOT_UPDATED = dict.fromkeys(("kl", "approx_kl", "clip_fraction", "max_ratio_error"))


@pytest.mark.parametrize("idle_steps", [range(4), range(12, 16), range(STEPS)])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_steps_in_which_all_groups_were_idle_are_left_out(tmp_path, idle_steps, inner_epochs):
    metrics, samples, results, config = healthy()
    metrics[11]["kl"] = 0.3  # a spike that is still seen
    metrics = [row | (NOT_UPDATED if row["step"] in idle_steps else {}) for row in metrics]
    folder = write(tmp_path / "run", metrics, samples, results, config | {"inner_epochs": inner_epochs})
    everywhere = len(idle_steps) == STEPS
    assert ("not measured" in findings(folder)[CLIPPED][1]) == everywhere
    level, numbers, _ = findings(folder)[KL]
    assert ("not measured" in numbers) == everywhere and level == (0 if everywhere else 1)


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


def set_metrics(run, steps=range(STEPS), config=(), **values):
    run[3].update(config)
    for row in run[0]:
        if row["step"] in steps:
            row |= values


def placeholders(run, share):
    for s in run[1][:: int(1 / share)]:
        s["reply"] = s["reply"].replace("[0, 1, 1, 1]\n", "[what you expect, per agent]\n")


def same_but_expert(run):
    """Where the state of the same stage differs (a noisy history), another answer is right."""
    for s in run[1]:
        if s["kind"] == "G":
            s["reply"] = s["expert"] = reply(ROWS[(s["game"] + s["step"] // 2) % 4])


SELFISH, CHANGING = "good for itself, bad for all (high U2, low U3)", "links that keep changing"
FORMAT, IDLE = "replies that break the format", "groups without variance"
BF16, EPOCHS = {"dtype": "bfloat16"}, {"inner_epochs": 4}
FAILURES = {
    "format, watch": (lambda run: non_compliant(run, 0.1), FORMAT, "watch"),
    "format, bad": (lambda run: non_compliant(run, 0.25), FORMAT, "bad"),
    "beliefs, watch": (lambda run: placeholders(run, 0.2), "Belief lines that say nothing", "watch"),
    "beliefs, bad": (lambda run: placeholders(run, 0.5), "Belief lines that say nothing", "bad"),
    "welfare, watch": (lambda run: run[2].update(results_of(0.9, 0.80)), SELFISH, "watch"),
    "welfare, bad": (lambda run: run[2].update(results_of(0.9, 0.50)), SELFISH, "bad"),
    "links between steps": (flip, CHANGING, "bad"),
    "idle, watch": (lambda run: set_metrics(run, range(8, 16), zero_variance_groups=0.7), IDLE, "watch"),
    "idle, bad": (lambda run: set_metrics(run, range(8, 16), zero_variance_groups=0.95), IDLE, "bad"),
    "collapse": (one_answer, "one answer to everything", "bad"),
    "KL, bad": (lambda run: [row.update(kl=0.1 * row["step"]) for row in run[0]], KL, "bad"),
    "KL, a spike": (lambda run: set_metrics(run, [7], kl=2.0), KL, "watch"),
    "ratio": (lambda run: set_metrics(run, [3], max_ratio_error=0.2), CLIPPED, "bad"),
    "ratio in bf16": (lambda run: set_metrics(run, [3], BF16, approx_kl=0.002), CLIPPED, "bad"),
    "clipped": (lambda run: set_metrics(run, config=EPOCHS, clip_fraction=0.2), CLIPPED, "watch"),
    # What only looks like a failure:
    "bad play is no social dilemma": (lambda run: run[2].update(results_of(0.4, 0.3)),),
    "no belief was asked for": (lambda run: [run[3].update(belief=False), placeholders(run, 0.5)],),
    "silence is no social dilemma": (lambda run: run[2].update(results_of(0.9, 0.3, u1=0.1)),),
    "the rounding of bf16": (lambda run: set_metrics(run, [3], BF16, max_ratio_error=0.4, approx_kl=2e-4),),
    "several epochs": (lambda run: set_metrics(run, config=EPOCHS, max_ratio_error=0.5),),
    "a hump of a level KL": (lambda run: [set_metrics(run, kl=0.08), set_metrics(run, [7], kl=0.12)],),
    "an expert that changes its answer": (same_but_expert,),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_named_and_nothing_else(case, tmp_path):
    change, *found = FAILURES[case]
    run = healthy()
    change(run)
    folder = write(tmp_path / "run", *run)
    assert levels(folder) == (dict([found]) if found else {})
    if found:
        name, level = found
        assert name in diagnose.summary(folder) and "1 of 8" in diagnose.summary(folder)
        first, *_ = diagnose.format_findings(diagnose.diagnose(folder)).splitlines()
        assert first == f"{level:7}{name}" and findings(folder)[name][2].endswith(".")


def test_the_numbers_are_those_of_the_run(tmp_path):
    run = healthy()
    non_compliant(run, 0.25)
    for k, s in enumerate(run[1]):
        s["ended"] = k >= 7
    _, text, _ = findings(write(tmp_path / "run", *run))[FORMAT]
    total = len(run[1])
    graph, effort = (sum(s["broken"] is not None and s["kind"] == kind for s in run[1]) for kind in "GE")
    assert f"U1 0.990 early, 0.750 late; {graph + effort} of {total} replies" in text
    assert f"wrong length (G) {graph}" in text and f"number outside [0, cap] (E) {effort}" in text
    assert text.endswith("; 7 were cut off at the limit (--max-new-tokens)")
    set_metrics(run, zero_variance_groups=1.0, U1=0.0)  # groups that fail alike get another advice
    advice = findings(write(tmp_path / "run", *run))[IDLE][2]
    assert "SFT" in advice and "harder" not in advice


def edited(name, change):
    """A file of the run with another content."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


UNREADABLE = {
    "no logs": lambda folder: [path.unlink() for path in folder.iterdir()],
    "an empty log": edited("metrics.jsonl", lambda old: b""),
    "a log of something else": edited("metrics.jsonl", lambda old: b'{"a": 1}\n[2]\n'),
    "not text": edited("samples.jsonl", lambda old: b"\xff\n"),
    "half a line within": edited("samples.jsonl", lambda old: b'{"step": \n{"step": 1}\n'),
    "a folder in a log's place": lambda folder: [
        (folder / "samples.jsonl").unlink(),
        (folder / "samples.jsonl").mkdir(),
    ],
    "an evaluation of another form": edited("eval.json", lambda old: b'{"results": [1]}'),
    "an evaluation cut off": edited("eval.json", lambda old: b'{"results": {'),
    "no settings": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_logs_that_cannot_be_read_are_one_line_and_never_end_a_run(case, tmp_path, refused):
    metrics, samples, _, config = healthy()
    results = results_of(0.9, 0.9)
    folder = write(tmp_path / "run", metrics, samples, results, config)
    assert diagnose.summary(folder).startswith("diagnosis: none of 8")
    UNREADABLE[case](folder)
    line = diagnose.summary(folder)
    assert line.startswith("no diagnosis: ") and str(folder) in line and "\n" not in line
    assert str(folder) in refused(diagnose.main, [folder])


def test_an_error_in_a_finding_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(diagnose.FINDINGS, "broken", lambda run: next(iter(())))
    assert diagnose.summary(write(tmp_path / "run", *healthy())) == "no diagnosis: StopIteration"


def test_the_logs_of_a_real_run_are_read(full):
    summary = diagnose.summary(full.folder)
    assert summary.startswith("diagnosis: ") and summary.splitlines()[0] in full.said
    assert "of the evaluated replies are compliant" in findings(full.folder)[SELFISH][1]

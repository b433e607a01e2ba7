"""The study: its statistics by hand, what its arms run, and a small one that fails in part and goes on."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from whole_runs import lines_of

import settings
from games import State
from rewards import Target
from tools import study, study_figures, study_report
from tools.page import learned
from tools.study import ARMS, Arm, commands, parsers, part
from world.bcz import BCZ


def test_sign_flips_by_hand():
    # |mean| of (3, -1): 2 is reached by +3 -1, +3 +1 and their mirror images
    p_values = {(0.1, 0.2, 0.3): 2 / 8, (-1.0,) * 8: 2 / 256, (1.0, -1.0): 1, (3.0, -1.0): 1, (3.0, 1.0): 0.5}
    assert {d: study_report.sign_flip(list(d)) for d in p_values} == p_values


def test_holm_by_hand():
    """Holm 1979: the smallest times 3, the next times 2, the largest times 1, and never falling."""
    assert study_report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study_report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and study_report.holm([]) == []


def test_the_value_of_a_seed():
    values = {"U1": [1, 0.5], "U3": [0.8, 0.4], "row": [1, None], "belief": [None, None]}
    probe = [{"step": step, "row": row} for step, row in ((0, 0.4), (6, 0.8), (24, 0.8))]
    value = study_report.seed_values({"values": values, "probe": probe})
    expected = {"U1": 0.75, "U3": 0.6, "row": 1, "U1 x U3": 0.45, "speed": 0.75, "eval seed 0": 0}
    assert value == pytest.approx(expected | {study_report.LOG: math.log(0.45)})


def test_differences_are_paired_by_seed():
    def lines(arm, rows, shares):  # by seed; no row, no line
        values = [{"row": [row], "U1": [1], "U3": [share]} for row, share in zip(rows, shares, strict=True)]
        return [{"arm": arm, "seed": s, "values": v} for s, v in enumerate(values) if v["row"] != [None]]

    units = lines("tompo", (0.5, 0.7, 0.1), (0.4, 0.5, None))
    units += lines("a", (0.6, 0.9, None, 0.0), (0.8, 1.0, None, None))
    units += lines("of no common seed", (None, None, None, 0.0), (None,) * 4)
    values = study_report.by_seed(units)
    differences = study_report.compare(["tompo", "a", "of no common seed"], "tompo", values)
    row = differences["a"]["row"]
    assert list(differences) == ["a"] and row["mean"] == pytest.approx(0.15)
    assert row["n"] == 2 and row["p"] == 0.5
    half = 12.7062 * math.sqrt(0.005) / math.sqrt(2)  # t of one degree of freedom
    assert row["high"] == pytest.approx(0.15 + half)
    assert differences["a"][study_report.LOG]["mean"] == pytest.approx(math.log(2))  # in both seeds
    ratio = lambda rows: [row[-1] for row in study_report.rows_of_differences(rows, "tompo")][1]
    assert ratio(differences).startswith("2.000")
    units[1]["values"]["U3"] = [-0.1]  # it has no logarithm, and no seed is left out in silence
    assert ratio(study_report.compare(["tompo", "a"], "tompo", study_report.by_seed(units))) == "-"


def test_what_was_evaluated_with_other_random_numbers_is_compared_with_the_default_of_that_time():
    def unit(arm, seed, row, **how):
        return {"arm": arm, "seed": seed, "values": {"row": [row], "U1": [1]}} | how

    old = {"eval_seed": 0}
    units = [unit(study_report.SAME, seed, row, **old) for seed, row in enumerate((0.1, 0.2, 0.3))]
    units += [unit("tompo", seed, row) for seed, row in enumerate((0.5, 0.6, 0.7))]
    units += [unit("a", 0, 0.2, **old), unit("a", 1, 0.4, **old), unit("a", 2, 1.0)]
    row = study_report.compare(["a"], "tompo", study_report.by_seed(units))["a"]["row"]
    assert row["n"] == 3 and row["mean"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)


def test_rounds_of_links_seed_by_seed():
    def unit(arm, seed, by_round):
        return {"arm": arm, "seed": seed, "values": {"U1": [1]}, "U2 of links by round": by_round}

    units = [unit("tompo, x", 0, [0.5, 0.9, 0.94]), unit("tompo, x", 2, [0.5, 0.8, 0.8])]
    units += [unit("grpo, x", 2, [0.4, 0.6, 0.7]), {"arm": "y", "seed": 1, "values": {"U1": [1]}}]
    head, *rows = study_report.rows_of_rounds(units, study_report.by_seed(units))
    assert head == ["arm", "seed 0", "seed 2", "later rounds", "minus tompo, x"]
    assert rows[0][1:3] == ["0.50, 0.90, 0.94", "0.50, 0.80, 0.80"] and rows[0][3].startswith("0.860 [")
    assert rows[1] == ["grpo, x", "-", "0.40, 0.60, 0.70", "0.650", "-0.150"]


def sample(step=0, game=0, kind="G", compliance=0.5, reply="", expert="[0, 1, 1]", **values):
    place = {"step": step, "game": game, "stage": 0, "seat": 0, "kind": kind, "compliance": compliance}
    return place | {"reply": reply, "expert": f"Decision: {expert}"} | values


def test_levels_by_hand():
    def reply(game, A_S, A_G, bonus=0.5, compliance=0.5):
        return sample(game=game, compliance=compliance, A_S=A_S, A_G=A_G) | {"global": bonus}

    both = [reply(0, 1.0, 1.0), reply(0, -1.0, -1.0), reply(0, 1.0, -1.0), reply(0, -1.0, 1.0, 0, -0.5)]
    graph_idle = [reply(1, 1.0, 0.0), reply(1, -1.0, 0.0, 0.0)]
    idle = [reply(2, 0.0, 0.0), reply(2, 0.0, 0.0)]
    expected = 1 / 3, 2 / 3, 2 / 3, 0.0, 0.5
    levels = study_report.levels_of([*both, *graph_idle, *idle, {"kind": "E"}])
    assert levels == pytest.approx(dict(zip(study_report.LEVELS, expected, strict=True)))
    assert study_report.levels_of(idle)["correlation"] is None and study_report.levels_of([]) is None


def test_updates_by_hand():
    """Steps without a live group have no values, and runs with --beta 0 no KL."""
    names = study_report.UPDATES
    steps = [dict(zip(names, v, strict=True)) for v in ((0.1, 0.02, 0.5, None), (0.3, 0.04, 0.2, None))]
    updates = study_report.updates_of([*steps, dict.fromkeys(names)])
    assert updates == dict(zip(names, (0.2, pytest.approx(0.03), 0.5, None), strict=True))
    assert study_report.updates_of([]) == dict.fromkeys(names)


def test_efforts_between_own_payoff_and_welfare_by_hand():
    """Two linked agents with alpha 1, delta 0.1: agent 0 answers an effort of 2 best with 1.2, and 1.4 is
    best for both. Another game has no prompt, and replies of the middle quarters do not count."""
    state = State(BCZ((1.0, 1.0), 0.1, 0.1, 3.0)).step([[0, 1], [1, 0]])
    asked = {(0, 0, 0): (Target(state, 0, np.array([1.0, 2.0])), [])}

    def reply(step, effort, compliance=0.5, game=0):
        return sample(step, game, "E", compliance, f"Decision: {effort}")

    first = [reply(0, 1.2), reply(1, 1.3), reply(0, 9, -0.5), reply(0, 2, game=1)]
    efforts = study_report.efforts_of([*first, reply(4, 2), reply(7, 1.5)], asked)
    assert efforts == pytest.approx(dict(zip(study_report.COMMON, (0.25, 1.5), strict=True)))
    assert study_report.efforts_of([], asked) == dict.fromkeys(study_report.COMMON)


def test_a_dozen_groups_by_hand():
    def reply(game, row, A, kind="G", compliance=0.5):
        text = f"Decision: {row}" if compliance > 0 else "I link with all"
        return sample(game, game, kind, compliance, text, A_S=A, A_G=-A, advantage=A / 2)

    first = [reply(0, [0, 1, 0], -0.5), reply(0, [0, 1, 1], 1.0), reply(0, [0, 1, 0], -0.5)]
    second = [reply(1, "", -1.234, compliance=-0.5), reply(1, [0, 0, 0], 1.0), reply(1, "1.2", 9.0, "E")]
    assert [group["chosen"] for group in study_report.a_dozen([*first, *second])] == [
        [["011", 1, 1.0, -1.0, 0.5], ["010", 2, -0.5, 0.5, -0.25]],
        [["000", 1, 1.0, -1.0, 0.5], ["", 1, -1.234, 1.234, -0.617]],
    ]
    many = study_report.a_dozen([reply(game, [0, 1, 1], 0.0) for game in range(100)])
    assert [group["step"] for group in many] == [*range(0, 50, 9), *range(54, 100, 9)]
    assert many[0]["expert"] == "011" and study_report.a_dozen([]) == []


def test_beliefs_and_links_of_both_ends_of_a_run_by_hand():
    def reply(step, belief, row, expert="[0, 1, 0]", kind="G", compliance=0.5):
        text = f"Belief: {str(belief).replace(' ', '')}\nDecision: {row}" if belief else f"Decision: {row}"
        return sample(step, 0, kind, compliance, text, expert)

    a, b, none = "[0, 1, 0]", "[0, 1, 1]", "[0, 0, 0]"
    first = [reply(0, a, a), reply(1, a, none), *[reply(1, b, a)] * 2, reply(0, a, "all", a, "G", -0.5)]
    last = [reply(6, b, b, b), reply(7, a, a), reply(7, "[1]", "1.2", "1", "E"), reply(7, "", a)]
    replies = study_report.graph_replies([*first, reply(3, a, b), *last])
    assert replies["belief followed"] == [0.25, 1.0]
    assert replies["links chosen"] == pytest.approx([0.375, 2 / 3, 2 / 3])
    replies = study_report.graph_replies([reply(0, "", a)])
    assert replies == {"belief followed": [None, None], "links chosen": [0.5, None, None]}


def test_threshold_rules_by_hand(monkeypatch):
    numbers = {0: [0, 0.5, 1.5, 2.5], 1: [0.9, 0, 1.1, 3.0]}  # in the prompt of each seat
    monkeypatch.setattr(learned, "worked_numbers", lambda state, seat: numbers[seat])
    game = BCZ((1.0,) * 4, 0.1, 0.1, 3.0)
    asked = {(seat, 0, seat): (Target(State(game), seat, None, seat), []) for seat in (0, 1)}

    def final(*rows):
        texts = [(seat, row, row if row != "all" else "[0, 0, 0, 0]") for seat, row in rows]
        lines = [sample(4, s, reply=f"Decision: {row}", expert=e) | {"seat": s} for s, row, e in texts]
        return study_report.rules_of(lines, asked)

    clean = (0, "[0, 0, 1, 1]"), (1, "[0, 0, 1, 1]")
    assert final(*clean, (1, "all")) == {"expert": [1.1, 7 / 9], "sft": None, "final": [1.1, 1.0]}
    odd = final(*clean, (1, "all"), (0, "[0, 1, 1, 1]"))  # one of nine choices is not explained
    assert odd["final"] == [1.1, pytest.approx(8 / 9)]
    assert final((0, "[0, 0, 0, 0]"))["final"] == [2.51, 1.0]
    assert study_report.rules_of([sample(reply="Decision: [0, 1]")], {})["expert"] is None


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_something_that_the_scripts_take(arm, tmp_path):
    arms, parser_of = {a.name: a for a in ARMS}, parsers()
    assert len(arms) == len(ARMS) and (arm.of is None or arms[arm.of].of is None)
    for _, (script, *argv) in commands(arm, 3, "--rank 4", tmp_path):
        name = {"train_sft.py": "sft", "train_rft.py": "rft", "eval.py": "eval"}[script]
        args = parser_of[name].parse_args(argv[:-4] if name == "eval" else argv)  # without --policy, --json
        resolved = settings.resolve(args)
        assert name == "eval" or (resolved.run.seed, resolved.lora.rank) == (3, 4)
    known = {flag for parser in parser_of.values() for flag in parser._option_string_actions}
    words = f"{arm.flags} {arm.evaluation or ''}".split()
    assert {word for word in words if word.startswith("--")} <= known


def test_arms_share_the_sft_stage_that_they_do_not_change(tmp_path):
    arms = {a.name: a for a in ARMS}

    def products(name, seed=0):
        return [product for product, _ in commands(arms[name], seed, "", tmp_path)]

    tompo, grpo, sft = products("tompo"), products("grpo"), products("sft")
    assert tompo[0] == grpo[0] == sft[0] and len(tompo) == 3 and len(sft) == 2 and tompo[1] != grpo[1]
    assert products("label noise 0.9")[0] != tompo[0] != products("tompo", 1)[0]
    on_pgg = commands(arms["tompo on PGG"], 0, "", tmp_path)
    assert [product for product, _ in on_pgg[:2]] == tompo[:2]  # the same policy, on other games
    assert on_pgg[2][1][:5] == ["eval.py", "--game", "pgg", "--expert", "planner"]
    own = [commands(arms["tompo"], seed, "", tmp_path)[2][1] for seed in (0, 7)]
    assert [argv[argv.index("--eval-seed") + 1] for argv in own] == ["0", "7"]
    assert part("--no-hints --algo grpo --steps 3", "sft") == ["--no-hints"]


def test_a_small_study_fails_in_part_and_goes_on(model_dir, tmp_path, monkeypatch, capsys):
    tiny = f"--model {model_dir} --games 4 --sft-steps 2 --steps 2 --eval-games 2 --max-new-tokens 14"
    broken = Arm("broken", "algorithm", "--objective loss=none", 2)
    monkeypatch.setattr(study, "ARMS", [ARMS[0], broken, ARMS[2]])
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    argv = ["--flags", tiny, "--results", str(tmp_path / "study.jsonl")]
    with pytest.raises(SystemExit) as stop:
        study.main([*argv, "--seeds", "5"])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "failed: broken, seed 5: error: --objective loss=none" in said
    lines = lines_of(tmp_path / "study.jsonl")
    assert sorted((line["arm"], line["seed"]) for line in lines) == [("sft", 5), ("tompo", 5)]
    tompo = next(line for line in lines if line["arm"] == "tompo")
    assert [e["step"] for e in tompo["probe"]] == [0, 2] and len(tompo["values"]["row"]) == 2
    config = json.loads((tmp_path / "runs/study/tompo/seed5/config.json").read_text())
    assert config["seed"] == 5 and config["sft_adapter"].endswith("seed5/adapter")

    # what is finished is not done again: with its files gone, the line is enough
    monkeypatch.setattr(study, "ARMS", [ARMS[0], ARMS[2]])
    monkeypatch.setattr(study.subprocess, "run", None)
    study.main([*argv, "--seeds", "5-5"])
    assert lines_of(tmp_path / "study.jsonl") == lines

    study.main([*argv, "--report"])
    report = (tmp_path / "study.md").read_text()
    assert report.count("| tompo |") == 4 and "| sft | SFT alone | 1 |" in report
    before, after = (next(line for line in lines if line["arm"] == arm) for arm in ("sft", "tompo"))
    gain = study_report.seed_values(after)["U2"] - study_report.seed_values(before)["U2"]
    added = report.split("## What RFT adds")[1].splitlines()[4]
    assert added.startswith("| tompo | 1 | ") and f", {gain:+.3f} |" in added
    assert "tompo (7), sft (7)." in report  # what the plan still lacks
    for name in ("study-forest.png", "study-curves.png", "study-stakes.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_own_payoff_and_welfare_of_the_weights(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda own, *path, **how: drawn.append(own))
    seeds = {"U2": np.array([0.9, 1.0, np.nan]), "U3": np.array([0.8, 0.82, np.nan])}
    one = {"U2": np.array([0.5]), "U3": np.array([0.99])}
    study_figures.draw_stakes({"tompo, public good": seeds, "weights 0.2 0.8, public good": one}, tmp_path)
    empty, axis = drawn[0].axes
    points = {c.get_label(): [float(c[0].get_data()[k][0]) for k in (0, 1)] for c in axis.containers}
    assert not empty.containers and list(points) == ["0.8, 0.2 (ToMPO)", "0.2, 0.8"]
    assert [*points.values()] == [pytest.approx([0.95, 0.81]), [0.5, 0.99]]
    bars = [segment for bar in axis.containers[0][2] for segment in bar.get_segments()]
    half = 12.7062 * 0.05  # t of one degree of freedom, times the standard error
    assert np.ptp(bars[0][:, 0]) == pytest.approx(2 * half) and np.ptp(bars[1][:, 1]) == pytest.approx(
        0.4 * half
    )


def test_the_forest_shows_the_reference_minus_the_arms_of_more_than_two_seeds(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    kept = lambda own, *path, **how: drawn.append(own) or save(own, *path, **how)
    monkeypatch.setattr(Figure, "savefig", kept)

    def row(n, mean, half):
        return {"row": {"mean": mean, "n": n, "low": mean - half, "high": mean + half}}

    arms = {"a": row(8, -0.1, 0.05), "b": row(2, -0.9, 3.0), "c": row(3, 0.4, 0.5)}
    study_figures.draw_forest({"tompo": arms, "seat 0": {"all": row(2, 0, 1)}}, tmp_path / "forest.png")
    axis = drawn[0].axes[0]
    labels = [(text.get_text(), text.get_fontweight()) for text in axis.get_yticklabels()]
    assert labels == [("tompo minus", "bold"), ("a, 8 seeds", "normal"), ("c, 3 seeds", "normal")]
    drawn = {line.get_ydata()[0]: list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 3}
    assert drawn == {2: pytest.approx([0.05, 0.1, 0.15]), 1: pytest.approx([-0.9, -0.4, 0.1])}


def test_the_stored_results_give_the_stored_tables(tmp_path):
    """The lines of results/study.jsonl, whose flags are partly those of older versions."""
    stored = study.ROOT / "results"
    results = shutil.copy(stored / "study.jsonl", tmp_path)
    study_report.write(Path(results), {arm.name: arm.seeds for arm in ARMS})
    new, old = ((folder / "study.md").read_text().splitlines() for folder in (tmp_path, stored))
    assert [line for line in new if line[:1] == "|"] == [line for line in old if line[:1] == "|"]


def test_a_unit_says_where_it_was_run(tmp_path, monkeypatch):
    head = study.subprocess.run(["git", "rev-parse", "HEAD"], cwd=study.ROOT, capture_output=True, text=True)
    commit = study.machine()["commit"]
    assert head.stdout.startswith(commit) if head.returncode == 0 else commit == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git: no unit is lost to that
    assert study.machine()["commit"] == "unknown" and study.machine()["machine"].startswith(study.cpu_name())


def test_what_cannot_be_run_is_refused(refused, tmp_path):
    assert "no results yet" in refused(study.main, ["--report", "--results", tmp_path / "none.jsonl"])

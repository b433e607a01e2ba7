"""What is measured: statistics against tables, efficiency by brute force and by hand, summaries, seeds."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tables import TRIO, TRIO_2, expert, play

import eval as evaluation
from decisions import EFFORTS, LINKS
from games import Decision, State, complete_graph, empty_graph
from play import intervals, metrics, report
from play.cast import make_expert
from play.expert_games import history_from_text
from play.intervals import mean_interval
from play.metrics import METRICS, Episode, Turn, per_instance
from play.report import paired_difference, summarise
from run.files import write_json
from world.bcz import BCZ
from world.draws import held_out_grid


def test_quantiles_of_t():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 14: 2.1448, 29: 2.0452}
    table |= {59: 2.0010, 119: 1.9801, 10**6: 1.95997}
    for df, t in table.items():
        assert intervals._t95(df) == pytest.approx(t, abs=1e-3 if df == 14 else 1e-4)
    values = [intervals._t95(df) for df in range(1, 200)]
    assert all(a > b > 1.95996 for a, b in itertools.pairwise(values))


def test_wilson_ends_solve_the_score_equation():
    """|share - p| = z sqrt(p (1 - p) / n) at both ends; where all or none succeed, one end is the share."""
    for s, n in ((3, 17), (41, 60), (1, 200), (8, 10)):
        v = intervals.wilson_interval(s, n)
        assert v["mean"] == s / n and v["n"] == n and v["low"] < s / n < v["high"]
        for p in (v["low"], v["high"]):
            assert abs(s / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))
    for s, low, high in ((0, 0.0, 0.2775), (10, 0.7225, 1.0)):
        v = intervals.wilson_interval(s, 10)
        assert (v["low"], v["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_mean_interval():
    v = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # sd sqrt(2.5), half width 2.7764 * sqrt(2.5 / 5)
    assert v["mean"] == 3 and v["n"] == 5
    assert [v["high"] - 3, 3 - v["low"]] == pytest.approx([1.9632] * 2, abs=1e-4)
    left_out = mean_interval([1.0, None, math.nan, 3.0])
    assert (left_out["n"], left_out["mean"]) == (2, 2)
    assert mean_interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "n": 1}
    assert mean_interval([None]) == mean_interval([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert mean_interval([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 3}


def test_intervals_end_where_the_metric_does():
    wide = mean_interval([0.2, 0.9])  # 0.55 ± 4.45
    cells = {m: report.format_table({"a": {m: wide}}, [m]) for m in ("U2", "U3", "gap", "x")}
    told = {"U2": "0.550 [0, 1]", "U3": "0.550 [-3.90, 1]", "gap": "0.550 [0, 5.00]", "x": "0.550 ±4.45"}
    assert {m: cell.split("  ")[-1].strip() for m, cell in cells.items()} == told
    assert report.format_table({"a": {"U2": wide}}, ["U2"], 2, "+").endswith("+0.550 [-1.00, 1]")


def test_a_constant_answer_is_said_to_be_one_where_proposals_are_free():
    def results(name, **more):
        return {name: {"instances": [{"instance": {"game": "bcz"} | more}]}}

    assert "no constant answer is good" in report.about_constant(results("expert:always-link"))
    assert report.about_constant(results("expert:always-link", fee=0.05)) == ""
    assert report.about_constant(results("expert:random")) == ""


def test_paired_difference():
    def summary(*values):
        return {"instances": [{"U3": v} for v in values]}

    a, b = summary(0.5, 0.7, None, 0.9, 0.3), summary(0.4, 0.7, 0.2, 0.7, None)
    d = paired_difference(a, b, "U3")  # 0.1, 0, 0.2: mean 0.1, sd 0.1
    assert d["n"] == 3 and d["mean"] == pytest.approx(0.1)
    assert d["high"] - 0.1 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert paired_difference(b, a, "U3")["mean"] == pytest.approx(-0.1)
    assert paired_difference(a, a, "U3") == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}


# U2 of one link where two are best: both links pay 0.68125, one 0.57995, none 0.5.
ROW_VALUE = 0.07995 / 0.18125


def turn(round, action, belief=None, ok=True):
    """A decision of seat 0 in TRIO_2: a row where the others and the experts link everybody, or an effort on
    the empty graph where the others take effort 1."""
    graph = isinstance(action, list)
    state = State(TRIO_2, (empty_graph(3), np.ones(3)) * (round - 1) + (() if graph else (empty_graph(3),)))
    actions = complete_graph(3) if graph else np.ones(3)
    experts, decision = actions.copy() if graph else None, None
    if ok:
        decision = Decision(LINKS if graph else EFFORTS, np.array(action), belief and np.array(belief))
    actions[0] = decision.action if ok else 0
    return Turn(state, 0, "text", decision, decision, actions, experts)


def test_metrics_of_one_game_by_hand():
    turns = [turn(1, [0, 1, 0], [0, 1, 0]), turn(1, 2.0, [0, 1, 1])]
    turns += [turn(2, [0, 1, 1], ok=False), turn(2, 1.0)]
    played = Episode(TRIO_2, turns, [1.85, 2.2])
    row, first = per_instance(played), summarise([played])["round 1"]
    first = {name: v["mean"] for name, v in first.items()}
    assert row.pop("U3 | ok") is None
    assert row.pop("gap") > 0 and first.pop("gap") > 0  # see test_the_gap_by_hand
    expected = {"U1": 3 / 4, "U2": (ROW_VALUE + 0.75 + 0 + 1) / 4, "U3": 2.025 / 2.2}
    expected |= {"U2 | ok": (ROW_VALUE + 0.75 + 1) / 3, "U2 graph": ROW_VALUE / 2, "U2 effort": 0.875}
    assert row == pytest.approx(expected | {"s": 1 / 3, "row": 0.25, "belief": 1.5 / 4}, abs=1e-4)
    expected = {"U1": 1, "U2": (ROW_VALUE + 0.75) / 2, "U3": 1.85 / 2.2, "belief": 0.75}
    expected |= {"U2 | ok": (ROW_VALUE + 0.75) / 2, "U2 graph": ROW_VALUE, "U2 effort": 0.75}
    assert first == pytest.approx(expected | {"U3 | ok": 1.85 / 2.2, "s": 2 / 3, "row": 0.5}, abs=1e-4)


def test_the_gap_by_hand():
    """Effort 2 instead of the best reply."""
    effort = turn(1, 2.0, [0, 1, 1])
    game, best = effort.state.game, effort.state.game.best_response(effort.state.links, effort.actions)[0]
    lost = (2.0 - best) ** 2 / 2  # the payoff is quadratic in the own effort, with second derivative -1
    _, first_best = game.efficient_graph("planner")
    assert METRICS["gap"](Episode(game, [effort], [1.0])) == pytest.approx(lost * 3 / first_best)


def test_there_is_no_u3_where_the_first_best_is_worth_nothing(monkeypatch):
    """And the tables show that as a dash."""
    turns = [turn(1, [0, 1, 1]), turn(1, 1.0)]
    game = BCZ((1.0, 1.0, 1.0), 0.1, 0.5, 3.0)  # c* = 0.1 / (1 - 0.4) = 1/6
    row = per_instance(Episode(game, turns, [1.2]))
    assert row["U3"] == pytest.approx(0.8) and game.efficient_graph("planner")[1] == pytest.approx(1.5)
    monkeypatch.setattr(BCZ, "efficient_graph", lambda game, efforts: (None, 0.0))
    s = summarise([Episode(TRIO, turns, [0.0])])
    assert s["instances"][0]["U3"] is None and s["all rounds"]["U3"]["n"] == 0
    assert report.report({"a": s, "b": s}).endswith(" -")


def test_summary_counts_decisions_and_averages_instances():
    a = [turn(1, [0, 1, 1]), turn(1, 1.0), turn(2, [0, 1, 1], ok=False), turn(2, 3.0)]
    b = [turn(r, action, ok=False) for r in (1, 2) for action in ([0, 1, 1], 1.0)]
    s = summarise([Episode(TRIO_2, a, [2.2, 2.2]), Episode(TRIO_2, b, [1.1, 2.2])])
    expected = {"all rounds": dict(U1=(3 / 8, 8), U2=(0.4375, 2), U3=(0.875, 2)) | {"U2 | ok": (2 / 3, 1)}}
    expected |= {"round 1": dict(U1=(1 / 2, 4), U2=(0.6875, 2), U3=(0.75, 2)) | {"U3 | ok": (1, 1)}}
    for part, values in expected.items():
        for metric, (mean, n) in values.items():
            assert (s[part][metric]["mean"], s[part][metric]["n"]) == (pytest.approx(mean), n)
    assert s["all rounds"]["U3 | ok"]["n"] == 0
    assert [r["U1"] for r in s["instances"]] == [0.75, 0.0] and s["instances"][0]["instance"]["delta"] == 0.1


def test_every_game_is_written_whole():
    """Replies, seats and everybody's actions: from them the game can be played again."""
    grid = list(held_out_grid(4))[:5]
    played = play(grid, expert("random"), 1, make_expert("noisy:nash:0.5"), 3)
    s = summarise(played)
    assert [len(replies) for replies in s["replies"]] == [2] * 5 and s["seats"] == [[1]] * 5
    for game, one, texts, replies in zip(grid, played, s["actions"], s["replies"], strict=True):
        again = history_from_text(game, texts)
        assert again.done and [a.tolist() for a in again.history] == [a.tolist() for a in one.history]
        assert texts[0].split()[1] in replies[0].replace(", ", "") and texts[1].split()[1][:3] in replies[1]
        assert [float(pay.sum()) for _, _, pay in again.round_results()] == one.welfares


def test_lines_fit_into_120_columns_and_long_names_have_their_own():
    grid = list(held_out_grid(4))[::15]
    s = summarise(play(grid, expert("random"), 0, make_expert("nash"), 0))
    name = "runs/a-rather-long-name-of-a-run-" * 2 + "/adapter"
    lines = report.report({"base": s, name: s}).splitlines()
    assert max(map(len, lines)) <= 120 and lines[0].split() == "policy U1 s row U2 U3 belief".split()
    assert lines[2] == name and lines[3].split() == lines[1].split()[1:] and lines.count(name) == 2
    for metric in ("s", "row", "U2", "U3", "belief"):
        v = s["all rounds"][metric]
        told = f"±{(v['high'] - v['low']) / 2:.2f}" if v["high"] < 1 and v["low"] > 0 else "["
        assert f" {v['mean']:.3f} {told}" in lines[3]


def test_a_new_metric_is_one_entry_and_older_files_lack_it(monkeypatch, tmp_path, capsys):
    game = Episode(TRIO, [turn(1, [0, 1, 1]), turn(1, 1.0)], [2.2])
    write_json(tmp_path / "old.json", {"results": {"a": summarise([game])}})
    monkeypatch.setitem(METRICS, "links", metrics.mean_of(lambda t: t.actions[0].sum()))
    s = summarise([game, game])
    assert s["all rounds"]["links"]["mean"] == 1.5 and s["instances"][0]["links"] == 1.5
    evaluation.main(["--seeds", str(tmp_path / "old.json")])
    _, _, head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith(" links") and line.split()[1] == "1.000" and line.split()[-1] == "-"


@pytest.fixture
def seeds(tmp_path):
    """eval.json files of runs whose policy is a coin with another seed each."""

    def write(*counts, rounds=1):
        paths = []
        for seed, count in enumerate(counts):
            grid = [replace(game, rounds=rounds) for game in list(held_out_grid(3))[:count]]
            players = {"tompo": expert("random", seed), "sft": expert("never-link", seed)}
            played = {name: play(grid, p, 0, make_expert("nash"), 0) for name, p in players.items()}
            results = {name: summarise(games) for name, games in played.items()}
            paths.append(str(tmp_path / f"eval{seed}.json"))
            write_json(paths[-1], {"arguments": {}, "results": results})
        return paths, [json.loads(Path(path).read_text())["results"] for path in paths]

    return write


def test_intervals_over_seeds_are_those_of_the_seed_means(seeds, capsys):
    paths, runs = seeds(6, 6, 6)
    evaluation.main(["--seeds", *paths])
    table, differences = capsys.readouterr().out.split("minus")
    means = np.array([run["tompo"]["all rounds"]["U3"]["mean"] for run in runs])
    half = 4.3027 * means.std(ddof=1) / math.sqrt(3)
    assert means.mean() + half > 1 and f"{means.mean():.3f} [{means.mean() - half:.2f}, 1]" in table
    pairs = [zip(run["tompo"]["instances"], run["sft"]["instances"], strict=True) for run in runs]
    means = np.array([np.mean([a["U3"] - b["U3"] for a, b in pair]) for pair in pairs])
    half = 4.3027 * means.std(ddof=1) / math.sqrt(3)
    (line,) = [line for line in differences.splitlines() if line.startswith("sft")]
    assert line.endswith(f"{means.mean():+.3f} ±{half:.3f}") and len(set(means)) == 3
    assert "by round" not in table


def test_games_of_several_rounds_have_a_table_by_round_over_seeds_too(seeds, capsys):
    paths, runs = seeds(4, 4, rounds=2)
    evaluation.main(["--seeds", *paths])
    head, tompo, sft, *_ = capsys.readouterr().out.split("U2 of links by round\n")[1].splitlines()
    means = [[run["tompo"][f"round {r}"]["U2 graph"]["mean"] for run in runs] for r in (1, 2)]
    assert head.split() == "policy round 1 round 2".split() and sft.startswith("sft")
    assert [tompo.split()[k] for k in (1, 3)] == [f"{np.mean(pair):.3f}" for pair in means]
    assert means[0] != means[1]


def test_runs_that_cannot_be_combined_are_refused(seeds, tmp_path, refused):
    paths, runs = seeds(6, 5, 6)
    write_json(paths[2], {"results": dict(reversed(runs[2].items()))})
    paths.append(str(tmp_path / "broken.json"))
    write_json(paths[3], {"results": {"tompo": {"U1": 1}}})
    paths.append(str(tmp_path / "partners.json"))
    write_json(paths[4], {"arguments": {"partners": ["nash"]}, "results": runs[0]})
    for bad, words in zip(paths[1:], ("one kind", "one kind", "not an eval.json", "one kind"), strict=True):
        line = refused(evaluation.main, ["--seeds", paths[0], bad])
        assert words in line and bad in line

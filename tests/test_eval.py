"""Evaluation: the statistics against tables, the metrics by hand and by brute force, play, and the command line.

The game of most tests by hand: N = 3, alpha = 1, delta = 0.1, c = 0.05, cap 3. The first best is the complete graph
with x = 1 / (1 - 0.4) = 5/3 and W* = 3 (5/3) / 2 - 2 * 0.05 * 3 = 2.2; nobody linking gives x = 1 and W = 1.5.
"""

import argparse
import itertools
import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
import experts
from play import metrics
from play import players
from world.bcz import BCZ
from games import State
from world.draws import Family, draw_game, held_out_grid, split_of
from play.metrics import Played, Turn, mean_interval, paired_difference, per_instance, summarise
from play.players import play
from policy import Policy, Rollout
from prompts import Decision, PromptStyle
from rewards import belief_accuracy
from run.files import InputError, write_json

STYLE = PromptStyle()
TRIO = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0)
TRIO_2 = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0, rounds=2)
SCRIPT = Path(evaluation.__file__).resolve()


def constant(text):
    return lambda asks: [text] * len(asks)


def expert(name, seed=0):
    return players.expert_player(name, STYLE, seed)


# ---------------------------------------------------------------------------------------------------------------------
# statistics


@pytest.mark.parametrize(
    "df, t, within",
    [(1, 12.7062, 1e-4), (2, 4.3027, 1e-4), (3, 3.1824, 1e-4), (4, 2.7764, 1e-4), (5, 2.5706, 4e-3), (9, 2.2622, 1e-3)]
    + [(14, 2.1448, 1e-3), (29, 2.0452, 1e-4), (59, 2.0010, 1e-4), (119, 1.9801, 1e-4), (10**6, 1.95997, 1e-4)],
)
def test_quantiles_of_t(df, t, within):
    assert metrics._t95(df) == pytest.approx(t, abs=within)


def test_quantiles_of_t_fall_with_the_degrees_of_freedom():
    values = [metrics._t95(df) for df in range(1, 200)]
    assert all(a > b > 1.95996 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (0, 1, 0, 0.7935)],
)
def test_wilson_interval(successes, n, low, high):
    v = metrics.wilson_interval(successes, n)
    assert v["mean"] == successes / n and v["n"] == n
    assert v["low"] == pytest.approx(low, abs=1e-4) and v["high"] == pytest.approx(high, abs=1e-4)


def test_wilson_ends_solve_the_score_equation():
    """|share - p| = z sqrt(p (1 - p) / n) at both ends."""
    for s, n in ((3, 17), (41, 60), (1, 200)):
        v = metrics.wilson_interval(s, n)
        for p in (v["low"], v["high"]):
            assert abs(s / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))


def test_mean_interval():
    v = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # sd sqrt(2.5), half width 2.7764 * sqrt(2.5 / 5)
    assert v["mean"] == 3 and v["n"] == 5
    assert v["high"] - 3 == pytest.approx(1.9632, abs=1e-4) and 3 - v["low"] == pytest.approx(1.9632, abs=1e-4)
    assert mean_interval([1.0, None, math.nan, 3.0])["n"] == 2
    assert mean_interval([1.0, None, math.nan, 3.0])["mean"] == 2
    assert mean_interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "n": 1}
    assert mean_interval([None]) == mean_interval([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert mean_interval([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 3}


def test_paired_difference():
    def summary(*values):
        return {"instances": [{"U3": v} for v in values]}

    a, b = summary(0.5, 0.7, None, 0.9, 0.3), summary(0.4, 0.7, 0.2, 0.7, None)
    d = paired_difference(a, b, "U3")  # 0.1, 0, 0.2: mean 0.1, sd 0.1
    assert d["n"] == 3 and d["mean"] == pytest.approx(0.1)
    assert d["high"] - 0.1 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert paired_difference(b, a, "U3")["mean"] == pytest.approx(-0.1)
    assert paired_difference(a, a, "U3") == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}


# ---------------------------------------------------------------------------------------------------------------------
# strategic efficiency


def ref_payoff(game, G, x, i):
    return game.alpha[i] * x[i] - x[i] ** 2 / 2 + sum(
        game.delta * x[i] * x[j] - game.c for j in range(game.N) if G[i][j]
    )


def random_proposals(rng, N):
    P = rng.integers(0, 2, (N, N))
    np.fill_diagonal(P, 0)
    return P


def test_graph_efficiency_over_all_rows():
    rng, compared, values = np.random.default_rng(0), 0, []
    for _ in range(12):
        game = draw_game(rng, 4)
        P = random_proposals(rng, 4)
        for seat in range(4):
            others, payoff = [j for j in range(4) if j != seat], {}
            for bits in itertools.product((0, 1), repeat=3):
                Q = P.copy()
                Q[seat, others] = bits
                G = Q * Q.T
                x = np.linalg.solve(np.eye(4) - game.delta * G, np.array(game.alpha))
                payoff[bits] = ref_payoff(game, G, x, seat)
            best, worst = max(payoff.values()), min(payoff.values())
            for bits, u in payoff.items():
                Q = P.copy()
                Q[seat, others] = bits
                expected = 1 if best - worst < 1e-12 else 1 - (best - u) / (best - worst)
                U2 = metrics.strategic_efficiency(State(game), seat, Q)
                assert U2 == pytest.approx(expected, abs=1e-6)
                values.append(U2)
                compared += 1
    assert compared == 12 * 4 * 8
    assert min(values) == pytest.approx(0) and max(values) == 1 and len(set(np.round(values, 3))) > 20


def test_effort_efficiency_over_a_fine_grid():
    rng, compared = np.random.default_rng(1), 0
    for _ in range(12):
        game = draw_game(rng, 4)
        P = random_proposals(rng, 4)
        state, x = State(game).step(P), rng.uniform(0, game.cap, 4)
        for seat in range(4):
            grid = np.linspace(0, game.cap, 2001)
            neighbours = sum(x[j] for j in range(4) if P[seat, j] and P[j, seat])
            u = game.alpha[seat] * grid - grid**2 / 2 + game.delta * grid * neighbours
            own = game.alpha[seat] * x[seat] - x[seat] ** 2 / 2 + game.delta * x[seat] * neighbours  # costs cancel
            expected = 1 - (u.max() - own) / (u.max() - u.min())
            assert metrics.strategic_efficiency(state, seat, x) == pytest.approx(expected, abs=1e-5)
            for v, value in ((grid[u.argmax()], 1), (grid[u.argmin()], 0)):
                y = np.r_[x[:seat], v, x[seat + 1 :]]
                assert metrics.strategic_efficiency(state, seat, y) == pytest.approx(value, abs=1e-5)
            compared += 1
    assert compared == 48


def test_efficiency_by_hand():
    """Both others choose seat 0: both links pay 0.68125, one 0.57995, none 0.5. Alone, x - x^2/2 on [0, 3] runs from
    -1.5 to 0.5."""
    all_links = 1 - np.eye(3, dtype=int)
    for row, U2 in (([0, 1, 1], 1.0), ([0, 0, 0], 0.0), ([0, 1, 0], 0.07995 / 0.18125)):
        P = all_links.copy()
        P[0] = row
        assert metrics.strategic_efficiency(State(TRIO), 0, P) == pytest.approx(U2, abs=1e-4)
    alone = State(TRIO).step(0 * all_links)
    for x, U2 in ((1.0, 1.0), (3.0, 0.0), (0.0, 0.75), (2.0, 0.75), (2.5, 1 - 1.125 / 2)):
        assert metrics.strategic_efficiency(alone, 1, np.array([2.0, x, 0.5])) == pytest.approx(U2)


def test_efficiency_where_nothing_is_at_stake_is_1():
    """Nobody chooses seat 0, so all its rows are the same."""
    P = np.array([[0, 1, 1], [0, 0, 1], [0, 1, 0]])
    assert metrics.strategic_efficiency(State(TRIO), 0, P) == 1


def test_efficiency_leaves_the_actions_alone():
    P, x = 1 - np.eye(3, dtype=int), np.array([1.0, 2.0, 3.0])
    metrics.strategic_efficiency(State(TRIO), 0, P)
    metrics.strategic_efficiency(State(TRIO).step(P), 0, x)
    assert (P == 1 - np.eye(3)).all() and x.tolist() == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# beliefs


@pytest.mark.parametrize("belief, share", [([0, 1, 0, 1], 1), ([0, 0, 0, 1], 2 / 3), ([0, 0, 1, 0], 0), (None, 0)])
def test_graph_beliefs(belief, share):
    """Who chooses seat 0: seats 1 and 3. Its own row is something else."""
    P = np.array([[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    state = State(BCZ((1.0,) * 4, 0.1, 0.1, 3.0))
    d = Decision("G", P[0], None if belief is None else np.array(belief))
    assert belief_accuracy(d, state.game, 0, P) == pytest.approx(share)


def test_effort_beliefs():
    """cap 3, so small efforts are measured by 0.15. True efforts of the others: 2, 0.1."""
    state = State(TRIO).step(np.zeros((3, 3), int))
    x = np.array([9.0, 2.0, 0.1])  # the own one is never looked at

    def accuracy(*belief):
        return belief_accuracy(Decision("E", 1.0, np.array([0.0, *belief])), state.game, 0, x)

    assert accuracy(2.0, 0.1) == 1
    assert accuracy(1.0, 0.1) == pytest.approx((0.5 + 1) / 2)
    assert accuracy(3.0, 0.1) == pytest.approx((0.5 + 1) / 2)
    assert accuracy(2.0, 0.025) == pytest.approx((1 + 0.5) / 2)
    assert accuracy(5.0, 0.1) == pytest.approx(0.5)
    assert accuracy(-7.0, 3.0) == 0
    assert belief_accuracy(None, state.game, 0, x) == 0


# ---------------------------------------------------------------------------------------------------------------------
# metrics of a game


def turn(round, kind, U2, belief=0.0, ok=True, s=1.0, row=1.0):
    return Turn(
        round=round,
        kind=kind,
        reply="text",
        decision=Decision(kind, 0.0) if ok else None,
        s=s if kind == "G" else None,
        row=row if kind == "G" else None,
        U2=U2,
        belief=belief,
    )


def test_metrics_of_one_game_by_hand():
    played = Played(
        TRIO_2,
        [
            turn(1, "G", 1.0, 0.5, s=0.75, row=0.5),
            turn(1, "E", 0.8, 1.0),
            turn(2, "G", 0.0, ok=False, s=0.0, row=0.0),
            turn(2, "E", 0.6, 0.1),
        ],
        [1.85, 2.2],
    )
    row = per_instance(played)
    expected = {"U1": 3 / 4, "U2": 0.6, "U3": 2.025 / 2.2, "U3 gain": 0.525 / 0.7, "belief": 0.4, "U2 | ok": 0.8}
    expected |= {"U2 graph": 0.5, "U2 effort": 0.7, "s": 0.375, "row": 0.25}
    assert row.pop("U3 | ok") is None
    assert row == pytest.approx(expected)
    first = per_instance(played, 1)
    expected = {"U1": 1, "U2": 0.9, "U3": 1.85 / 2.2, "U3 gain": 0.5, "belief": 0.75, "U2 | ok": 0.9}
    expected |= {"U2 graph": 1.0, "U2 effort": 0.8, "U3 | ok": 1.85 / 2.2, "s": 0.75, "row": 0.5}
    assert first == pytest.approx(expected)


def test_there_is_no_gain_where_the_first_best_is_empty():
    game = BCZ((1.0, 1.0, 1.0), 0.1, 0.5, 3.0)  # c* = 0.1 / (1 - 0.4) = 1/6
    row = per_instance(Played(game, [turn(1, "G", 1.0), turn(1, "E", 1.0)], [1.2]))
    assert row["U3 gain"] is None and row["U3"] == pytest.approx(0.8)


def test_bounds_by_hand():
    assert metrics.welfare_bounds(TRIO) == pytest.approx((2.2, 1.5))


def test_summary_counts_decisions_and_averages_instances():
    turns = [turn(1, "G", 1.0), turn(1, "E", 1.0), turn(2, "G", 0.0, ok=False), turn(2, "E", 0.0)]
    a = Played(TRIO_2, turns, [2.2, 2.2])
    b = Played(TRIO_2, [turn(r, k, 0.5, ok=False) for r in (1, 2) for k in "GE"], [1.1, 2.2])
    s = summarise([a, b])
    assert (s["all rounds"]["U1"]["mean"], s["all rounds"]["U1"]["n"]) == (3 / 8, 8)
    assert (s["round 1"]["U1"]["mean"], s["round 1"]["U1"]["n"]) == (1 / 2, 4)
    assert s["all rounds"]["U3"]["mean"] == pytest.approx((1 + 0.75) / 2) and s["all rounds"]["U3"]["n"] == 2
    assert s["round 1"]["U3"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert s["all rounds"]["U2"]["mean"] == pytest.approx(0.5) and s["round 1"]["U2"]["mean"] == pytest.approx(0.75)
    assert (s["all rounds"]["U2 | ok"]["mean"], s["all rounds"]["U2 | ok"]["n"]) == (pytest.approx(2 / 3), 1)
    assert s["all rounds"]["U3 | ok"]["n"] == 0
    assert (s["round 1"]["U3 | ok"]["mean"], s["round 1"]["U3 | ok"]["n"]) == (pytest.approx(1), 1)
    assert [r["U1"] for r in s["instances"]] == [0.75, 0.0] and s["instances"][0]["instance"]["delta"] == 0.1


@pytest.mark.parametrize("count, least, most", [(1, 1, 1), (9, 9, 9), (10, 10, 10), (19, 10, 19), (60, 10, 10)])
def test_some_games_are_quoted(count, least, most):
    played = [Played(TRIO, [turn(1, "G", 1.0), turn(1, "E", 1.0)], [2.0])] * count
    assert least <= len(summarise(played)["replies"]) <= most


# ---------------------------------------------------------------------------------------------------------------------
# play


@pytest.mark.parametrize("seat", range(4))
def test_planners_among_planners_reach_the_first_best(seat):
    """U3 = 1 up to the two decimals of the efforts, whichever seat is watched, on the whole grid."""
    grid = list(held_out_grid(4))[::4]
    rows = summarise(play(grid, expert("planner"), seat, "planner", 0))
    assert len(rows["instances"]) == 15
    for row in rows["instances"]:
        assert row["U3"] == pytest.approx(1, abs=1e-4) and row["U3"] <= 1 + 1e-12
        assert row["U1"] == 1 and row["belief"] == pytest.approx(1)
    assert rows["all rounds"]["U3 gain"]["mean"] == pytest.approx(1, abs=2e-3)


def test_nash_efforts_against_nash_efforts_are_best_replies():
    rows = summarise(play(list(held_out_grid(4))[::6], expert("second-best"), 2, "second-best", 0))
    assert all(row["U2 effort"] == pytest.approx(1, abs=1e-4) for row in rows["instances"])
    assert all(row["U3"] < 1 + 1e-12 for row in rows["instances"])


@pytest.mark.parametrize("text", ["", "Decision: [1, 1, 1]", "I cannot say.", "Decision: nan"])
def test_replies_that_are_not_compliant_play_nothing_and_count(text):
    """Seat 0 plays no links and effort 0. The two planners link: x = 1 / (1 - 0.2) = 1.25 and pi = 0.575 each."""
    (played,) = play([TRIO], constant(text), 0, "planner", 0)
    row = per_instance(played)
    assert [t.decision for t in played.turns] == [None, None] and [t.reply for t in played.turns] == [text, text]
    assert row["U1"] == 0 and row["belief"] == 0 and row["U2 | ok"] is None and row["U3 | ok"] is None
    assert row["U3"] == pytest.approx(1.15 / 2.2) and row["U3 gain"] == pytest.approx(-0.35 / 0.7)
    assert row["U2 graph"] == pytest.approx(0, abs=1e-9) and row["U2 effort"] == pytest.approx(0.75)


def test_one_bad_reply_does_not_spoil_the_other():
    def player(asks):
        return ["Belief: [0, 1, 1]\nDecision: [0, 1, 1]" if a.state.kind == "G" else "Decision: 3.01" for a in asks]

    (played,) = play([TRIO], player, 0, "planner", 0)
    row = per_instance(played)
    # others: x = 1.67 (complete graph), 1.67 - 1.39445 + 0.27889 - 0.1 = 0.45444 each; seat 0: -0.1
    assert row["U1"] == 0.5 and row["belief"] == 0.5
    assert row["U3"] == pytest.approx(0.80889 / 2.2, abs=1e-5) and row["U3 | ok"] is None
    assert row["U2 | ok"] == row["U2 graph"] == 1


def test_the_graph_score_and_the_row_compare_with_the_expert_in_the_same_seat():
    """Among three planners the expert graph is complete; one link fewer is 2 of 6 entries, and 1 of 2 of the row."""
    cases = [("[0, 1, 1]", 1, 1), ("[0, 1, 0]", 2 / 3, 1 / 2), ("[0, 0, 0]", 1 / 3, 0), ("[1, 0, 0]", 0, 0), ("no", 0, 0)]
    for text, s, row in cases:
        (played,) = play([TRIO], constant(f"Decision: {text}"), 0, "planner", 0)
        assert [(t.s, t.row) for t in played.turns] == [(pytest.approx(s), row), (None, None)]
        assert per_instance(played)["s"] == pytest.approx(s) and per_instance(played)["row"] == row


def test_links_that_nobody_answers_show_in_the_row_and_not_in_the_graph():
    (played,) = play([TRIO], constant("Decision: [0, 1, 1]"), 0, "never-link", 0)
    assert (played.turns[0].s, played.turns[0].row) == (1, 0)


def test_the_others_expert_scores_1_also_where_it_errs_at_random():
    instances = list(held_out_grid(4, Family("bcz", "GE", 2)))[::6]
    for name in ("second-best", "noisy:nash:0.5", "random"):
        rows = summarise(play(instances, expert(name, 2), 1, name, 2))["instances"]
        assert len(rows) == 10 and all(row["s"] == row["row"] == 1 for row in rows)
    assert any(row["s"] < 1 for row in summarise(play(instances, expert("random", 9), 1, "random", 2))["instances"])


def seeds_of(tmp_path, count=3, games_per_run=(6, 6, 6)):
    """eval.json files of runs whose policy is a coin with another seed each."""
    paths = []
    for seed in range(count):
        instances = list(held_out_grid(3, Family("bcz", "GE", 1)))[: games_per_run[seed]]
        results = {
            "tompo": summarise(play(instances, expert("random", seed), 0, "nash", 0)),
            "sft": summarise(play(instances, expert("never-link", seed), 0, "nash", 0)),
        }
        paths.append(str(tmp_path / f"eval{seed}.json"))
        write_json(paths[-1], {"arguments": {}, "results": results})
    return paths


def test_intervals_over_seeds_are_those_of_the_seed_means(tmp_path, capsys):
    paths = seeds_of(tmp_path)
    evaluation.main(["--seeds", *paths])
    table, differences = capsys.readouterr().out.split("minus")
    runs = [json.loads(Path(p).read_text())["results"] for p in paths]
    means = np.array([run["tompo"]["all rounds"]["U3"]["mean"] for run in runs])
    half = 4.3027 * means.std(ddof=1) / math.sqrt(3)
    assert f"{means.mean():.3f} [{means.mean() - half:.2f}, {means.mean() + half:.2f}]" in table
    of_runs = [[a["U3"] - b["U3"] for a, b in zip(r["tompo"]["instances"], r["sft"]["instances"])] for r in runs]
    means = np.array(of_runs).mean(1)
    half = 4.3027 * means.std(ddof=1) / math.sqrt(3)
    assert f"U3 {means.mean():+.3f} [{means.mean() - half:+.3f}, {means.mean() + half:+.3f}]" in differences
    assert len(set(means)) == 3


def test_runs_that_cannot_be_combined_are_refused(tmp_path, capsys):
    paths = seeds_of(tmp_path, games_per_run=(6, 5, 6))
    other = json.loads(Path(paths[2]).read_text())
    other["results"] = dict(reversed(other["results"].items()))
    write_json(paths[2], other)
    (tmp_path / "broken.json").write_text('{"results": {"tompo": {"U1": 1}}}')
    for bad, word in ((paths[1], "other games"), (paths[2], "one kind"), (str(tmp_path / "broken.json"), "not an eval.json")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["--seeds", paths[0], bad])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and word in error and bad in error


def test_long_names_stay_apart_from_their_numbers():
    """Adapter folders have long names: in the last lines too a blank must follow the colon."""
    s = summarise(play([TRIO, TRIO], expert("planner"), 0, "planner", 0))
    name = "runs/a-rather-long-name-of-a-run/adapter"
    text = metrics.report({"base": s, name: s}, 1)
    assert f"{name}: " in text


def recording(player):
    """The same player, and a list of the histories it was shown: [stage][game] -> arrays."""
    seen = []

    def answer(asks):
        assert all(a.stage == len(seen) == len(a.state.history) for a in asks)
        seen.append([a.state.history for a in asks])
        return player(asks)

    return answer, seen


@pytest.mark.parametrize("others", ("random", "noisy:never-link:0.5"))
def test_the_draws_of_the_others_do_not_depend_on_the_policy(others):
    instances, seat = [g for g in held_out_grid(4, Family("bcz", "GE", 2))][:6], 1
    histories = []
    for player in (constant("no"), expert("always-link"), expert("random")):
        player, seen = recording(player)
        play(instances, player, seat, others, 3)
        histories.append(seen[-1])
    compared = differs = 0
    rest = [0, 2, 3]
    for game in range(6):
        for stage in range(3):
            a, *more = [h[game][stage] for h in histories]
            if others != "random" and stage == 1:
                continue  # Nash efforts answer the graph, which the policy has part in
            for b in more:
                assert (a[rest] == b[rest]).all()
                differs += np.any(a[seat] != b[seat])
                compared += 1
    assert compared >= 24 and differs > compared / 2
    player, seen = recording(constant("no"))
    play(instances, player, seat, others, 4)
    assert any((a[0][rest] != b[0][rest]).any() for a, b in zip(seen[-1], histories[0]))  # another seed, other draws


def test_games_do_not_share_their_draws():
    player, seen = recording(constant("no"))
    play([TRIO_2] * 8, player, 0, "random", 0)
    assert len({h[0].tobytes() for h in seen[-1]}) > 1 and len({h[1].tobytes() for h in seen[-1]}) == 8


def test_round_1_alone_is_the_first_round_of_two():
    """Compliant in round 1, silent in round 2."""
    planner = expert("planner")

    def player(asks):
        return planner(asks) if asks[0].stage < 2 else [""] * len(asks)

    instances = [TRIO_2, TRIO_2]
    s = summarise(play(instances, player, 0, "planner", 0))
    assert s["round 1"]["U1"]["mean"] == 1 and s["round 1"]["U1"]["n"] == 4
    assert s["all rounds"]["U1"]["mean"] == 0.5 and s["all rounds"]["U1"]["n"] == 8
    assert s["round 1"]["U3"]["mean"] == pytest.approx(1, abs=1e-5)
    assert s["all rounds"]["U3"]["mean"] == pytest.approx((1 + 1.15 / 2.2) / 2, abs=1e-5)
    alone = summarise(play([TRIO, TRIO], planner, 0, "planner", 0))
    for metric in metrics.METRICS:
        assert s["round 1"][metric] == alone["all rounds"][metric]


@pytest.mark.parametrize("style", [PromptStyle(), PromptStyle("local", belief=False, hints=False)], ids=str)
def test_evaluation_prompts_are_the_training_prompts(style):
    """The policy that answers as in a recorded expert game is asked, letter for letter, what the record says."""
    instances, seat = list(held_out_grid(4, Family("bcz", "GE", 2)))[7:60:13], 2
    rng = np.random.default_rng(0)
    asked, told = [], []
    for game in instances:
        of_seat = [r for r in experts.simulate(game, experts.make_expert("nash"), rng, style) if r.seat == seat]
        asked.append([r.prompt for r in of_seat])
        told.append([r.reply for r in of_seat])

    class Recorder:
        """Stands in for a policy: keeps the prompts and gives the recorded replies."""

        prompts, settings, histories = [], set(), {}

        def encode_prompt(self, chat):
            self.prompts.append(chat)
            return len(self.prompts) - 1

        def sample(self, prompts, count, limit, temperature, generator, history, only):
            self.settings.add((count, limit, temperature))
            assert only == list(range(len(prompts)))
            games_of_batch = tuple(p % len(instances) for p in prompts)
            assert self.histories.setdefault(games_of_batch, history) is history  # that of these conversations
            return [[SimpleNamespace(text=told[p % len(instances)][p // len(instances)])] for p in prompts]

    policy = Recorder()
    player = players.policy_player(policy, style, None, 0.7, 0, batch=3)
    played = play(instances, player, seat, "nash", 0)
    assert len(policy.prompts) == 4 * len(instances) == 20
    for k, chat in enumerate(policy.prompts):
        assert chat == asked[k % len(instances)][k // len(instances)]
    assert len({id(history) for history in policy.histories.values()}) == 2  # batches of 3 and 2 games
    assert policy.settings == {(1, players.default_max_new_tokens(4), 0.7)}
    assert [[t.reply for t in p.turns] for p in played] == told


@pytest.mark.parametrize("name", ("second-best", "noisy:myopic:0.5"))
def test_the_expert_row_of_the_others_expert(name):
    """Its draws are those the seat would have had as one of the others."""
    instances = list(held_out_grid(4, Family("bcz", "GE", 2)))[::20]
    everybody = []
    for seat in range(4):
        everybody.append([p.welfares for p in play(instances, expert(name, 5), seat, name, 5)])
    assert np.allclose(everybody[0], everybody[1:])


# ---------------------------------------------------------------------------------------------------------------------
# instances


def arguments(**changes):
    parser = argparse.ArgumentParser()
    experts.add_style_arguments(parser)
    evaluation.add_eval_arguments(parser)
    return Namespace(**vars(parser.parse_args([])) | changes)


def test_the_evaluated_instances_are_held_out_and_distinct():
    grid = held_out_grid(4)
    assert evaluation.held_out_instances(arguments()) == list(grid)
    assert evaluation.held_out_instances(arguments(eval_games=1000)) == list(grid)
    for count in range(1, 61):
        chosen = [grid.index(g) for g in evaluation.held_out_instances(arguments(eval_games=count))]
        assert len(set(chosen)) == count and chosen == sorted(chosen)
    eight = evaluation.held_out_instances(arguments(eval_games=8, rounds=2, eval_agents=5))
    assert all(split_of(g) == "held-out" and g.rounds == 2 and g.N == 5 for g in eight)


@pytest.mark.parametrize("changes", [{"seat": 4}, {"seat": -1}, {"eval_agents": 2}, {"eval_agents": 13}], ids=str)
def test_instances_that_there_are_not(changes):
    with pytest.raises(InputError) as caught:
        evaluation.held_out_instances(arguments(**changes))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# command line


def test_the_command_with_experts_only(tmp_path, capsys, monkeypatch):
    """The file run as a program, within this process: a new one would import torch again, for seconds."""
    monkeypatch.chdir(tmp_path)
    command = [str(SCRIPT), "--policy", "expert:planner", "expert:nash", "--eval-games", "8", "--json", "results.json"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    rows = ["expert:planner", "expert:nash", "expert:second-best", "expert:random"]
    assert lines[0].split() == " ".join(["policy", *metrics.METRICS]).split()
    assert {"U1", "U2", "U3", "U3 gain", "belief", "U2 | ok", "U3 | ok"} <= set(metrics.METRICS)
    assert [line.split()[0] for line in lines[1:5]] == rows
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["results"]) == rows and written["arguments"]["eval_games"] == 8
    for name, line in zip(rows, lines[1:5]):
        result = written["results"][name]
        assert len(result["instances"]) == 8 and result["all rounds"]["U1"]["n"] == 16
        assert f"{result['all rounds']['U3']['mean']:.3f}" in line
        assert f"{result['all rounds']['U2']['mean']:.3f}" in line
    assert all(line.split()[1] == "1.000" for line in lines[1:5])
    first, nash = (written["results"][name]["instances"] for name in rows[:2])
    difference = np.mean([a["U3"] - b["U3"] for a, b in zip(first, nash)])
    paired = next(line for line in lines[5:] if "expert:nash:" in line)
    assert "expert:planner minus" in printed and f"U3 {difference:+.3f} [" in paired


def fails(capsys, *flags):
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--eval-games", "1", "--policy", "expert:nash", *flags])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    complaint = [line for line in err.splitlines() if "error:" in line]
    assert len(complaint) == 1
    return complaint[0]


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("mine")
    assert str(path) in fails(capsys, "--json", str(path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ("--policy", "bogus"),
        ("--policy", "expert:bogus"),
        ("--policy", "expert:"),
        ("--policy", "expert:nash", "no/such/folder"),
        ("--expert", "bogus"),
        ("--seat", "4"),
        ("--eval-agents", "2"),
        ("--eval-games", "0"),
        ("--rounds", "0"),
        ("--eval-seed", "-1"),
        ("--eval-temperature", "-1"),
        ("--eval-temperature", "nan"),
        ("--information", "none"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line(flags, capsys):
    fails(capsys, *flags)


def test_two_rounds_print_round_1_alone(capsys):
    evaluation.main(["--eval-games", "2", "--policy", "expert:nash", "--rounds", "2"])
    out = capsys.readouterr().out
    row_starts = ("expert:nash ", "expert:second-best ", "expert:random ")
    assert "round 1 alone" in out and sum(line.startswith(row_starts) for line in out.splitlines()) == 2 * 3 + 1


def test_one_game_prints_means_without_intervals(capsys):
    evaluation.main(["--eval-games", "1", "--policy", "expert:nash"])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("expert:nash"))
    assert row.count("[") == 1  # only compliance, which counts decisions


def test_a_model_is_evaluated(tiny_model_dir, tmp_path, capsys):
    """A random model is never compliant: its row is that of no links and effort 0."""
    path = tmp_path / "results.json"
    flags = ["--model", str(tiny_model_dir), "--device", "cpu", "--policy", "base", "--eval-games", "3"]
    evaluation.main([*flags, "--max-new-tokens", "4", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["base", "expert:second-best", "expert:random"]
    base = results["base"]
    assert base["all rounds"]["U1"]["mean"] == 0 and base["all rounds"]["U1"]["n"] == 6
    assert len(base["replies"]) == 3 and all(len(r) == 2 and isinstance(r[0], str) for r in base["replies"])
    silent = summarise(play(evaluation.held_out_instances(arguments(eval_games=3)), constant(""), 0, "second-best", 0))
    assert [r["U3"] for r in base["instances"]] == [r["U3"] for r in silent["instances"]]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base"))
    assert row.split()[1] == "0.000" and row.endswith("-")


def test_few_shot_adds_a_row_that_has_read_that_many_expert_games(tiny_model_dir, tmp_path, monkeypatch):
    """The same uniforms and another prompt: another reply. Every prompt of the row begins with the examples."""
    made, read, path = [], [], tmp_path / "results.json"
    real_examples, real_encode = players.expert_examples, Policy.encode_prompt
    monkeypatch.setattr(players, "expert_examples", lambda *args: made.append((args[0], real_examples(*args))) or made[-1][1])
    monkeypatch.setattr(Policy, "encode_prompt", lambda self, chat: read.append(chat) or real_encode(self, chat))
    flags = ["--model", str(tiny_model_dir), "--device", "cpu", "--eval-games", "3", "--max-new-tokens", "4"]
    evaluation.main([*flags, "--policy", "base", "few-shot:2", "--few-shot", "1", "--eval-agents", "3", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["base", "few-shot:2", "few-shot:1", "expert:second-best", "expert:random"]
    assert [count for count, _ in made] == [2, 1] == [len(chats) for _, chats in made]
    base, two, one = (results[name]["replies"] for name in ("base", "few-shot:2", "few-shot:1"))
    assert all(len({a[0], b[0], c[0]}) == 3 for a, b, c in zip(base, two, one, strict=True)) and len(base) == 3
    assert len(read) == 3 * 6
    for chats, of_row in zip(([], made[0][1], made[1][1]), (read[:6], read[6:12], read[12:])):
        assert all(sum(m["content"].startswith("A new game.") for m in chat) == len(chats) for chat in of_row)
        assert all(chat[: len(chats[0])] == chats[0] for chat in of_row if chats)


def test_repair_adds_rows_in_which_what_can_be_read_is_played(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """The model says one thing, which is compliant at no stage: strictly nothing is played; leniently seat 0 chooses
    agents 2 and 4 and takes effort 0.5."""
    text, path = "Decision: 0.5, 1, 0, 1 or so", tmp_path / "results.json"
    monkeypatch.setattr(Policy, "_rollout", lambda self, prompt, reply, logps: Rollout(prompt, reply, logps, text, True))
    flags = ["--model", str(tiny_model_dir), "--device", "cpu", "--eval-games", "3", "--max-new-tokens", "4"]
    evaluation.main([*flags, "--policy", "base", "expert:nash", "--repair", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["base", "base repaired", "expert:nash", "expert:second-best", "expert:random"]
    assert [results[name]["repaired"] for name in results] == [0, 6, 0, 0, 0]
    assert "a decision was read and played: base repaired 6" in capsys.readouterr().out
    instances, meant = evaluation.held_out_instances(arguments(eval_games=3)), {"G": "[0, 1, 0, 1]", "E": "0.5"}
    lenient = lambda asks: [f"Decision: {meant[ask.state.kind]}" for ask in asks]
    for name, player in (("base", constant("")), ("base repaired", lenient)):
        expected = summarise(play(instances, player, 0, "second-best", 0))
        for metric in ("s", "row", "U2", "U3"):
            assert [r[metric] for r in results[name]["instances"]] == [r[metric] for r in expected["instances"]]
        assert results[name]["all rounds"]["U1"]["mean"] == 0 and results[name]["replies"] == [[text] * 2] * 3
    assert results["base"]["all rounds"]["U3"] != results["base repaired"]["all rounds"]["U3"]


def test_a_folder_that_is_no_adapter_is_one_line(tiny_model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--model", str(tiny_model_dir), "--device", "cpu", "--policy", str(tmp_path)])
    assert caught.value.code == 2
    complaint = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(complaint) == 1 and str(tmp_path) in complaint[0]

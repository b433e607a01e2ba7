"""What is measured: statistics against tables, efficiency by brute force and by hand, summaries, seeds."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tables import TRIO, TRIO_2, by_seat, constant, expert

import eval as evaluation
from games import State
from play import metrics
from play.hindsight import read_history
from play.metrics import Played, Turn, mean_interval, paired_difference, per_instance, summarise
from play.players import play
from prompts import Decision
from run.files import write_json
from world.bcz import BCZ
from world.draws import draw_game, held_out_grid

# -------------------- statistics


def test_quantiles_of_t():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 14: 2.1448, 29: 2.0452}
    table |= {59: 2.0010, 119: 1.9801, 10**6: 1.95997}
    for df, t in table.items():
        assert metrics._t95(df) == pytest.approx(t, abs=1e-3 if df == 14 else 1e-4)
    values = [metrics._t95(df) for df in range(1, 200)]
    assert all(a > b > 1.95996 for a, b in itertools.pairwise(values))


def test_wilson_ends_solve_the_score_equation():
    """|share - p| = z sqrt(p (1 - p) / n) at both ends; where all or none succeed, one end is the share."""
    for s, n in ((3, 17), (41, 60), (1, 200), (8, 10)):
        v = metrics.wilson_interval(s, n)
        assert v["mean"] == s / n and v["n"] == n and v["low"] < s / n < v["high"]
        for p in (v["low"], v["high"]):
            assert abs(s / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))
    for s, low, high in ((0, 0.0, 0.2775), (10, 0.7225, 1.0)):
        v = metrics.wilson_interval(s, 10)
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


def test_paired_difference():
    def summary(*values):
        return {"instances": [{"U3": v} for v in values]}

    a, b = summary(0.5, 0.7, None, 0.9, 0.3), summary(0.4, 0.7, 0.2, 0.7, None)
    d = paired_difference(a, b, "U3")  # 0.1, 0, 0.2: mean 0.1, sd 0.1
    assert d["n"] == 3 and d["mean"] == pytest.approx(0.1)
    assert d["high"] - 0.1 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert paired_difference(b, a, "U3")["mean"] == pytest.approx(-0.1)
    assert paired_difference(a, a, "U3") == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}


# -------------------- strategic efficiency


def payoff_in(game, G, x, i):
    links = sum(game.delta * x[i] * x[j] - game.c for j in range(game.N) if G[i][j])
    return game.alpha[i] * x[i] - x[i] ** 2 / 2 + links


def random_proposals(rng, N):
    return rng.integers(0, 2, (N, N)) * (1 - np.eye(N, dtype=int))


def test_graph_efficiency_over_all_rows():
    rng, values = np.random.default_rng(0), []
    for _ in range(12):
        game = draw_game(rng, 4)
        P = random_proposals(rng, 4)
        for seat in range(4):
            payoff = []
            for bits in itertools.product((0, 1), repeat=3):
                Q = P.copy()
                Q[seat, np.arange(4) != seat] = bits
                x = np.linalg.solve(np.eye(4) - game.delta * Q * Q.T, np.array(game.alpha))
                payoff.append((payoff_in(game, Q * Q.T, x, seat), Q))
            best, worst = max(u for u, _ in payoff), min(u for u, _ in payoff)
            for u, Q in payoff:
                expected = 1 if best - worst < 1e-12 else 1 - (best - u) / (best - worst)
                values.append(metrics.strategic_efficiency(State(game), seat, Q))
                assert values[-1] == pytest.approx(expected, abs=1e-6)
    assert len(values) == 12 * 4 * 8 and len(set(np.round(values, 3))) > 20
    assert min(values) == pytest.approx(0) and max(values) == 1


def test_effort_efficiency_over_a_fine_grid():
    rng = np.random.default_rng(1)
    for _ in range(12):
        game = draw_game(rng, 4)
        P = random_proposals(rng, 4)
        state, x = State(game).step(P), rng.uniform(0, game.cap, 4)
        for seat in range(4):
            efforts = [np.r_[x[:seat], v, x[seat + 1 :]] for v in np.linspace(0, game.cap, 2001)]
            u = np.array([payoff_in(game, P * P.T, y, seat) for y in efforts[::20]])
            u_own = payoff_in(game, P * P.T, x, seat)
            expected = 1 - (u.max() - u_own) / (u.max() - u.min())
            assert metrics.strategic_efficiency(state, seat, x) == pytest.approx(expected, abs=1e-3)
            for y, value in ((efforts[20 * u.argmax()], 1), (efforts[20 * u.argmin()], 0)):
                assert metrics.strategic_efficiency(state, seat, y) == pytest.approx(value, abs=1e-3)


def test_efficiency_by_hand():
    """Both others choose seat 0: both links pay 0.68125, one 0.57995, none 0.5. Alone, x - x^2/2 on [0, 3]
    runs from -1.5 to 0.5. The actions are left as they were."""
    all_links = 1 - np.eye(3, dtype=int)
    for row, U2 in (([0, 1, 1], 1.0), ([0, 0, 0], 0.0), ([0, 1, 0], 0.07995 / 0.18125)):
        P = all_links.copy()
        P[0] = row
        assert metrics.strategic_efficiency(State(TRIO), 0, P) == pytest.approx(U2, abs=1e-4)
        assert P[0].tolist() == row
    alone = State(TRIO).step(0 * all_links)
    for x, U2 in ((1.0, 1.0), (3.0, 0.0), (0.0, 0.75), (2.0, 0.75), (2.5, 1 - 1.125 / 2)):
        efforts = np.array([2.0, x, 0.5])
        assert metrics.strategic_efficiency(alone, 1, efforts) == pytest.approx(U2)
        assert efforts.tolist() == [2.0, x, 0.5]


def test_efficiency_where_nothing_is_at_stake_is_1():
    """Nobody chooses seat 0, so all its rows are the same."""
    P = np.array([[0, 1, 1], [0, 0, 1], [0, 1, 0]])
    assert metrics.strategic_efficiency(State(TRIO), 0, P) == 1


# -------------------- metrics of a game


def turn(round, kind, U2, belief=0.0, ok=True, s=1.0, row=1.0):
    s, row = (s, row) if kind == "G" else (None, None)
    return Turn(round, kind, "text", Decision(kind, 0.0) if ok else None, s, row, U2, belief)


def test_metrics_of_one_game_by_hand():
    turns = [turn(1, "G", 1.0, 0.5, s=0.75, row=0.5), turn(1, "E", 0.8, 1.0)]
    turns += [turn(2, "G", 0.0, ok=False, s=0.0, row=0.0), turn(2, "E", 0.6, 0.1)]
    played = Played(TRIO_2, turns, [1.85, 2.2])
    row = per_instance(played)
    assert row.pop("U3 | ok") is None
    expected = {"U1": 3 / 4, "U2": 0.6, "U3": 2.025 / 2.2, "U3 gain": 0.525 / 0.7, "belief": 0.4}
    expected |= {"U2 | ok": 0.8, "U2 graph": 0.5, "U2 effort": 0.7, "s": 0.375, "row": 0.25}
    assert row == pytest.approx(expected)
    expected = {"U1": 1, "U2": 0.9, "U3": 1.85 / 2.2, "U3 gain": 0.5, "belief": 0.75, "U2 | ok": 0.9}
    expected |= {"U2 graph": 1.0, "U2 effort": 0.8, "U3 | ok": 1.85 / 2.2, "s": 0.75, "row": 0.5}
    assert per_instance(played, 1) == pytest.approx(expected)


def test_there_is_no_gain_where_the_first_best_is_empty():
    game = BCZ((1.0, 1.0, 1.0), 0.1, 0.5, 3.0)  # c* = 0.1 / (1 - 0.4) = 1/6
    row = per_instance(Played(game, [turn(1, "G", 1.0), turn(1, "E", 1.0)], [1.2]))
    assert row["U3 gain"] is None and row["U3"] == pytest.approx(0.8)
    assert metrics.welfare_bounds(game) == pytest.approx((1.5, 1.5))


def test_there_is_no_u3_where_nobody_can_do_better_than_nothing(monkeypatch):
    """And the tables show that as a dash."""
    monkeypatch.setattr(metrics, "welfare_bounds", lambda game: (0.0, 0.0))
    s = summarise([Played(TRIO, [turn(1, "G", 1.0), turn(1, "E", 1.0)], [0.0])])
    assert s["instances"][0]["U3"] is None and s["all rounds"]["U3"]["n"] == 0
    assert metrics.report({"a": s, "b": s}, 1).endswith("U3 -")


def test_summary_counts_decisions_and_averages_instances():
    turns = [turn(1, "G", 1.0), turn(1, "E", 1.0), turn(2, "G", 0.0, ok=False), turn(2, "E", 0.0)]
    a = Played(TRIO_2, turns, [2.2, 2.2])
    b = Played(TRIO_2, [turn(r, k, 0.5, ok=False) for r in (1, 2) for k in "GE"], [1.1, 2.2])
    s = summarise([a, b])
    expected = {"all rounds": dict(U1=(3 / 8, 8), U2=(0.5, 2), U3=(0.875, 2)) | {"U2 | ok": (2 / 3, 1)}}
    expected |= {"round 1": dict(U1=(1 / 2, 4), U2=(0.75, 2), U3=(0.75, 2)) | {"U3 | ok": (1, 1)}}
    for part, of_part in expected.items():
        for metric, (mean, n) in of_part.items():
            assert (s[part][metric]["mean"], s[part][metric]["n"]) == (pytest.approx(mean), n)
    assert s["all rounds"]["U3 | ok"]["n"] == 0
    assert [r["U1"] for r in s["instances"]] == [0.75, 0.0] and s["instances"][0]["instance"]["delta"] == 0.1


def test_every_game_is_told_whole():
    """Replies, seats and everybody's actions: from them the game can be played again."""
    grid = list(held_out_grid(4))[:5]
    played = play(grid, expert("random"), 1, "noisy:nash:0.5", 3)
    s = summarise(played)
    assert [len(of_game) for of_game in s["replies"]] == [2] * 5 and s["seats"] == [[1]] * 5
    for game, of_game, told, replies in zip(grid, played, s["actions"], s["replies"]):
        again = read_history(game, told)
        assert again.done and [a.tolist() for a in again.history] == [a.tolist() for a in of_game.history]
        assert (
            "".join(told[0].split()[1]) in replies[0].replace(", ", "")
            and told[1].split()[1][:3] in replies[1]
        )
        assert [float(pay.sum()) for _, _, pay in again.round_results()] == of_game.welfares


def test_the_mean_over_seats_leaves_out_what_is_not_there():
    """One seat is never compliant: `U2 | ok` of a game is that of the other seat; U1 counts both."""
    grid = list(held_out_grid(4))[:3]
    played = [play(grid, expert("nash"), 0, "nash", 0), play(grid, constant("no"), 1, "nash", 0)]
    mean = metrics.mean_over_seats(played)
    assert mean["U1"]["mean"] == 0.5 and mean["U1"]["n"] == 6
    assert mean["U2 | ok"]["mean"] == pytest.approx(np.mean([per_instance(p)["U2 | ok"] for p in played[0]]))


def test_the_turns_of_one_seat():
    (played,) = play([TRIO], by_seat([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "1.0"), [(0, 1, 2)], "planner", 0)
    (own,) = metrics.of_seat([played], 2)
    assert [t.seat for t in own.turns] == [2, 2] and per_instance(own)["s"] == pytest.approx(1 / 3)


# -------------------- tables


def test_long_names_stay_apart_from_their_numbers():
    """Adapter folders have long names: in the last lines too a blank must follow the colon."""
    s = summarise(play([TRIO, TRIO], expert("planner"), 0, "planner", 0))
    name = "runs/a-rather-long-name-of-a-run/adapter"
    assert f"{name}: " in metrics.report({"base": s, name: s}, 1)


@pytest.fixture
def seeds(tmp_path):
    """eval.json files of runs whose policy is a coin with another seed each."""

    def write(*counts):
        paths = []
        for seed, count in enumerate(counts):
            grid = list(held_out_grid(3))[:count]
            players = {"tompo": expert("random", seed), "sft": expert("never-link", seed)}
            results = {name: summarise(play(grid, p, 0, "nash", 0)) for name, p in players.items()}
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
    assert f"{means.mean():.3f} [{means.mean() - half:.2f}, {means.mean() + half:.2f}]" in table
    pairs = [zip(run["tompo"]["instances"], run["sft"]["instances"]) for run in runs]
    means = np.array([np.mean([a["U3"] - b["U3"] for a, b in of_run]) for of_run in pairs])
    half = 4.3027 * means.std(ddof=1) / math.sqrt(3)
    assert f"U3 {means.mean():+.3f} [{means.mean() - half:+.3f}, {means.mean() + half:+.3f}]" in differences
    assert len(set(means)) == 3


def test_runs_that_cannot_be_combined_are_refused(seeds, tmp_path, refused):
    paths, runs = seeds(6, 5, 6)
    write_json(paths[2], {"results": dict(reversed(runs[2].items()))})
    paths.append(str(tmp_path / "broken.json"))
    write_json(paths[3], {"results": {"tompo": {"U1": 1}}})
    for bad, word in zip(paths[1:], ("other games", "one kind", "not an eval.json")):
        line = refused(evaluation.main, ["--seeds", paths[0], bad])
        assert word in line and bad in line

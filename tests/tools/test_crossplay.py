"""Cross-play: every entry against evaluation of the same pair, the row player's seats, the command line."""

import json

import numpy as np
import pytest
from tables import expert, play

import eval as evaluation
from experts import make_expert
from play.intervals import mean_interval
from play.metrics import per_instance
from settings import Model
from tools import crossplay
from world.draws import held_out_grid

FLAGS = ["--eval-games", "6"]


def chosen_games():
    grid = list(held_out_grid(4))
    return [grid[i] for i in np.linspace(0, 59, 6).round().astype(int)]


def pairs_of(path):
    return {(p["one"], p["rest"]): p for p in json.loads(path.read_text())["pairs"]}


def test_entries_are_those_of_evaluation_against_that_expert(tmp_path, capsys):
    path, names = tmp_path / "matrix.json", ["second-best", "planner", "always-link", "random"]
    crossplay.main([*FLAGS, "--player", *(f"expert:{n}" for n in names), "--json", str(path)])
    printed, pairs = capsys.readouterr().out, pairs_of(path)
    chosen = chosen_games()
    assert len(pairs) == 16
    for one in names:
        for rest in names:
            played = play(chosen, expert(one), 0, make_expert(rest), 0)
            rows = [per_instance(p) for p in played]
            pair = pairs[f"expert:{one}", f"expert:{rest}"]
            for metric in ("U2", "U3"):
                assert pair[metric]["games"] == [row[metric] for row in rows]
                v = mean_interval(row[metric] for row in rows)
                assert pair[metric]["mean"] == v["mean"]
                assert f"{v['mean']:.3f} ±{(v['high'] - v['low']) / 2:.2f}" in printed
    heads = [line.split() for line in printed.splitlines() if line.startswith("4 expert:random")]
    for metric, (_, _, *texts) in zip(("U3", "U2"), heads, strict=True):  # a row is of the player in one seat
        own = [pairs["expert:random", f"expert:{rest}"][metric]["mean"] for rest in names]
        assert texts[::2] == [f"{mean:.3f}" for mean in own]
    random_among = {rest: pairs["expert:random", f"expert:{rest}"]["U3"]["mean"] for rest in names}
    assert pairs["expert:planner", "expert:planner"]["U3"]["mean"] == pytest.approx(1, abs=1e-4)
    assert 1 > random_among["planner"] > random_among["random"]


def test_seats_in_turn(tmp_path):
    path, players = tmp_path / "matrix.json", ["expert:nash", "expert:never-link"]
    crossplay.main([*FLAGS, "--player", *players, "--seat", "rotate", "--json", str(path)])
    seats = [(i % 4,) for i in range(6)]
    played = play(chosen_games(), expert("nash"), seats, make_expert("never-link"), 0)
    assert pairs_of(path)[*players]["U2"]["games"] == [per_instance(p)["U2"] for p in played]


def test_models_share_one_base(model_dir, tmp_path, monkeypatch):
    loads, load = [], Model.load
    monkeypatch.setattr(Model, "load", lambda self: loads.append(1) or load(self))
    flags = ["--model", model_dir, "--max-new-tokens", "4", "--eval-games", "2"]
    names = ["base", "few-shot:1", "expert:nash"]
    crossplay.main([*flags, "--player", *names, "--json", str(tmp_path / "m.json")])
    pairs = pairs_of(tmp_path / "m.json")
    assert loads == [1] and len(pairs) == 9
    assert pairs["base", "base"]["U3"]["mean"] == 0  # silence in all seats: effort 0
    evaluation.main([*flags, "--policy", "base", "--expert", "nash", "--json", str(tmp_path / "eval.json")])
    alone = json.loads((tmp_path / "eval.json").read_text())["results"]["base"]["instances"]
    assert pairs["base", "expert:nash"]["U3"]["games"] == [row["U3"] for row in alone]

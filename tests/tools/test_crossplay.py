"""Cross-play: every entry against evaluation of the same pair, the row player's seats, the command line."""

import json

import numpy as np
import pytest
from tables import expert, play

import eval as evaluation
import settings
from eval import playing_parser
from play.cast import make_expert
from play.intervals import mean_interval
from play.metrics import per_instance
from settings import Model
from tools import crossplay
from world.draws import held_out_grid

FLAGS = ["--eval-games", "6"]


def chosen_games():
    grid = list(held_out_grid(4))
    return [grid[i] for i in np.linspace(0, 59, 6).round().astype(int)]


def shown(games):
    """Of the metrics of each game those that are shown."""
    return [(row["U2"], row["U3"]) for row in games]


def pairs_of(names, *argv):
    args = playing_parser("", "rotate").parse_args([*FLAGS, *argv])
    return crossplay.cross_play(settings.resolve(args), names)


def test_entries_are_those_of_evaluation_against_that_expert(capsys):
    kinds = ["second-best", "planner", "always-link", "random"]
    names = [f"expert:{kind}" for kind in kinds]
    crossplay.main([*FLAGS, "--player", *names])
    printed, pairs = capsys.readouterr().out, pairs_of(names)
    assert len(pairs) == 16
    for one, rest in pairs:
        others = make_expert(rest.removeprefix("expert:"))
        played = play(chosen_games(), expert(one.removeprefix("expert:")), 0, others, 0)
        assert shown(pairs[one, rest]) == shown(map(per_instance, played))
    heads = [line.split() for line in printed.splitlines() if line.startswith("4 expert:random")]
    for metric, (_, _, *texts) in zip(("U3", "U2"), heads, strict=True):  # a row is of the player in one seat
        own = [mean_interval(row[metric] for row in pairs["expert:random", rest]) for rest in names]
        told = [[f"{v['mean']:.3f}", f"±{(v['high'] - v['low']) / 2:.2f}"] for v in own]
        assert texts == sum(told, [])
    U3 = {pair: np.mean([row["U3"] for row in rows]) for pair, rows in pairs.items()}
    assert U3["expert:planner", "expert:planner"] == pytest.approx(1, abs=1e-4)
    assert 1 > U3["expert:random", "expert:planner"] > U3["expert:random", "expert:random"]


def test_seats_in_turn():
    players, seats = ["expert:nash", "expert:never-link"], [(i % 4,) for i in range(6)]
    played = play(chosen_games(), expert("nash"), seats, make_expert("never-link"), 0)
    assert shown(pairs_of(players, "--seat", "rotate")[*players]) == shown(map(per_instance, played))


def test_models_share_one_base(model_dir, tmp_path, monkeypatch):
    loads, load = [], Model.load
    monkeypatch.setattr(Model, "load", lambda self: loads.append(1) or load(self))
    flags = ["--model", model_dir, "--max-new-tokens", "4", "--eval-games", "2"]
    pairs = pairs_of(["base", "few-shot:1", "expert:nash"], *flags)
    assert loads == [1] and len(pairs) == 9
    assert [row["U3"] for row in pairs["base", "base"]] == [0, 0]  # silence in all seats: effort 0
    evaluation.main([*flags, "--policy", "base", "--expert", "nash", "--json", str(tmp_path / "eval.json")])
    alone = json.loads((tmp_path / "eval.json").read_text())["results"]["base"]["instances"]
    assert [row["U3"] for row in pairs["base", "expert:nash"]] == [row["U3"] for row in alone]

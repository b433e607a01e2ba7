"""Cross-play: every entry against evaluation of the same pair, the row player's seats, the command line."""

import json

import numpy as np
import pytest

import eval as evaluation
from play import players
from play.metrics import mean_interval, per_instance
from play.players import expert_player, play
from prompts import PromptStyle
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
            played = play(chosen, expert_player(one, PromptStyle(), 0), 0, rest, 0)
            rows = [per_instance(p) for p in played]
            pair = pairs[f"expert:{one}", f"expert:{rest}"]
            for metric in ("U2", "U3"):
                assert pair[metric]["games"] == [row[metric] for row in rows]
                v = mean_interval(row[metric] for row in rows)
                assert pair[metric]["mean"] == v["mean"]
                assert f"{v['mean']:.3f} [{v['low']:.2f}, {v['high']:.2f}]" in printed
    random_among = {rest: pairs["expert:random", f"expert:{rest}"]["U3"]["mean"] for rest in names}
    assert pairs["expert:planner", "expert:planner"]["U3"]["mean"] == pytest.approx(1, abs=1e-4)
    assert 1 > random_among["planner"] > random_among["random"]


def test_the_matrix_has_the_row_player_in_rows(capsys):
    """An entry's place: a row's label is the player in one seat."""
    means = {("a", "a"): 0.1, ("a", "b"): 0.2, ("b", "a"): 0.3, ("b", "b"): 0.4}
    values = {pair: {"mean": mean, "low": None, "high": None} for pair, mean in means.items()}
    lines = [line.split() for line in crossplay.format_matrix(["a", "b"], values).splitlines()]
    assert lines == [
        ["against", "1", "against", "2"],
        ["1", "a", "0.100", "0.200"],
        ["2", "b", "0.300", "0.400"],
    ]


def test_seats_in_turn(tmp_path):
    assert crossplay.seats_of(list(held_out_grid(4))[:6], "rotate") == [0, 1, 2, 3, 0, 1]
    path = tmp_path / "matrix.json"
    crossplay.main(
        [*FLAGS, "--player", "expert:nash", "expert:never-link", "--seat", "rotate", "--json", str(path)]
    )
    chosen = chosen_games()
    played = play(
        chosen, expert_player("nash", PromptStyle(), 0), [(i % 4,) for i in range(6)], "never-link", 0
    )
    assert pairs_of(path)["expert:nash", "expert:never-link"]["U2"]["games"] == [
        per_instance(p)["U2"] for p in played
    ]


def test_models_share_one_base_and_the_heat_map_is_drawn(tiny_model_dir, tmp_path, monkeypatch, capsys):
    loads, load = [], players.load_policy_of_rank
    monkeypatch.setattr(players, "load_policy_of_rank", lambda args: loads.append(1) or load(args))
    flags = ["--model", str(tiny_model_dir), "--device", "cpu", "--max-new-tokens", "4", "--eval-games", "2"]
    names = ["base", "few-shot:1", "expert:nash", "expert:random", "expert:selfish"]
    crossplay.main(
        [*flags, "--player", *names, "--json", str(tmp_path / "m.json"), "--png", str(tmp_path / "m.png")]
    )
    assert loads == [1] and (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    pairs = pairs_of(tmp_path / "m.json")
    assert len(pairs) == 25 and pairs["base", "base"]["U3"]["mean"] == 0  # silence in all seats: effort 0
    evaluation.main([*flags, "--policy", "base", "--expert", "nash", "--json", str(tmp_path / "eval.json")])
    alone = json.loads((tmp_path / "eval.json").read_text())["results"]["base"]["instances"]
    assert pairs["base", "expert:nash"]["U3"]["games"] == [row["U3"] for row in alone]


@pytest.mark.parametrize(
    "flags",
    [
        ("--player", "expert:nash"),
        ("--player", "expert:nash", "expert:nash"),
        ("--player", "expert:nash", "nowhere"),
        ("--player", "expert:nash", "expert:nobody"),
        ("--seat", "all"),
        ("--seat", "4"),
        ("--json", "no/such/folder/x.json"),
        ("--png", "x.exe"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        crossplay.main([*FLAGS, *flags])
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2
        and out == ""
        and len([line for line in err.splitlines() if "error:" in line]) == 1
    )


def test_files_are_not_overwritten(tmp_path, capsys):
    for flag in ("--json", "--png"):
        path = tmp_path / "mine"
        path.write_text("mine")
        with pytest.raises(SystemExit):
            crossplay.main([*FLAGS, flag, str(path)])
        assert path.read_text() == "mine" and str(path) in capsys.readouterr().err

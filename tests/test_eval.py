"""eval.py: what it plays, prints and writes as a command, what it refuses, and who sits where."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference import add_adapter
from tables import constant, evaluation_of, play

import eval as evaluation
from eval import instances, play_among_experts, seats_in
from games import GameError
from models import adapters as adapter_files
from models.load import load_policy
from play.cast import make_expert
from play.report import summarise
from policy import Policy
from prompts import Reply
from settings import Evaluation, Model
from world.draws import Family, held_out_grid, split_of

SCRIPT = Path(evaluation.__file__).resolve()
GRID = list(held_out_grid(4))
THREE_GAMES = [GRID[i] for i in (0, 30, 59)]  # evenly spread; half of 59 is rounded to even
SECOND_BEST = make_expert("second-best")
BASELINES = ["expert:second-best", "expert:always-link", "expert:random"]  # the last rows of a table


def run(tmp_path, *flags, games=4):
    """The results that eval.py writes with these flags."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    evaluation.main(["--eval-games", str(games), "--json", str(path), *flags])
    return json.loads(path.read_text())["results"]


def test_the_command_with_experts_only(tmp_path, capsys, monkeypatch):
    """The file run as a program, within this process: a new one would import torch again, for seconds."""
    monkeypatch.chdir(tmp_path)
    command = ["eval.py", "--policy", "expert:planner", "expert:nash", "--eval-games", "8", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", "results.json"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    rows = [f"expert:{name}" for name in ("planner", "nash", "second-best", "always-link", "random")]
    assert lines[0].split() == "policy U1 s row U2 U3 belief".split() and max(map(len, lines)) <= 120
    assert lines[6] == "round 1 alone" and "always-link gives the same" in lines[-3]
    assert [line.split()[0] for line in lines[1:6] + lines[8:13]] == 2 * rows
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["results"]) == rows and written["arguments"]["eval_games"] == 8
    for part, printed, n in (("all rounds", lines[1:6], 32), ("round 1", lines[8:13], 16)):
        for result, line in zip(written["results"].values(), printed, strict=True):
            assert len(result["instances"]) == 8 and result[part]["U1"]["n"] == n
            assert all(f"{result[part][m]['mean']:.3f}" in line for m in ("U2", "U3")) and " 1.000 " in line
    first, nash = (written["results"][name]["instances"] for name in rows[:2])
    difference = np.mean([a["U3"] - b["U3"] for a, b in zip(first, nash, strict=True)])
    assert lines[13] == "U2 of links by round" and lines[14].split()[1:] == "round 1 round 2".split()
    for result, line in zip(written["results"].values(), lines[15:20], strict=True):
        assert all(f"{result[f'round {r}']['U2 graph']['mean']:.3f}" in line for r in (1, 2))
    (paired,) = [line for line in lines[21:] if line.startswith("expert:nash ")]
    assert "expert:planner minus" in lines[20] and f"{difference:+.3f} ±" in paired


@pytest.fixture
def model_flags(model_dir):
    return ["--model", model_dir, "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory):
    """An adapter that changes what the tiny model says."""
    policy, folder = load_policy(model_dir), tmp_path_factory.mktemp("adapter")
    config = add_adapter(policy, size=1.0, targets=("q_proj", "v_proj", "down_proj"))
    adapter_files.save_adapter(policy.model, folder, config)
    return str(folder)


def test_few_shot_adds_a_row_that_has_read_that_many_expert_games(model_flags, tmp_path, monkeypatch):
    """The same uniforms and another prompt: another reply. Its prompts begin with the examples."""
    made, read, real, encode = [], [], evaluation.expert_examples, Policy.encode_prompt
    noted = lambda *args: made.append((args[0], real(*args))) or made[-1][1]
    monkeypatch.setattr(evaluation, "expert_examples", noted)
    monkeypatch.setattr(Policy, "encode_prompt", lambda self, chat: read.append(chat) or encode(self, chat))
    names = ["--policy", "base", "few-shot:2", "few-shot:1", "--agents", "3"]
    results = run(tmp_path, *model_flags, *names, games=3)
    assert list(results) == ["base", "few-shot:2", "few-shot:1", *BASELINES]
    assert [count for count, _ in made] == [2, 1] == [len(chats) for _, chats in made]
    base, two, one = (results[name]["replies"] for name in ("base", "few-shot:2", "few-shot:1"))
    assert all(len({a[0], b[0], c[0]}) == 3 for a, b, c in zip(base, two, one, strict=True))
    assert len(base) == 3 and len(read) == 3 * 6
    for chats, row in zip(([], made[0][1], made[1][1]), (read[:6], read[6:12], read[12:]), strict=True):
        for chat in row:
            assert sum(m["content"].startswith("A new game.") for m in chat) == len(chats)
            assert not chats or chat[: len(chats[0])] == chats[0]


def test_repair_adds_rows_in_which_what_can_be_read_is_played(model_flags, tmp_path, monkeypatch, capsys):
    """The model says one thing, which is compliant at no stage: strictly nothing is played; leniently seat 0
    chooses agents 2 and 4 and takes effort 0.5."""
    text, meant = "Decision: 0.5, 1, 0, 1 or so", {"G": "[0, 1, 0, 1]", "E": "0.5"}
    monkeypatch.setattr(Policy, "_reply", lambda self, ids, logps: Reply(text, ids, logps, True))
    results = run(tmp_path, *model_flags, "--policy", "base", "expert:nash", "--repair", games=3)
    assert list(results) == ["base", "base repaired", "expert:nash", *BASELINES]
    assert [results[name]["repaired"] for name in results] == [0, 6, 0, 0, 0, 0]
    assert "a decision was read and played: base repaired 6" in capsys.readouterr().out
    lenient = lambda asks: [f"Decision: {meant[ask.state.kind.letter]}" for ask in asks]
    for name, player in (("base", constant("")), ("base repaired", lenient)):
        expected = summarise(play(THREE_GAMES, player, 0, SECOND_BEST, 0))
        for metric in ("s", "row", "U2", "U3"):
            values = ([r[metric] for r in s["instances"]] for s in (results[name], expected))
            assert next(values) == next(values)
        assert results[name]["all rounds"]["U1"]["mean"] == 0 and results[name]["replies"] == [[text] * 2] * 3
    assert results["base"]["all rounds"]["U3"] != results["base repaired"]["all rounds"]["U3"]


def test_the_command_with_a_model_in_several_seats(model_flags, adapter_dir, tmp_path, monkeypatch):
    loads, load = [], Model.load
    monkeypatch.setattr(Model, "load", lambda self: loads.append(1) or load(self))
    table = run(tmp_path, *model_flags, "--table", "base", adapter_dir, "expert:nash", "base", games=2)
    assert list(table) == ["seat 0 base", f"seat 1 {adapter_dir}", "seat 2 expert:nash", "seat 3 base"]
    assert loads == [1] and table["seat 2 expert:nash"]["all rounds"]["U1"]["mean"] == 1
    more = ["--seat", "all", "--repair"]
    alone = run(tmp_path, *model_flags, "--policy", "base", "few-shot:1", *more, games=2)
    rows = ["base", "base repaired", "few-shot:1", "few-shot:1 repaired"]
    # In self-play of these two games never to link is the better constant answer.
    assert list(alone) == [*rows, "expert:second-best", "expert:never-link", "expert:random"]
    assert len(alone["base"]["replies"][0]) == 8  # 4 seats, 2 stages


def chosen(count, family=Family(), agents=4):
    return instances(SimpleNamespace(families=(family,)), Evaluation(agents, count, 0))


def test_the_evaluated_instances_are_held_out_and_distinct():
    assert chosen(60) == chosen(1000) == GRID
    for count in range(1, 61):
        indices = [GRID.index(game) for game in chosen(count)]
        assert len(set(indices)) == count and indices == sorted(indices)
    eight = chosen(8, Family(rounds=2), 5)
    assert all(split_of(g) == "held-out" and g.rounds == 2 and g.N == 5 for g in eight) and len(eight) == 8
    with pytest.raises(GameError, match="2 types are given for 4 agents"):
        chosen(1, Family(types=(1.0, 2.0)))


def test_random_seats_belong_to_the_game_and_the_seed():
    asked, seats = [], seats_in(GRID, "random", 0)
    assert {j for (j,) in seats} == {0, 1, 2, 3} and seats_in(GRID, "random", 1) != seats
    assert seats_in(GRID[3::7], "random", 0) == seats[3::7]
    noted = lambda asks: asked.extend((a.game, a.seat) for a in asks) or constant("no")(asks)
    play(GRID, noted, seats, make_expert("nash"), 0)
    assert asked == [(i, j) for i, (j,) in enumerate(seats)] * 2
    assert seats_in(GRID[:6], "rotate", 0) == [(0,), (1,), (2,), (3,), (0,), (1,)]


def test_games_with_other_stages_are_played_apart_and_each_kind_is_numbered_from_0():
    """So the draws of the experts in a game do not depend on which other kinds of games are played."""
    families = Family("bcz", "GE"), Family("pgg", "GEE", 2)
    make = lambda: constant("no")
    together = play_among_experts(evaluation_of("random", 120, families=families), "no", make)
    alone = [play_among_experts(evaluation_of("random", 60, families=(f,)), "no", make) for f in families]
    for a, b in zip(together, sum(alone, []), strict=True):
        assert a.game == b.game and str(a.history) == str(b.history)


def test_the_check_of_lengths_allows_for_the_longest_replies_also_where_they_think(model_dir):
    """All of a reply may be one line behind `Decision:`, which later prompts repeat."""
    policy, last = load_policy(model_dir), SimpleNamespace()
    policy.check_length = lambda prompt, reply: setattr(last, "tokens", prompt + reply)
    tokens = []
    for flags in ({}, dict(think=100), dict(think=100, max_new_tokens=48)):
        settings = evaluation_of("second-best", 1, families=(Family(rounds=2),))
        style = replace(settings.players.style, **flags)
        players = SimpleNamespace(style=style, others=settings.players.others)
        evaluation.check_lengths(replace(settings, players=players), policy)
        tokens.append(last.tokens)
    assert tokens[1] - tokens[0] - 400 == tokens[2] - tokens[0] < 50  # four stages; "Think first, then"

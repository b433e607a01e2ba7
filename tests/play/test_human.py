"""A person at the table, played by a list of lines and by a pipe: what is read, refused, told and counted."""

import io
import json
import sys

import pytest
from tables import STYLE, TRIO, TRIO_2

import eval as evaluation
from games import State
from play.held_out import by_stages
from play.human import Human, Left, written_out
from play.players import Ask, play
from prompts import messages, parse_reply
from world.draws import held_out_grid


def person(*lines):
    """(a Human who types these lines and then Ctrl-D, what it is told)."""
    left, told = iter(lines), []

    def ask(_):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return Human(STYLE, ask, lambda *words: told.append(" ".join(words))), told


@pytest.mark.parametrize(
    "typed, kind, seat, N, meant",
    [
        ("1 0 1", "G", 0, 4, [0, 1, 0, 1]),
        ("1 0 1", "G", 2, 4, [1, 0, 0, 1]),
        ("1, 0, 1", "G", 3, 4, [1, 0, 1, 0]),
        ("0 1 0 1", "G", 0, 4, [0, 1, 0, 1]),
        ("[0, 1, 0, 1]", "G", 0, 4, [0, 1, 0, 1]),
        ("Belief: [0, 1, 1, 1]\nDecision: [0, 1, 0, 1]", "G", 0, 4, [0, 1, 0, 1]),
        ("1 0 1", "G", 0, 3, None),  # one's own position is not 0
        ("1 0", "G", 0, 4, None),
        ("1 2 0", "G", 0, 4, None),
        ("all of them", "G", 0, 4, None),
        ("", "G", 0, 4, None),
        ("2.5", "E", 0, 4, 2.5),
        ("Decision: 2.5", "E", 0, 4, 2.5),
        ("3.5", "E", 0, 4, None),
        ("1 2", "E", 0, 4, None),
        ("-1", "E", 0, 4, None),
    ],
)
def test_plain_answers_and_two_lines_are_read(typed, kind, seat, N, meant):
    decision = parse_reply(written_out(typed, kind, seat, N), kind, seat, N, 3.0)
    if meant is None:
        assert decision is None
    else:
        assert (decision.action == meant) if kind == "E" else (decision.action.tolist() == meant)


def test_a_person_reads_the_prompt_of_the_model_and_hears_at_once_what_is_not_allowed():
    player, told = person("maybe", "1 1 1", "Belief: [0, 1, 1]", "Decision: [0, 1, 0]")
    (reply,) = player([Ask(0, State(TRIO), 0, [])])
    assert reply == "Belief: [0, 1, 1]\nDecision: [0, 1, 0]"
    system, question = (message["content"] for message in messages(State(TRIO), 0, [], STYLE))
    text = "\n".join(told)
    assert system in text and question in text
    assert "not allowed: not one list of numbers. A 0 or 1 for each of agents 2, 3, such as 1 0." in text
    assert "not allowed: own position not 0" in text


def test_later_stages_show_what_is_new():
    player, told = person("1 1", "1.2", "1 1", "1.3")
    (played,) = play([TRIO_2], player, 0, "nash", 0)
    assert [t.decision is not None for t in played.turns] == [True] * 4
    text = "\n".join(told)
    assert text.count("a new game") == 1 and text.count("You are agent 1 of 3") == 1
    assert "Round 2 links" in text and "Efforts were [1.20," in text


def test_after_a_game_everything_is_told():
    """By hand: always linking, all link; at Nash efforts 1.25 each earns 1.25^2 / 2 - 2 * 0.05."""
    player, told = person("1 1", "1.25")
    (played,) = play([TRIO], player, 0, "always-link", 0)
    text = "\n".join(told)
    assert "agent 1 (you): [0, 1, 1]" in text and "agent 2: [1, 0, 1]" in text and "agent 3: 1.25" in text
    assert (
        "worth 0.681 to agent 1 at the Nash efforts that follow; the best reply [0, 1, 1]: 0.681 (U2 1.00)"
        in text
    )
    assert "Payoffs of round 1: [0.68, 0.68, 0.68], in all 2.04" in text
    assert "First best: links 1-2, 1-3, 2-3, efforts [1.67, 1.67, 1.67], in all 2.20" in text
    assert f"{played.welfares[0] / 2.2:.3f}" in text.splitlines()[-1]


def test_a_person_meets_the_same_draws_of_the_experts_as_other_players():
    """Games are played one after the other; the experts' draws belong to the number of the game."""
    grid = list(held_out_grid(4))[:3]
    player, _ = person(*["0 0 0", "1"] * 3)

    def same(asks):
        return ["Decision: " + ("[0, 0, 0, 0]" if ask.state.kind == "G" else "1") for ask in asks]

    def one(part, first):
        return play([grid[i] for i in part], player, 0, "noisy:nash:0.5", 3, first=first)

    alone, together = by_stages(grid, one, True), play(grid, same, 0, "noisy:nash:0.5", 3)
    assert [[a.tolist() for a in p.history] for p in alone] == [
        [a.tolist() for a in p.history] for p in together
    ]


def test_ctrl_d_leaves_with_the_games_that_were_over():
    grid = list(held_out_grid(4))[:3]
    player, _ = person("1 1 1", "1", "1 1 1", "1", "1 1 1")
    played = by_stages(grid, lambda part, first: play([grid[i] for i in part], player, 0, "nash", 0), True)
    assert [p.game for p in played] == grid[:2]
    player, _ = person("1 1 1")
    with pytest.raises(Left):
        by_stages(grid, lambda part, first: play([grid[i] for i in part], player, 0, "nash", 0), True)


def test_the_command_is_played_by_a_pipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 0 1\nno\n1\n" + "0 0 1\n0.5\n" + "1 1 1\n"))
    names = ["human", "expert:nash", "expert:random", "expert:second-best"]
    evaluation.main(["--table", *names, "--eval-games", "3", "--json", str(tmp_path / "out.json")])
    said = capsys.readouterr().out
    assert said.count("a new game: you are agent 1") == 3 and said.count("the game is over") == 2
    assert "not allowed: not one number. One number from 0 to" in said
    (row,) = [line for line in said.splitlines() if line.startswith("seat 0 human")]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    own = results["seat 0 human"]
    assert len(own["instances"]) == 2 and own["all rounds"]["U1"]["mean"] == 1
    assert f"{own['all rounds']['U2']['mean']:.3f}" in row and f"{own['all rounds']['U3']['mean']:.3f}" in row


def test_leaving_before_a_game_is_over_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 1 1\n"))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--policy", "human", "--eval-games", "2"])
    assert stop.value.code == 2 and "error: you left before a game was over" in capsys.readouterr().err

"""A person at the table, played by a pipe: what is read, refused and shown."""

import io
import json
import sys

import numpy as np
import pytest
from tables import STYLE, TRIO, evaluation_of, play

import eval as evaluation
from eval import play_among_experts
from games import State, empty_graph
from play.cast import make_expert
from play.human import Human, rules, to_reply
from play.metrics import METRICS
from play.players import Ask
from prompts import PromptStyle, messages, parse_reply
from world.bcz import BCZ
from world.pgg import PGG


@pytest.fixture
def types(monkeypatch):
    """types(*lines) -> a Human who types them and then Ctrl-D."""

    def person(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return Human(STYLE)

    return person


TWO_LINES = "Belief: [0, 1, 1, 1]\nDecision: [0, 1, 0, 1]"
TYPED = [*((text, 0, 4, [0, 1, 0, 1]) for text in ("1 0 1", "0 1 0 1", "[0, 1, 0, 1]", TWO_LINES))]
TYPED += [("1 0 1", 2, 4, [1, 0, 0, 1]), ("1, 0, 1", 3, 4, [1, 0, 1, 0])]
TYPED += [("1 0 1", 0, 3, None)]  # one's own position is not 0
TYPED += [(text, 0, 4, None) for text in ("1 0", "1 2 0", "all of them", "")]
TYPED += [("2.5", 0, 4, 2.5), ("Decision: 2.5", 0, 4, 2.5)]
TYPED += [(text, 0, 4, -1.0) for text in ("3.5", "1 2", "-1")]  # is no effort


@pytest.mark.parametrize("typed, seat, N, meant", TYPED)
def test_plain_answers_and_two_lines_are_read(typed, seat, N, meant):
    state = State(BCZ((1.0,) * N, 0.1, 0.05, 3.0))
    state = state.step(empty_graph(N)) if isinstance(meant, float) else state
    decision = parse_reply(to_reply(typed, state, seat), state, seat)
    assert np.array_equal(decision.action if decision else -1.0, -1.0 if meant is None else meant)


def test_a_person_reads_the_prompt_of_the_model_and_hears_at_once_what_is_not_allowed(types, capsys):
    player = types("maybe", "1 1 1", "Belief: [0, 1, 1]", "Decision: [0, 1, 0]")
    (reply,) = player([Ask(0, State(TRIO), 0, [])])
    assert reply == "Belief: [0, 1, 1]\nDecision: [0, 1, 0]"
    text = capsys.readouterr().out
    assert messages(State(TRIO), 0, [], STYLE)[-1]["content"] in text
    assert "not allowed: not one list of numbers. An allowed answer: 1 1\n" in text
    assert "not allowed: own position not 0" in text and text.count("0 or 1 for agents 2, 3 (Ctrl-D") == 3


def test_the_rules_are_told_in_words_once_and_the_numbers_in_every_game(types, capsys):
    """Also a fee, local information and a game without hints."""
    play([TRIO], player := types("0 1", "2", "1 1", "1"), 0, make_expert("nash"), 0)
    play([TRIO], player, 0, make_expert("nash"), 0)
    text = capsys.readouterr().out
    numbers = "The numbers of this game: delta 0.100, c 0.050; your effort can be 0 to 3."
    assert text.count(numbers) == 2 and text.count("You play one round: links, then efforts. ") == 1
    assert "c. A choice is free if it is not answered.\nPayoff: alpha x - x²/2 + delta x" in text
    assert "at 1 a link earns what it costs" in text and "such as\n1 0; for an effort" in text
    assert text.count("a number from 0 to 3 (Ctrl-D leaves): ") == 2
    game = PGG((5.0, 5.0), 1.2, 0.5, 1.0, "GGE", 3, fee=0.5)
    told = rules(State(game), 0, PromptStyle("local"), False)
    assert "You play 3 rounds: links, then links, then efforts." in told and "hint" not in told
    assert "A choice costs you 0.5 c, answered or not." in told and "e your own number" in told
    assert "at 1.5 a link earns what it costs" in rules(State(game), 0, PromptStyle(), False)
    assert "hint" not in rules(State(game), 0, PromptStyle(hints=False), False)


def test_the_score_runs_over_the_games_and_who_sat_where_is_told(types, capsys):
    player = types("0 1", "2", "1 1", "1.2")
    player.who = lambda game, seat: f"rule {seat}"
    played = [play([TRIO], player, 0, make_expert("always-link"), 0)[0] for _ in range(2)]
    text = capsys.readouterr().out
    paid = [float(p.game.round_payoffs(*p.history)[0]) for p in played]
    values = [[METRICS[name](p) for p in played] for name in ("U2", "U3")]
    for n in (1, 2):
        U2, U3 = (np.mean(own[:n]) for own in values)
        assert f"Your score, games: {n}, U2 {U2:.2f}, U3 {U3:.2f}, payoffs {sum(paid[:n]):.2f} in all" in text
    assert text.count("The others were: agent 2 rule 1, agent 3 rule 2\n") == 2


def test_after_a_game_everything_is_shown(types, capsys):
    """By hand: agent 1 links with 3 alone; its best reply is 1 + 0.1 x_3, and its payoff is concave."""
    (played,) = play([TRIO], types("0 1", "2"), 0, make_expert("always-link"), 0)
    text = capsys.readouterr().out.strip()
    assert "Round 1, links:\n  agent 1 (you): [0, 0, 1]\n  agent 2: [1, 0, 1]" in text
    assert "  agent 1: U2 0.44, the best reply was [0, 1, 1]" in text
    x = played.history[1][2]
    best, payoff = 1 + 0.1 * x, 2 - 2**2 / 2 + 0.1 * 2 * x - 0.05
    U2 = 1 - (2 - best) ** 2 / (3 - best) ** 2  # the cap 3 is the worst effort
    assert f"agent 3: {x:.2f}\n  agent 1: U2 {U2:.2f}, the best reply was {best:.2f}" in text
    assert f"Payoffs of round 1: [{payoff:.2f}, " in text and f"in all {played.welfares[0]:.2f}" in text
    assert "First best: links all, efforts [1.67, 1.67, 1.67], in all 2.20" in text
    assert f"first best: {played.welfares[0] / 2.2:.3f}\nYour score, games: 1, U2 " in text


def test_a_person_meets_the_same_draws_of_the_experts_as_other_players(types):
    """Games are played one after the other; the experts' draws belong to the number of the game."""
    settings, player = evaluation_of("noisy:nash:0.5", games=3, seed=3), types(*["0 0 0", "1"] * 3)

    def same(asks):
        return [f"Decision: {'[0, 0, 0, 0]' if ask.state.kind.letter == 'G' else 1}" for ask in asks]

    alone, together = (
        play_among_experts(settings, name, lambda p=p: p) for name, p in (("human", player), ("x", same))
    )
    assert len(alone) == 3 and [str(p.history) for p in alone] == [str(p.history) for p in together]


def test_the_command_is_played_by_a_pipe(tmp_path, types, capsys):
    types("1 0 1", "", "no", "1", "0 0 1", "0.5", "1 1 1")
    names = ["human", "expert:nash", "expert:random", "expert:second-best"]
    evaluation.main(["--table", *names, "--eval-games", "3", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert printed.count("a new game: you are agent 1") == 3 and printed.count("the game is over") == 2
    assert "not allowed: not one number. An allowed answer: " in printed
    assert "not allowed: you have answered nothing. An allowed answer: " in printed
    others = "agent 2 expert:nash, agent 3 expert:random, agent 4 expert:second-best"
    assert printed.count(f"The others were: {others}\n") == 2 and "Your score, games: 2, U2 " in printed
    assert "the game that you left does not count; 2 before it count" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("seat 0 human")]
    own = json.loads((tmp_path / "out.json").read_text())["results"]["seat 0 human"]
    assert len(own["instances"]) == 2 and own["all rounds"]["U1"]["mean"] == 1
    assert all(f"{own['all rounds'][metric]['mean']:.3f}" in row for metric in ("U2", "U3"))
    low, high = (own["all rounds"]["U3"][end] for end in ("low", "high"))
    assert low < 1 < high and f" {own['all rounds']['U3']['mean']:.3f} [{low:.2f}, 1]" in row


def test_ctrl_d_leaves_with_the_games_that_were_over(types, capsys):
    argv = ["--policy", "human", "--eval-games", "2"]
    types("1 1 1")
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    assert stop.value.code == 2 and "error: you left before a game was over" in capsys.readouterr().err
    types("1 1 1", "1", "1 1 1")
    evaluation.main(argv)
    printed = capsys.readouterr().out
    assert "human minus the others" in printed and "agent 2 expert:second-best, agent 3 expert:" in printed

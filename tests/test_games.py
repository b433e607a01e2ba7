"""What games have in common: consent, stages, rounds, observations, files, validation."""

import json
import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from brute import bcz_payoffs

import games
from decisions import EFFORTS, LINKS
from games import GameError, State, complete_graph, game_from_json
from play.expert_games import history_from_text, history_to_text
from world.bcz import BCZ
from world.draws import Family, draw_game

GOOD = {"alpha": (1.0, 2.0), "delta": 0.1, "c": 0.2, "cap": 5.0, "stages": "GE", "rounds": 1}
BAD = [  # a field, a value, words of the refusal
    *(("alpha", (1.0,) * N, f"2 to 12 agents, got {N}") for N in (0, 1, 13)),
    *(("alpha", (1.0, v), "alpha") for v in (0.0, -2.0)),
    *(("alpha", (1.0, v), "finite") for v in (math.nan, "2\n", None)),
    *(("delta", -0.1, "delta"), ("delta", math.inf, "finite"), ("c", 1e300, "at most 1e.06")),
    *(("c", "0.1", "finite"), ("c", -0.1, "c and fee must not be negative")),
    *(("cap", 0.0, "cap"), ("cap", math.nan, "finite")),
    *(("stages", v, "stages") for v in ("", "E", "G", "G\nE", 5, ["G", "E"])),
    ("stages", "GXE", "GXE"),
    *(("rounds", v, "whole number from 1") for v in (0, -3, 1.5, math.nan, "2", None)),
]


@pytest.mark.parametrize("name, value, words", BAD)
def test_bad_games_are_refused(name, value, words):
    assert BCZ(**GOOD)
    for build in (BCZ, lambda **bad: game_from_json({"game": "bcz"} | bad)):
        with pytest.raises(GameError, match=words):
            build(**GOOD | {name: value})


def test_json_that_is_no_game_is_refused():
    good = {"game": "bcz"} | GOOD
    for key in good:
        with pytest.raises(GameError, match=key):
            game_from_json({k: v for k, v in good.items() if k != key})
    for d in ([], "game", None, {"game": "chess"}, good | {"alpha": 3}, good | {"alpha": None}):
        with pytest.raises(GameError):
            game_from_json(d)


@pytest.mark.parametrize("name, stages, rounds", [("bcz", "GE", 1), ("bcz", "GGE", 3), ("pgg", "GEE", 2)])
def test_json_round_trip(name, stages, rounds):
    drawn = draw_game(np.random.default_rng(70), 5, family=Family(name, stages, rounds))
    for game in (drawn, replace(drawn, fee=0.1)):  # without a fee, as in data sets that are older than fees
        d = json.loads(json.dumps(game.to_json()))
        assert set(d) | {"fee"} == {"game"} | {f.name for f in fields(game)} and ("fee" in d) == (
            game.fee > 0
        )
        assert game_from_json(d) == game and hash(game_from_json(d)) == hash(game)
        whole = json.loads(re.sub(r"\.0\b", "", json.dumps(d)))  # 3 and 3.0 are the same, also for the split
        assert game_from_json(whole).key == game.key and game_from_json(whole).rounds == game.rounds


TRIO = BCZ((3.0, 1.0, 2.0), 0.1, 0.25, 9.0, "GE", 2)
ALL, HUB = complete_graph(3), np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]])
IN_VAIN = np.array([[0, 1, 1], [1, 0, 1], [1, 0, 0]])  # 1 asks 2 in vain: the links are HUB


def play(game, *actions):
    state = State(game)
    for a in actions:
        state = state.step(np.array(a))
    return state


def assert_results(state, *expected):
    for (G, x, pi), (links, efforts) in zip(state.round_results(), expected, strict=True):
        assert G.tolist() == links.tolist() and x.tolist() == efforts
        np.testing.assert_allclose(pi, bcz_payoffs(state.game, links, efforts))


def test_two_rounds_stage_by_stage():
    state = State(TRIO)
    expected = [  # kind, round, links and efforts before each decision, and how many rounds have ended
        (IN_VAIN, LINKS, 1, games.empty_graph(3), None, 0),
        ([4.0, 1.5, 2.5], EFFORTS, 1, HUB, None, 0),
        (ALL, LINKS, 2, HUB, [4.0, 1.5, 2.5], 1),
        ([5, 2, 3], EFFORTS, 2, ALL, [4.0, 1.5, 2.5], 1),
    ]
    for actions, kind, number, links, efforts, ended in expected:
        assert (state.kind, state.round, state.done) == (kind, number, False)
        assert state.links.tolist() == links.tolist() and len(state.round_results()) == ended
        assert (state.efforts if efforts is None else state.efforts.tolist()) == efforts
        state = state.step(actions)
    assert state.done and state.efforts.tolist() == [5, 2, 3] and state.last("G").tolist() == ALL.tolist()
    assert_results(state, (HUB, [4.0, 1.5, 2.5]), (ALL, [5, 2, 3]))
    for actions in (ALL, [1, 2, 3]):
        with pytest.raises(ValueError, match="over"):
            state.step(actions)


REVISED = [  # stages, their actions, and the links and efforts that count
    ("GGE", [HUB, ALL, [1, 2, 3]], ALL, [1, 2, 3]),
    ("GGE", [ALL, HUB, [1, 2, 3]], HUB, [1, 2, 3]),
    ("GEE", [ALL, [1, 2, 3], [3, 2, 2]], ALL, [3, 2, 2]),
    ("GEGE", [ALL, [1, 2, 3], HUB, [3, 2, 2]], HUB, [3, 2, 2]),
]


@pytest.mark.parametrize("stages, actions, links, efforts", REVISED)
def test_a_later_stage_revises_the_earlier_one(stages, actions, links, efforts):
    game = replace(TRIO, stages=stages)
    state = State(game)
    for letter, a in zip(stages, actions, strict=True):
        assert state.kind.letter == letter and state.round == 1 and state.round_results() == []
        state = state.step(a)
    state = play(game, *actions, *actions)
    assert state.done
    assert_results(state, (links, efforts), (links, efforts))


BAD_PROPOSALS = [np.ones((3, 3), int), 2 * ALL, -ALL, ALL * 0.5, ALL * math.nan, complete_graph(4), ALL[:2]]
BAD_PROPOSALS += [np.zeros(3)]
BAD_EFFORTS = [[1, 2], [1, 2, 3, 4], [[1, 2, 3]], 1.0, ALL]
BAD_EFFORTS += [[-0.001, 1, 1], [1, 9.001, 1], [1, math.nan, 1], [math.inf, 1, 1]]


def test_bad_actions_are_refused():
    efforts = State(TRIO).step(ALL)
    cases = [(State(TRIO), BAD_PROPOSALS, "3 x 3"), (efforts, BAD_EFFORTS, "3 numbers from 0 to the cap")]
    for state, bad, words in cases:
        for actions in bad:
            with pytest.raises(ValueError, match=words):
                state.step(actions)
    assert efforts.step([0, 9, 1]).efforts.tolist() == [0, 9, 1]


def test_history_is_not_the_callers_array():
    P, x, state = ALL.copy(), np.array([1.0, 2.0, 3.0]), State(TRIO)
    after_links = state.step(P)
    after_efforts = after_links.step(x)
    P[:], x[:] = 0, 0
    assert after_efforts.links.tolist() == ALL.tolist() and after_efforts.efforts.tolist() == [1, 2, 3]
    assert state.history == () and len(after_links.history) == 1  # a step leaves the state it came from alone


def test_a_history_as_text_is_read_back_exactly():
    state = play(replace(TRIO, stages="GEE"), IN_VAIN, [1 / 3, 0.1 + 0.2, 9], [1.25, 0, 1e-9], HUB)
    texts = history_to_text(state)
    assert texts[0] == "011 101 100" and texts[2] == "1.25 0.0 1e-09"
    back = history_from_text(state.game, json.loads(json.dumps(texts)))
    assert len(back.history) == 4 and all(map(np.array_equal, back.history, state.history))
    for bad in (["011 101"], ["011 111 100"], ["abc"], [texts[0], "1 2"], [*texts, *texts]):
        with pytest.raises(ValueError):
            history_from_text(state.game, bad)

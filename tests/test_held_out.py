"""Held-out games: which are played and who sits where."""

from types import SimpleNamespace

import pytest
from tables import constant, evaluation_of, play

from eval import instances, play_among_experts, seats_in
from experts import make_expert
from games import GameError
from settings import Evaluation
from world.draws import Family, held_out_grid, split_of

GRID = list(held_out_grid(4))


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

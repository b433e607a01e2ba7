"""Held-out games: which are played and who sits where."""

import argparse

import pytest
from tables import constant

from play import held_out
from play.held_out import held_out_instances, seats_in
from play.players import play
from run import dataset
from run.files import InputError
from world.draws import held_out_grid, split_of


def arguments(*argv):
    parser = argparse.ArgumentParser()
    dataset.add_style_arguments(parser)
    held_out.add_eval_arguments(parser)
    return parser.parse_args([str(text) for text in argv])


def test_the_evaluated_instances_are_held_out_and_distinct():
    grid = held_out_grid(4)
    assert (
        held_out_instances(arguments()) == held_out_instances(arguments("--eval-games", 1000)) == list(grid)
    )
    for count in range(1, 61):
        chosen = [grid.index(g) for g in held_out_instances(arguments("--eval-games", count))]
        assert len(set(chosen)) == count and chosen == sorted(chosen)
    eight = held_out_instances(arguments("--eval-games", 8, "--rounds", 2, "--eval-agents", 5))
    assert all(split_of(g) == "held-out" and g.rounds == 2 and g.N == 5 for g in eight) and len(eight) == 8


@pytest.mark.parametrize("argv", ["--seat 4", "--eval-agents 2", "--eval-agents 13"])
def test_instances_that_there_are_not(argv):
    with pytest.raises(InputError) as caught:
        held_out_instances(arguments(*argv.split()))
    assert "\n" not in str(caught.value)


def test_random_seats_belong_to_the_game_and_the_seed():
    grid, asked = list(held_out_grid(4)), []
    seats = seats_in(grid, "random", 0)
    assert {j for (j,) in seats} == {0, 1, 2, 3}
    assert seats_in(grid[3::7], "random", 0) == seats[3::7] and seats_in(grid, "random", 1) != seats
    noted = lambda asks: asked.extend((a.game, a.seat) for a in asks) or constant("no")(asks)
    play(grid, noted, seats, "nash", 0)
    assert asked == [(i, j) for i, (j,) in enumerate(seats)] * 2

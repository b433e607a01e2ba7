"""Families of games, the instances that are drawn, the held-out grid, and that the two never meet."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from games import GAMES, GameError
from tools.check_game import all_graphs
from world.bcz import BCZ
from world.draws import TYPE_PATTERNS, Family, draw_game, held_out_grid, split_of, types_of
from world.efforts import effort_cap
from world.families import families_of
from world.pgg import PGG


def instances_of(drawn):
    """In any seat order, with any stages."""
    return {(tuple(sorted(g.types)), tuple(g.parameters.items())) for g in drawn}


def test_every_game_with_every_string_of_stages():
    assert families_of(["bcz"], ["GE"], 1) == (Family(),) and Family().label == "BCZ-GE"
    families = families_of(["pgg", "bcz", "pgg"], ["GE", "GGE", "GE"], 2)
    labels = [(f.label, f.rounds) for f in families]
    assert labels == [("PGG-GE", 2), ("PGG-GGE", 2), ("BCZ-GE", 2), ("BCZ-GGE", 2)]
    with pytest.raises(GameError, match="G .links.*E"):
        families_of(["bcz"], ["GXE"], 1)


def test_patterns_of_types_can_be_chosen():
    family = Family(patterns=("linear", "hub"))
    allowed = {tuple(sorted(types_of(pattern, 5))) for pattern in family.patterns}
    rng, grid = np.random.default_rng(0), held_out_grid(5, family)
    assert {tuple(sorted(draw_game(rng, 5, family=family).alpha)) for _ in range(40)} == allowed
    assert {tuple(sorted(g.alpha)) for g in grid} == allowed and len(grid) == 30
    assert set(grid) < set(held_out_grid(5))  # the same games as in the whole grid, in the same seats


def test_fixed_parameters_are_those_of_every_instance():
    family = Family(types=(2.0,), fixed=(("delta", 0.07), ("c", 0.2)))
    game = BCZ((2.0,) * 4, 0.07, 0.2, effort_cap([2.0] * 4, 0.07))  # nothing is left to draw
    for split in ("train", "held-out"):
        assert draw_game(np.random.default_rng(0), 4, split, family) == game
    assert held_out_grid(4, family) == (game,)
    family = Family("pgg", types=(10.0, 5.0, 8.0), fixed=(("r", 1.3), ("b", 0.6)))
    drawn = [draw_game(np.random.default_rng(seed), 3, family=family) for seed in range(30)]
    assert all((g.endowment, g.r, g.b) == ((10.0, 5.0, 8.0), 1.3, 0.6) for g in drawn)
    assert len({g.c for g in drawn}) > 10 and {split_of(g) for g in drawn} == {"train"}
    assert {g.c for g in held_out_grid(3, family)} == {0.77, 2.3, 3.83, 5.37, 6.9}
    with pytest.raises(GameError, match="3 types are given for 4 agents"):
        draw_game(np.random.default_rng(0), 4, family=family)


def test_parameters_that_leave_nothing_to_draw_in_a_split_are_refused():
    """One pattern of alpha, delta and c given: a single instance, which is in one of the splits."""
    family = Family(patterns=("hub",), fixed=(("delta", 0.08), ("c", 0.25)))
    game = family.make(types_of("hub", 4), 0.2, 1.0)
    missing = "held-out" if split_of(game) == "train" else "train"
    with pytest.raises(GameError, match=f"no {missing} instance"):
        draw_game(np.random.default_rng(0), 4, missing, family)


def test_whether_anything_is_drawn():
    family = partial(Family, "pgg", types=(10.0,))
    assert family(fixed=(("r", 1.2), ("c", 3.0))).nothing_drawn  # b is 0.5 unless it is fixed
    assert not family(fixed=(("r", 1.2), ("b", 0.7))).nothing_drawn
    assert not Family("pgg", fixed=(("r", 1.2), ("c", 3.0))).nothing_drawn


def test_types_of_a_pattern():
    expected = [[1, 1, 1, 1], [1, 1.67, 2.33, 3], [3, 3, 1, 1], [3, 1, 1, 1]]
    assert [types_of(pattern, 4).tolist() for pattern in TYPE_PATTERNS] == expected
    assert types_of("half", 5).tolist() == [3, 3, 3, 1, 1]
    assert types_of("linear", 3, "pgg").tolist() == [5, 10, 15]
    assert types_of("homogeneous", 3, "pgg").tolist() == [10, 10, 10]


def test_instances_are_rounded_to_what_players_read():
    # delta = 0.25/3 = 0.08333 -> 0.083; mean alpha 2; c = 1.25 * 0.083 * 4 = 0.415.
    game = Family("bcz", "GEE", 2).make(np.array([1.0, 3.0, 1.0, 3.0]), 0.25, 1.25)
    assert game == BCZ((1.0, 3.0, 1.0, 3.0), 0.083, 0.415, game.cap, "GEE", 2)
    assert Family("pgg").make(np.array([10.0, 5.0, 8.0]), 1.234, 0.3) == PGG((10.0, 5.0, 8.0), 1.23, 0.5, 2.3)


@pytest.mark.parametrize("N", range(4, 9))
@pytest.mark.parametrize("pattern", TYPE_PATTERNS)
def test_effort_cap_is_the_smallest_such_integer(pattern, N):
    """In exact fractions: if all link x_i = (alpha_i + 2 delta S)/(1 + 2 delta), S = sum alpha/(1 - 2p)."""
    alpha = types_of(pattern, N)
    exact = [Fraction(str(round(float(a), 2))) for a in alpha]
    for thousandths in range(1, math.ceil(360 / (N - 1))):
        delta = Fraction(thousandths, 1000)
        total = sum(exact) / (1 - 2 * delta * (N - 1))
        largest = (max(exact) + 2 * delta * total) / (1 + 2 * delta)
        assert effort_cap(alpha, float(delta)) == math.ceil(Fraction(3, 2) * largest), float(delta)


def test_effort_cap_binds_nowhere_and_does_not_depend_on_the_seats():
    rng, graphs = np.random.default_rng(61), all_graphs(4)
    for game in held_out_grid(4)[::4]:
        assert {effort_cap(rng.permutation(game.alpha), game.delta) for _ in range(5)} == {game.cap}
        for factor, solve in ((1, game.nash_efforts), (2, game.planner_efforts)):
            x = np.linalg.inv(np.eye(4) - factor * game.delta * graphs) @ np.array(game.alpha)
            assert x.max() < game.cap
            np.testing.assert_allclose([solve(G) for G in graphs], x, rtol=1e-10)


@pytest.mark.parametrize("game", ["bcz", "pgg"])
def test_draws_keep_their_ranges(game, monkeypatch):
    """Those of the two free numbers. Every pattern is as frequent, and every seat gets to be the hub."""
    made, make, rng = [], GAMES[game].make, np.random.default_rng(64)
    noted = lambda types_N, *rest: made.append((tuple(types_N), *rest[:2])) or make(types_N, *rest)
    monkeypatch.setattr(GAMES[game], "make", noted)
    drawn = [draw_game(rng, 6, family=Family(game, "GEE", 3)) for _ in range(400)]
    types, *free = zip(*made, strict=True)
    for values, (low, high) in zip(free, GAMES[game].ranges, strict=True):
        margin = 0.05 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    for pattern in TYPE_PATTERNS:
        own = [t for t in types if sorted(t) == sorted(types_of(pattern, 6, game))]
        assert 0.15 < len(own) / len(types) < 0.35
    assert {t.index(max(t)) for t in own} == set(range(6)) and pattern == "hub"
    assert {(g.name, g.stages, g.rounds) for g in drawn} == {(game, "GEE", 3)}


@pytest.mark.parametrize("name, value, read", [("delta", 0.0834, "0.083"), ("c", 0.0004, "0.000")])
def test_a_fixed_value_is_one_that_agents_can_read(name, value, read):
    with pytest.raises(GameError, match=f"--fix {name}={value}: agents would read {read}; give no more"):
        families_of(["bcz"], ["GE"], 1, fixed={name: value})
    assert families_of(["pgg"], ["GE"], 1, fixed={"c": 0.0004})[0].fixed == (("c", 0.0004),)


def test_with_a_fixed_cost_games_of_the_grid_may_differ_in_the_order_of_seats_alone():
    grid = held_out_grid(4, Family(fixed=(("c", 0.1),)))
    assert {g.c for g in grid} == {0.1} and len({g.key for g in grid}) == 12 < len(set(grid)) == len(
        grid
    ) == 35


FIXED = {
    "c": Family(fixed=(("c", 0.12),), fee=1.0, rounds=3),  # that of --preset others
    "types": Family(types=(1.0, 2.0, 2.0, 3.0)),
    "both": Family(types=(1.5,), fixed=(("delta", 0.07),)),
    "pgg": Family("pgg", fixed=(("c", 3.0),)),
}


@pytest.mark.parametrize("family", FIXED.values(), ids=FIXED)
def test_the_grid_that_flags_make_is_held_out_too(family):
    """For most of these instances the hash alone would not do it."""
    grid = {game.key for game in held_out_grid(4, family)}
    rng = np.random.default_rng(66)
    assert not grid & {draw_game(rng, 4, "train", family).key for _ in range(600)}
    assert any(split_of(game) == "train" for game in held_out_grid(4, family))
    assert all(split_of(game, family) == "held-out" for game in held_out_grid(4, family))


def test_where_only_the_types_are_drawn_the_grid_is_all_that_there_is():
    fixed = {"bcz": (("delta", 0.07), ("c", 0.1)), "pgg": (("r", 1.2), ("c", 3.0))}
    for family in (Family(game, fixed=values) for game, values in fixed.items()):
        grid, rng = {game.key for game in held_out_grid(4, family)}, np.random.default_rng(67)
        drawn = {draw_game(rng, 4, "train", family).key for _ in range(100)}
        assert drawn <= grid and len(drawn) > 1


@pytest.mark.parametrize("N", range(4, 9))
def test_held_out_grid(N):
    family = Family("bcz", "GGE", 2)
    grid = held_out_grid(N, family)
    assert len(grid) == len({g.key for g in grid}) == 60
    assert {(g.N, g.stages, g.rounds) for g in grid} == {(N, "GGE", 2)}
    delta = [round(p / (N - 1), 3) for p in (0.2, 0.25, 0.3)]
    expected = {(tuple(sorted(types_of(pattern, N))), d) for pattern in TYPE_PATTERNS for d in delta}
    seen = [(tuple(sorted(g.alpha)), g.delta) for g in grid]
    assert set(seen) == expected and all(seen.count(cell) == 5 for cell in expected)
    ratios = sorted({round(g.c / (g.delta * np.mean(g.alpha) ** 2) * 20) / 20 for g in grid})
    assert ratios == [0.75, 1.0, 1.25, 1.5, 2.0]
    assert sum(list(g.alpha) != sorted(g.alpha) for g in grid) > 30  # the seat order is random
    held_out_grid.cache_clear()
    again = held_out_grid(N, family)
    assert again == grid and again is not grid
    # Stages and rounds are settings of play: the same 60 instances in the same seats.
    assert tuple(replace(g, stages="GGE", rounds=2) for g in held_out_grid(N)) == grid


@pytest.mark.parametrize("game, types", [("bcz", "alpha"), ("pgg", "endowment")])
def test_splits_never_share_an_instance(game, types):
    rng, family = np.random.default_rng(62), Family(game)
    train = [draw_game(rng, 4, "train", family) for _ in range(1500)]
    held_out = [draw_game(rng, 4, "held-out", family) for _ in range(150)] + list(held_out_grid(4, family))
    assert len(instances_of(train)) < 1500  # draws do repeat instances, so an overlap could show
    assert not instances_of(train) & instances_of(held_out)
    assert {split_of(g) for g in train} == {"train"} and {split_of(g) for g in held_out} == {"held-out"}
    for game in (*train[:100], *held_out[:100]):
        other_order = {types: tuple(rng.permutation(game.types).tolist())}
        moved = replace(game, stages="GEE", rounds=3, **other_order)
        assert moved.key == game.key and split_of(moved) == split_of(game)


def test_the_split_is_the_same_in_every_process():
    """It was so in another one. (Python's own hash of a string changes from process to process.)"""
    games = [Family().make(types_of("half", 5), p, 1.1) for p in np.linspace(0.15, 0.33, 40)]
    assert [i for i, game in enumerate(games) if split_of(game) == "held-out"] == [15, 16, 30, 34]

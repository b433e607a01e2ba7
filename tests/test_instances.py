"""The flags that name games, the instances that are drawn, the held-out grid, and that no instance is in both."""

import argparse
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import experts
from world import draws as instances
from world.bcz import BCZ, effort_cap
from brute import all_graphs
from games import GameError
from world.draws import KINDS, Family, add_game_arguments, draw_game, families, held_out_grid, split_of, types_of_kind
from world.pgg import PGG
from prompts import PromptStyle
from run.files import InputError


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_game_arguments(parser)
    return families(parser.parse_args(argv))


def test_defaults_are_bcz_ge():
    assert parsed() == (Family(),) and Family().label == "BCZ-GE"


def test_every_game_with_every_string_of_stages():
    found = parsed("--game", "pgg", "bcz", "--stages", "GE", "GGE", "GE", "--rounds", "2")
    assert [(f.label, f.rounds) for f in found] == [("PGG-GE", 2), ("PGG-GGE", 2), ("BCZ-GE", 2), ("BCZ-GGE", 2)]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--factor", "1.2"], "--game pgg"),
        (["--game", "pgg", "--delta", "0.1"], "--game bcz"),
        (["--game", "pgg", "--alpha", "1"], "--alpha belongs"),
        (["--alpha", "ring"], "kinds"),
        (["--alpha", "1", "hub"], "kinds"),
        (["--alpha", "-1"], "positive"),
        (["--alpha", "nan"], "positive"),
    ],
)
def test_flags_that_make_no_game_are_refused_in_one_line(argv, words):
    with pytest.raises(InputError, match=words) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stages", ["", "G", "E", "GXE", "ge"])
def test_bad_stages_are_refused(stages):
    with pytest.raises(GameError, match="G .links. and E"):
        parsed("--stages", stages)


def test_kinds_of_types_can_be_chosen():
    (family,) = parsed("--alpha", "hub", "linear")
    assert family.kinds == ("linear", "hub")
    allowed = [tuple(sorted(types_of_kind(kind, 5))) for kind in family.kinds]
    rng = np.random.default_rng(0)
    drawn = [tuple(sorted(draw_game(rng, 5, family=family).alpha)) for _ in range(40)]
    assert set(drawn) == set(allowed)
    assert {tuple(sorted(g.alpha)) for g in held_out_grid(5, family)} == set(allowed) and len(held_out_grid(5, family)) == 30
    # the same games as in the whole grid, in the same seats
    assert set(held_out_grid(5, family)) < set(held_out_grid(5))


def test_given_parameters_are_those_of_every_instance():
    (family,) = parsed("--delta", "0.07", "--cost", "0.2", "--alpha", "2")
    game = draw_game(np.random.default_rng(0), 4, family=family)
    assert game == BCZ((2.0,) * 4, 0.07, 0.2, effort_cap([2.0] * 4, 0.07))
    assert family.single and held_out_grid(4, family) == (game,)
    (family,) = parsed("--game", "pgg", "--factor", "1.3", "--endowment", "10", "5", "8", "--size-exponent", "0.6")
    drawn = [draw_game(np.random.default_rng(seed), 3, family=family) for seed in range(30)]
    assert all((g.endowment, g.r, g.b) == ((10.0, 5.0, 8.0), 1.3, 0.6) for g in drawn) and len({g.c for g in drawn}) > 10
    assert {split_of(g) for g in drawn} == {"train"}
    assert {g.c for g in held_out_grid(3, family)} == {0.77, 2.3, 3.83, 5.37, 6.9}
    with pytest.raises(GameError, match="3 types are given for 4 agents"):
        draw_game(np.random.default_rng(0), 4, family=family)


def test_parameters_that_leave_nothing_to_draw_in_a_split_are_refused():
    """One kind of alpha, delta and c given: a single instance, which is in one of the splits."""
    family = Family(kinds=("hub",), fixed=(("delta", 0.08), ("c", 0.25)))
    game = family.make(types_of_kind("hub", 4), 0.2, 1.0)
    missing = "held-out" if split_of(game) == "train" else "train"
    with pytest.raises(GameError, match=f"no {missing} instance"):
        draw_game(np.random.default_rng(0), 4, missing, family)


def test_pgg_instances():
    rng, family = np.random.default_rng(1), Family("pgg")
    drawn = [draw_game(rng, 6, ("train", "held-out")[k % 2], family) for k in range(200)]
    assert all(isinstance(g, PGG) and g.b == 0.5 and 1.1 <= g.r <= 1.4 for g in drawn)
    ratios = [g.c / np.mean(g.endowment) for g in drawn]
    assert 0.09 < min(ratios) < 0.2 and 0.8 < max(ratios) < 0.91
    kinds = {tuple(sorted(types_of_kind(kind, 6, "pgg"))) for kind in KINDS}
    assert {tuple(sorted(g.endowment)) for g in drawn} == kinds
    train, held_out = ({g.key for g in drawn[k::2]} for k in (0, 1))
    assert not train & held_out and {split_of(g) for g in drawn[::2]} == {"train"}


def test_families_take_turns_in_the_data():
    chosen = (Family(), Family("pgg", "GEE"))
    records = experts.simulate_many(6, "planner", 0, PromptStyle(), families=chosen)
    of_games = [next((r.instance["game"], r.instance["stages"]) for r in records if r.game == k) for k in range(6)]
    assert of_games == [("bcz", "GE"), ("pgg", "GEE")] * 3
    assert [sum(r.game == k for r in records) for k in range(6)] == [8, 12] * 3


def test_alpha_of_kind():
    assert KINDS == ("homogeneous", "linear", "half", "hub")
    assert types_of_kind("homogeneous", 3).tolist() == [1, 1, 1]
    assert types_of_kind("linear", 4).tolist() == [1, 1.67, 2.33, 3]
    assert types_of_kind("half", 4).tolist() == [3, 3, 1, 1]
    assert types_of_kind("half", 5).tolist() == [3, 3, 3, 1, 1]
    assert types_of_kind("hub", 4).tolist() == [3, 1, 1, 1]
    with pytest.raises(GameError, match="'ring'.*homogeneous, linear, half, hub"):
        types_of_kind("ring", 4)


def test_make_game_rounds_to_what_players_read():
    # delta = 0.25/3 = 0.08333 -> 0.083; mean alpha 2; c = 1.25 * 0.083 * 4 = 0.415.
    game = Family("bcz", "GEE", 2).make([1.0, 3.0, 1.0, 3.0], 0.25, 1.25)
    assert (game.alpha, game.delta, game.c, game.stages, game.rounds) == ((1.0, 3.0, 1.0, 3.0), 0.083, 0.415, "GEE", 2)
    rng = np.random.default_rng(60)
    for _ in range(50):
        N, p, g = int(rng.integers(4, 9)), rng.uniform(0.15, 0.33), rng.uniform(0.6, 2.2)
        alpha = types_of_kind(KINDS[rng.integers(4)], N)
        game = Family().make(alpha, p, g)
        for value in (game.delta, game.c):
            assert float(f"{value:.3f}") == value
        assert abs(game.delta * (N - 1) - p) <= 0.0005 * (N - 1) + 1e-12
        assert abs(game.c - g * game.delta * alpha.mean() ** 2) <= 0.0005 + 1e-12


@pytest.mark.parametrize("N", range(4, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_effort_cap_is_the_smallest_such_integer(kind, N):
    """In exact fractions: on the complete graph x_i = (alpha_i + 2 delta S)/(1 + 2 delta), S = sum alpha/(1 - 2p)."""
    alpha = types_of_kind(kind, N)
    exact = [Fraction(str(round(float(a), 2))) for a in alpha]
    for thousandths in range(1, math.ceil(360 / (N - 1))):
        delta = Fraction(thousandths, 1000)
        total = sum(exact) / (1 - 2 * delta * (N - 1))
        largest = (max(exact) + 2 * delta * total) / (1 + 2 * delta)
        assert effort_cap(alpha, float(delta)) == math.ceil(Fraction(3, 2) * largest), float(delta)


def test_effort_cap_does_not_depend_on_the_seats():
    rng = np.random.default_rng(61)
    for game in held_out_grid(6):
        assert {effort_cap(rng.permutation(game.alpha), game.delta) for _ in range(5)} == {game.cap}


def test_effort_cap_binds_nowhere():
    graphs = all_graphs(4)
    for game in held_out_grid(4)[::4]:
        for factor, solve in ((1, game.nash_efforts), (2, game.planner_efforts)):
            x = np.linalg.inv(np.eye(4) - factor * game.delta * graphs) @ np.array(game.alpha)
            assert x.max() < game.cap
            np.testing.assert_allclose([solve(G) for G in graphs], x, rtol=1e-10)


@pytest.mark.parametrize("N", range(4, 9))
def test_held_out_grid(N):
    grid = held_out_grid(N, Family("bcz", "GGE", 2))
    assert len(grid) == len({g.key for g in grid}) == 60
    assert {(g.N, g.stages, g.rounds) for g in grid} == {(N, "GGE", 2)}
    expected = {
        (tuple(sorted(types_of_kind(kind, N))), round(p / (N - 1), 3))
        for kind in KINDS
        for p in (0.2, 0.25, 0.3)
    }
    seen = [(tuple(sorted(g.alpha)), g.delta) for g in grid]
    assert set(seen) == expected and all(seen.count(cell) == 5 for cell in expected)
    ratios = sorted({round(g.c / (g.delta * np.mean(g.alpha) ** 2) * 20) / 20 for g in grid})
    assert ratios == [0.75, 1.0, 1.25, 1.5, 2.0]
    assert sum(list(g.alpha) != sorted(g.alpha) for g in grid) > 30  # the seat order is random
    held_out_grid.cache_clear()
    again = held_out_grid(N, Family("bcz", "GGE", 2))
    assert again == grid and again is not grid
    # Stages and rounds are settings of play: the same 60 instances in the same seats.
    assert [(g.alpha, g.delta, g.c) for g in held_out_grid(N)] == [(g.alpha, g.delta, g.c) for g in grid]


def test_splits_never_share_an_instance():
    rng = np.random.default_rng(62)
    train = [draw_game(rng, 4, "train") for _ in range(1500)]
    held_out = [draw_game(rng, 4, "held-out") for _ in range(150)]

    def keys(drawn):
        return {(tuple(sorted(g.alpha)), g.delta, g.c) for g in drawn}

    grid = keys(held_out_grid(4))
    assert len(keys(train)) < 1490  # draws do repeat instances, so an overlap could show
    assert not keys(train) & keys(held_out)
    assert not keys(train) & grid
    assert all(split_of(g) == "held-out" for g in held_out_grid(4))
    for game in (*train[:100], *held_out[:100]):
        seats = rng.permutation(game.N)
        moved = BCZ(tuple(game.alpha[s] for s in seats), game.delta, game.c, game.cap + 1, "GEE", 3)
        assert moved.key == game.key and split_of(moved) == split_of(game)
    assert {split_of(g) for g in train} == {"train"} and {split_of(g) for g in held_out} == {"held-out"}


def test_a_tenth_of_all_instances_is_held_out():
    rng = np.random.default_rng(63)
    drawn = [
        Family().make(types_of_kind("linear", 6), rng.uniform(0.15, 0.33), rng.uniform(0.6, 2.2))
        for _ in range(2000)
    ]
    unique = {g.key: g for g in drawn}.values()
    share = np.mean([split_of(g) == "held-out" for g in unique])
    assert len(unique) > 1000 and 0.07 < share < 0.13  # 3 standard errors of a tenth are 0.028 at 1000


def test_the_split_is_the_same_in_every_process():
    """Python's own hash of a string changes from process to process; the split must not."""
    code = (
        "import instances, numpy as np; rng = np.random.default_rng(5)\n"
        "drawn = [instances.Family().make(instances.types_of_kind('half', 5), p, 1.1) for p in rng.uniform(.15, .33, 80)]\n"
        "print([instances.split_of(game) for game in drawn])"
    )
    folder = Path(instances.__file__).parent
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    assert "'train'" in (answer := answers.pop()) and "'held-out'" in answer


@pytest.mark.parametrize("N", [4, 8])
def test_draws_keep_their_ranges(N):
    rng = np.random.default_rng(64)
    drawn = [draw_game(rng, N, family=Family("bcz", "GEE", 3)) for _ in range(400)]
    p = np.array([g.delta * (N - 1) for g in drawn])
    g = np.array([g.c / (g.delta * np.mean(g.alpha) ** 2) for g in drawn])
    slack_p = 0.0005 * (N - 1)
    slack_g = np.array([0.0005 / (g.delta * np.mean(g.alpha) ** 2) for g in drawn])
    assert 0.15 - slack_p <= p.min() < 0.16 and 0.32 < p.max() <= 0.33 + slack_p
    assert (g >= 0.6 - slack_g).all() and g.min() < 0.65 and (g <= 2.2 + slack_g).all() and g.max() > 2.15
    kinds = [tuple(sorted(g.alpha)) for g in drawn]
    for kind in KINDS:
        assert 60 <= kinds.count(tuple(sorted(types_of_kind(kind, N)))) <= 140
    assert {(g.stages, g.rounds) for g in drawn} == {("GEE", 3)}
    hubs = [draw_game(rng, N, family=Family(kinds=("hub",))) for _ in range(60)]
    assert {sorted(g.alpha)[-2] for g in hubs} == {1.0}
    assert {g.alpha.index(3.0) for g in hubs} == set(range(N))  # every seat gets to be the hub

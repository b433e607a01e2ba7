"""The flags that name games, and the families of instances that they make."""

import argparse

import numpy as np
import pytest

import experts
from bcz import BCZ, effort_cap
from games import GameError
from instances import KINDS, Family, add_game_arguments, draw_game, families, held_out_grid, split_of, types_of_kind
from pgg import PGG
from prompts import PromptStyle
from runs import InputError


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

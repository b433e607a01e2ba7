"""Fields of dataclasses as flags."""

import argparse
from dataclasses import dataclass

import pytest

from run.flags import add_flags, flag, from_flags
from run.values import number_or_range, positive_int


@dataclass(frozen=True)
class Sizes:
    """How large things are."""

    title = "sizes"
    area: int  # no flag
    names: tuple[str, ...] = flag("--called NAME ...", ("a",), "names")
    width: int = flag("--box-width", 3, "width", positive_int)
    mode: str = flag("--mode", "x", "mode", choices=("x", "y"))


@dataclass(frozen=True)
class More(Sizes):
    """Further sizes."""

    title = "more"
    agents: tuple[int, int] = flag("--agents N|A-B", (4, 4), "agents", number_or_range(2, 12))


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_flags(parser, Sizes, More)
    return parser


def test_a_field_is_a_flag_with_the_same_default(parser):
    assert from_flags(More, parser.parse_args([]), area=1) == More(1)
    args = parser.parse_args("--called b c --box-width 5 --mode y --agents 2-3".split())
    assert from_flags(More, args, area=1) == More(1, ("b", "c"), 5, "y", (2, 3))
    assert from_flags(Sizes, args, area=1, width=7) == Sizes(1, ("b", "c"), 7, "y")


def test_each_class_has_a_group_of_its_own_flags(parser):
    groups = {g.title: (g.description, [a.dest for a in g._group_actions]) for g in parser._action_groups}
    assert groups["sizes"] == ("How large things are.", ["called", "box_width", "mode"])
    assert groups["more"] == ("Further sizes.", ["agents"])
    assert {"--called NAME [NAME ...]", "--agents N|A-B"} <= {
        line.strip().split("  ")[0] for line in parser.format_help().splitlines()
    }


@pytest.mark.parametrize("text", ["1", "13", "3-2", "2-13", "x", "2-", ""])
def test_a_range_rises_between_its_bounds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="^'" + text):
        number_or_range(2, 12)(text)

"""The table of what each game rewards: its numbers by hand and by theorem, and the command."""

import json

import numpy as np
import pytest

import games
from experts import make_expert
from tools import survey
from world.bcz import BCZ
from world.pgg import PGG


def self_play(game, expert):
    return survey.self_play([game], make_expert(expert), 0)[0]


def test_self_play_by_hand():
    """N = 2, alpha 1, delta 0.2, c 0.1: linked at Nash x = 1.25, each earns 1.25^2/2 - 0.1, alone 0.5. The
    planner's efforts are 1 / 0.6; the best reply to them is 1 + 0.2 / 0.6, the worst effort the cap 3."""
    game = BCZ((1.0, 1.0), 0.2, 0.1, 3.0)
    first_best = 1 / 0.6 - 0.2
    u2, u3 = self_play(game, "second-best")
    assert (u2, u3) == pytest.approx((1, (1.25**2 - 0.2) / first_best), abs=1e-4)
    u2, u3 = self_play(game, "never-link")
    assert (u2, u3) == pytest.approx((1, 1 / first_best), abs=1e-4)  # no row alone forms a link

    def payoff(x, other=1.67):
        return x - x * x / 2 + 0.2 * x * other

    u2, u3 = self_play(game, "planner")
    effort = 1 - (payoff(1.334) - payoff(1.67)) / (payoff(1.334) - payoff(3))
    assert (u2, u3) == pytest.approx(((1 + effort) / 2, 1), abs=1e-4)


def test_planners_of_the_public_goods_game_are_exploited():
    """c 1, r 1.25, b 0.5, two agents: linking and giving is the first best, 17.68 - 1 each instead of 10."""
    game = PGG((10.0, 10.0), 1.25, 0.5, 1.0)
    u2, u3 = self_play(game, "planner")
    assert (u2, u3) == pytest.approx((0, 1))  # not linking, and giving nothing, would be best for each
    u2, u3 = self_play(game, "nash")
    assert (u2, u3) == pytest.approx((1, 10 / (12.5 * 2**0.5 - 1)))


def test_the_command_prints_every_cell_and_writes_every_game(tmp_path, capsys):
    out = tmp_path / "survey.json"
    experts_of = ["--expert", "planner", "noisy:nash:0.5"]
    survey.main(["--agents", "3", "--stages", "GE", "GGE", *experts_of, "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 2 * 2
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 16 and {len(c["U2_U3"]) for c in cells} == {15, 45}
    for line, cell in zip(lines[1:], cells[::2], strict=True):
        u2, u3 = np.mean(cell["U2_U3"], 0)
        assert cell["expert"] == "planner" and f"{u2:.2f} / {u3:.2f}" in line
        assert u3 == pytest.approx(1, abs=1e-4)
    noisy = np.array([g for c in cells[1::2] for g in c["U2_U3"]])
    assert noisy[:, 1].mean() < 0.9 and noisy[:, 1].max() <= 1 + 1e-9
    assert 0 <= noisy[:, 0].min() < noisy[:, 0].max() <= 1
    with pytest.raises(SystemExit):
        survey.main(["--json", str(out)])


def test_a_game_that_is_registered_later_is_surveyed_too(capsys, monkeypatch):
    class Third(BCZ):
        name = "a-game-with-a-long-name"

    monkeypatch.setitem(games.GAMES, Third.name, Third)
    flags = ["--agents", "3", "--stages", "GE", "--expert", "nash"]
    survey.main(["--game", Third.name, "bcz", *flags])
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["A-GAME-WITH-A-LONG-NAME-GE"] * 2 + ["BCZ-GE"] * 2
    assert {line.index(" / ") for line in lines} == {head.index("nash") + 4}  # columns stand below each other
    assert [line.split()[1:] for line in lines[:2]] == [line.split()[1:] for line in lines[2:]]
    survey.main(flags)  # all that are known
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(games.GAMES)


@pytest.mark.parametrize("flags", ["--stages GX", "--game chess", "--agents 13", "--expert nobody"])
def test_bad_flags_are_one_line(flags, refused):
    refused(survey.main, flags.split())

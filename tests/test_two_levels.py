"""The tabular policy of docs/two_levels.py: weights of the levels as votes and as prices."""

import numpy as np
import pytest

from docs import two_levels
from world.draws import Family, held_out_games

GAMES = held_out_games([Family("bcz", types=(1.0, 1.0, 1.0, 1.0))], 4, 1)  # cheap links among equals


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(two_levels, "STEPS", 25)


def k_of(weights, series):
    return two_levels.trained(GAMES, weights, series, 0)["k"]


def test_std_makes_votes_of_the_weights_and_mean_prices():
    """k is 0 at what is best for the agents themselves, about 1 at what is best for all."""
    own, common = k_of((1.0, 0.0), "std"), k_of((0.0, 1.0), "std")
    assert own < 0.4 and common > 0.8
    minority, price = (k_of((0.2, 0.8), series) for series in ("std", "mean"))
    assert abs(minority - common) < 0.15 and own < price < minority


def test_experts_are_measured_as_the_metrics_define():
    play = two_levels.played_by_expert("second-best", GAMES[0])
    nash = GAMES[0].nash_efforts(play.second.links)
    assert play.efforts_N == pytest.approx(nash, abs=0.01) and play.U2 == pytest.approx(1, abs=1e-3)
    W = GAMES[0].welfare(play.second.links, np.array(play.efforts_N))
    assert play.U3 == pytest.approx(W / GAMES[0].efficient_graph("planner")[1])

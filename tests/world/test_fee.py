"""The fee of a proposal, and what a choice is worth to all, against formulas written anew and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from decisions import EFFORTS, LINKS, own_rows
from games import GameError, State, complete_graph, form_links
from prompts import PromptStyle, messages
from tools.check_game import random_graph
from world.draws import Family, draw_game
from world.families import families_of


def drawn(name, fee, seed=0, N=4):
    return draw_game(np.random.default_rng(seed), N, family=Family(name, rounds=2, fee=fee))


def random_proposals(rng, N):
    return rng.integers(0, 2, (N, N)) * complete_graph(N)


@pytest.mark.parametrize("name", ("bcz", "pgg"))
def test_every_proposal_costs_its_fee(name):
    rng = np.random.default_rng(1)
    for seed in range(20):
        free, game = drawn(name, 0.0, seed), drawn(name, 0.3, seed)
        assert game == replace(free, fee=0.3) and game.key == free.key  # the same draw, in the same split
        P, x = random_proposals(rng, 4), rng.uniform(0, game.caps)
        expected = free.payoffs(form_links(P), x) - 0.3 * game.c * P.sum(1)
        np.testing.assert_allclose(game.round_payoffs(P, x), expected, atol=1e-12)
        (G, efforts, paid), *_ = State(game).step(P).step(x).round_results()
        np.testing.assert_allclose(paid, expected, atol=1e-12)
        assert (G == form_links(P)).all() and (efforts == x).all()
        assert game.welfare(G, x) == pytest.approx(
            free.welfare(G, x) - 0.3 * game.c * G.sum()
        )  # both ends pay


@pytest.mark.parametrize("name", ("bcz", "pgg"))
@pytest.mark.parametrize("fee", (0.0, 0.2))
def test_the_common_good_of_a_row_against_all_rows(name, fee):
    rng = np.random.default_rng(2)
    for seed in range(10):
        game, P = drawn(name, fee, seed), random_proposals(rng, 4)

        def W(row, game=game, P=P):
            other = np.array([row, *P[1:]])
            x = game.solve_efforts(game.scored_at, form_links(other))
            return game.round_payoffs(other, x).sum()

        values = [W(row) for row in own_rows(4, 0)]
        span = max(values) - min(values)
        expected = 1.0 if span < 1e-12 else (W(P[0]) - min(values)) / span
        assert LINKS.stakes(State(game), 0, P, common=True).share == pytest.approx(expected)


@pytest.mark.parametrize("name", ("bcz", "pgg"))
def test_the_common_good_of_an_effort_against_a_grid(name):
    rng = np.random.default_rng(3)
    for seed in range(10):
        game = drawn(name, 0.0, seed)
        links, x = random_graph(rng, 4, 0.7), np.minimum(rng.uniform(0, 4, 4), game.caps)
        state, seat = State(game, (links,)), int(rng.integers(4))

        def W(own, game=game, links=links, x=x, seat=seat):
            return game.welfare(links, np.where(np.arange(4) == seat, own, x))

        grid = [W(own) for own in np.linspace(0, game.caps[seat], 4001)]
        best = W(game.planner_response(links, x)[seat])
        assert max(grid) <= best + 1e-9 and best == pytest.approx(max(grid), abs=1e-4)
        share = EFFORTS.stakes(state, seat, x, common=True).share
        assert share == pytest.approx(
            (W(x[seat]) - min(grid)) / (best - min(grid)) if best > min(grid) else 1
        )


def test_the_fee_is_read_and_so_is_who_chose_the_agent():
    game, style = drawn("bcz", 0.05), PromptStyle()
    P = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]])
    system, _, _, question = messages(State(game).step(P), 0, ["x"], style)
    assert "every choice costs 0.05 c, answered or not" in system["content"]
    assert question["content"].startswith("You were chosen by [0, 0, 1, 1]. Round 1 efforts. Links: 1-3.")
    system, _, _, question = messages(State(replace(game, fee=0.0, rounds=1)).step(P), 0, ["x"], style)
    assert "every choice" not in system["content"] and question["content"].startswith("Round 1 efforts.")


def test_the_fee_of_families_and_bad_fees():
    bcz, pgg = families_of(["bcz", "pgg"], ["GE"], 1, fixed={"fee": 0.1, "b": 0.6})
    assert (bcz.fee, pgg.fee, bcz.fixed, pgg.fixed) == (0.1, 0.1, (), (("b", 0.6),))
    for name, fee in itertools.product(("bcz", "pgg"), (-0.1, float("nan"))):
        with pytest.raises(GameError):
            replace(drawn(name, 0.0), fee=fee)

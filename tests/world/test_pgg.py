"""The public goods game: its exact solutions against brute force over all graphs, and values by hand."""

import itertools
import math
from dataclasses import replace

import networkx
import numpy as np
import pytest

from decisions import LINKS
from games import GameError, State, complete_graph
from tools.check_game import check_efficient_graph, check_nash, check_payoffs, check_planner, check_replies
from world import pgg
from world.draws import Family, held_out_grid
from world.pgg import PGG, groups, isomorphism_classes, partitions


def cliques_of(links_NN):
    return [C for C in networkx.find_cliques(networkx.from_numpy_array(links_NN)) if len(C) > 1]


def loop_payoffs(game, links_NN, x):
    """The equation at the top of world/pgg.py, member by member."""
    cliques = cliques_of(links_NN)
    k = [sum(i in C for C in cliques) for i in range(game.N)]
    pi = [game.endowment[i] - x[i] - game.c * sum(links_NN[i]) for i in range(game.N)]
    for C in cliques:
        pot = sum(x[j] / k[j] for j in C) * game.r * len(C) ** game.b
        for i in C:
            pi[i] += pot / len(C)
    return np.array(pi)


def random_pgg(rng, N):
    e = rng.uniform(2, 20, N).round(1) if rng.random() < 0.7 else np.full(N, 10.0)
    b = float(rng.choice([0, 0.2, 0.4, 0.5, 0.7, 1, 1.3]))
    return PGG(tuple(e.tolist()), round(rng.uniform(0.7, 2.5), 2), b, round(rng.uniform(0, 9), 1))


def test_payoffs_are_those_of_the_equation():
    check_payoffs(random_pgg, loop_payoffs)


def test_efforts_are_the_best():
    check_replies(random_pgg)
    for check in (check_nash, check_planner):
        assert {x.any() for _, x in check(random_pgg)} == {True, False}


def test_efforts_are_bounded_by_the_own_endowment():
    state = State(PGG((10.0, 5.0), 1.25, 0.5, 1.0)).step(complete_graph(2))
    assert state.step([10.0, 5.0]).done
    with pytest.raises(ValueError, match="cap of the seat"):
        state.step([5.0, 6.0])


@pytest.mark.parametrize("solution", ["nash", "planner"])
def test_the_efficient_graph_is_the_best_of_all(solution):
    for fee in (0.0, 0.4):
        shares = check_efficient_graph(lambda *how, fee=fee: replace(random_pgg(*how), fee=fee), solution)
        assert sum(share > 0 for share in shares) >= 5


def test_partitions_are_enough_from_exponent_one_half(monkeypatch):
    rng, sizes = np.random.default_rng(5), set()
    efficient_graph = PGG.efficient_graph.__wrapped__  # solved anew each time
    for _ in range(60):
        game = replace(random_pgg(rng, 6), b=float(rng.choice([0.5, 0.55, 0.7, 1.0])))
        G, W = efficient_graph(game, "planner")
        with monkeypatch.context() as patched:
            patched.setattr(pgg, "partitions", isomorphism_classes)
            assert efficient_graph(game, "planner")[1] == pytest.approx(W, abs=1e-9)
        sizes.add(tuple(sorted(map(len, groups(G)))))
    assert len(sizes) >= 4  # several kinds of optima were compared


@pytest.mark.parametrize("N, count", list(enumerate([1, 2, 4, 11, 34, 156, 1044, 12346], 1)))
def test_isomorphism_classes_are_as_many_as_there_are(N, count):
    """OEIS A000088, and every one another: networkx tells them apart."""
    classes = isomorphism_classes(N)
    assert len(classes) == count
    if N <= 5:
        graphs = [networkx.from_numpy_array(G) for G in classes]
        assert not any(networkx.is_isomorphic(a, b) for a, b in itertools.combinations(graphs, 2))


def test_too_many_agents_for_the_enumeration_is_said():
    with pytest.raises(GameError, match="at most 8 agents"):
        PGG((10.0,) * 9, 1.25, 0.2, 1.0).efficient_graph("planner")
    assert len(partitions(9)) == 256 and PGG((10.0,) * 9, 1.25, 0.5, 1.0).efficient_graph("planner")[1] > 90


BAD = [("endowment", (10.0, 0.0)), ("r", 0.0), ("r", 1e300), ("r", np.nan), ("b", -0.1), ("b", 1e3)]


@pytest.mark.parametrize("name, value", [*BAD, ("c", -1.0)])
def test_bad_games_are_refused(name, value):
    with pytest.raises(GameError):
        PGG(**dict(endowment=(10.0, 5.0), r=1.25, b=0.5, c=1.0) | {name: value})


def test_the_grid_has_sixty_games_and_several_kinds_of_optima():
    grid = held_out_grid(6, Family("pgg"))
    assert len(grid) == 60 == len({g.key for g in grid})
    optima = [tuple(sorted(map(len, groups(g.efficient_graph("planner")[0])))) for g in grid]
    assert len(set(optima)) >= 5 and max(optima.count(o) for o in optima) <= 30


def test_what_links_are_worth_by_hand():
    """At planner efforts: all give their 10. With everybody, agent 0 gets 1.25 * 4^-0.5 * 40 - 3 = 22; with
    agent 1 alone, who gives half to another group, 1.25 * 2^-0.5 * (10 + 5) - 1; with nobody it keeps 10."""
    all_NN = complete_graph(4)
    state = State(PGG((10.0,) * 4, 1.25, 0.5, 1.0))
    one = 1.25 / math.sqrt(2) * 15 - 1
    for row, own in (([0, 1, 1, 1], 22.0), ([0, 1, 0, 0], one), ([0, 0, 0, 0], 10.0)):
        stakes = LINKS.stakes(state, 0, np.vstack([row, all_NN[1:]]))
        assert stakes == pytest.approx((own, 22.0, 10.0))
        assert LINKS.efficiency(state, 0, np.vstack([row, all_NN[1:]])) == pytest.approx((own - 10) / 12)

"""BCZ: its exact solutions against brute force, closed forms and values worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from brute import bcz_payoffs, star_graph

from experts import nash_graph
from games import GameError, complete_graph
from tools.check_game import (
    all_graphs,
    check_efficient_graph,
    check_nash,
    check_payoffs,
    check_planner,
    check_replies,
    random_graph,
)
from world.bcz import BCZ, threshold_graphs
from world.efforts import effort_fixed_point

NO_CAP = 1e6  # far above every uncapped solution used here


def efforts_of(game, graphs, efforts):
    """Uncapped Nash or planner efforts on one graph or on many, by the plain inverse."""
    factor = {"nash": 1, "planner": 2}[efforts]
    return np.linalg.inv(np.eye(game.N) - factor * game.delta * graphs) @ np.array(game.alpha)


def random_game(rng, N, p=(0.1, 0.4), g=(0.4, 2.5)):
    alpha = rng.uniform(0.5, 3, N).round(2) if rng.random() < 0.5 else rng.choice([1.0, 1.5, 2.0, 3.0], N)
    delta = rng.uniform(*p) / (N - 1)
    return BCZ(tuple(alpha.tolist()), delta, rng.uniform(*g) * delta * alpha.mean() ** 2, NO_CAP)


def test_payoffs_are_those_of_the_equation():
    check_payoffs(random_game, bcz_payoffs)


@pytest.mark.parametrize("p, cap", [((0.1, 0.45), NO_CAP), ((0.4, 3.0), 4.0)])
def test_efforts_are_the_best(p, cap):
    """Also where a cap binds, and without it nothing would be finite."""

    def make(rng, N):
        return replace(random_game(rng, N, p), cap=cap)

    check_replies(make)
    check_nash(make)
    assert (sum((planner == cap).any() for _, planner in check_planner(make)) > 5) == (cap == 4.0)


# A graph, its spectral radius (closed form), and a coupling above 1 / rho.
ONE_LINK = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
BEYOND = [(complete_graph(4), 3.0, 0.5), (star_graph(5), 2.0, 0.9), (ONE_LINK, 1.0, 3.0)]


@pytest.mark.parametrize("G, rho, coupling", BEYOND, ids=["complete", "star", "one link"])
def test_efforts_without_a_solution_are_refused(G, rho, coupling):
    alpha = np.arange(1.0, len(G) + 1)
    assert np.linalg.eigvalsh(G).max() == pytest.approx(rho)
    # The plain inverse exists and is finite, and its efforts are negative: numbers without meaning.
    x = np.linalg.inv(np.eye(len(G)) - coupling * G) @ alpha
    assert np.isfinite(x).all() and x.min() < 0
    for bad in (coupling, 1.0 / rho + 1e-9, 1.0 / rho):
        with pytest.raises(GameError, match="must be below 1"):
            effort_fixed_point(alpha, bad, G)
    below = (1 - 1e-6) / rho  # the row sum bound, 1 / (N-1), would refuse it in the last two
    x = effort_fixed_point(alpha, below, G)
    assert x.min() > 0 and x.max() > 1e5
    np.testing.assert_allclose(x, alpha + below * G @ x, rtol=1e-9)


@pytest.mark.parametrize("N", [2, 5, 8])
def test_capped_efforts_are_the_only_fixed_point(N):
    rng, partly = np.random.default_rng(30 + N), 0
    for _ in range(25):
        G, alpha = random_graph(rng, N), rng.uniform(0.1, 3, N)
        coupling, cap = 10 ** rng.uniform(-1, 1), rng.uniform(0.5, 12)
        x = effort_fixed_point(alpha, coupling, G, cap)
        np.testing.assert_allclose(x, np.minimum(cap, alpha + coupling * G @ x), rtol=1e-12)
        for iterated in (np.zeros(N), np.full(N, cap)):  # from below and from above
            for _ in range(3000):
                iterated = np.minimum(cap, alpha + coupling * (G @ iterated))
            np.testing.assert_allclose(x, iterated, atol=1e-9)
        partly += 0 < (x == cap).sum() < N
    assert partly >= (1 if N == 2 else 4)  # some at the cap and some below it
    if N > 2:  # a tiny alpha still grows to the cap
        assert effort_fixed_point([1e-11] * N, 1.0, complete_graph(N), 5.0).tolist() == [5.0] * N


def test_capped_efforts_where_the_matrix_is_singular_up_to_rounding():
    """With coupling * rho(G) = 1 the factorisation may succeed by rounding; its solution is noise."""
    rng, tried = np.random.default_rng(31), 0
    for _ in range(300):
        G = random_graph(rng, 5)
        rho = np.linalg.eigvalsh(G).max()
        if rho > 0.5:
            x = effort_fixed_point(np.ones(5), 1 / rho, G, 10.0)
            assert (x >= 1).all() and (x <= 10).all()
            np.testing.assert_allclose(x, np.minimum(10, 1 + G @ x / rho), rtol=1e-9)
            tried += 1
    assert tried > 250


@pytest.mark.parametrize("solution", ["nash", "planner"])
def test_the_efficient_graph_is_the_best_of_all(solution):
    shares = check_efficient_graph(lambda *how: replace(random_game(*how), fee=0.1), solution, 120)
    shares += check_efficient_graph(random_game, solution, 120)
    assert sum(0 < share < 1 for share in shares) >= 10  # else only the empty and the complete one


def test_twelve_agents_are_feasible():
    G, W = BCZ((3.0,) + (1.0,) * 11, 0.02, 0.05, NO_CAP).efficient_graph()
    # Star by hand: h = 3 + 11 delta l, l = 1 + delta h; Nash welfare x^2/2 - 2 c L.
    h = (3 + 11 * 0.02) / (1 - 11 * 0.02**2)
    assert (G == star_graph(12)).all()
    assert W == pytest.approx(h**2 / 2 + 11 * (1 + 0.02 * h) ** 2 / 2 - 2 * 0.05 * 11)


def test_threshold_graphs_are_complete():
    """Among all 1024 graphs on 5 nodes: those with nested neighbourhoods, up to relabelling."""
    degrees, pairs = set(), list(itertools.combinations(range(5), 2))
    for G in all_graphs(5):
        near = [set(np.flatnonzero(row).tolist()) for row in G]
        if all(near[i] - {j} <= near[j] or near[j] - {i} <= near[i] for i, j in pairs):
            degrees.add(tuple(sorted(G.sum(1).tolist(), reverse=True)))
    graphs = threshold_graphs(5)
    assert len(graphs) == 16 and (np.diff(graphs.sum(2), axis=1) <= 0).all()
    assert degrees == {tuple(G.sum(1).tolist()) for G in graphs}  # no two are isomorphic


def test_nash_graph_is_the_greatest_equilibrium():
    rng, graphs = np.random.default_rng(50), all_graphs(4)
    several = interior = 0
    for _ in range(150):
        game = random_game(rng, 4, p=(0.1, 0.9))
        greatest, x = nash_graph(game), efforts_of(game, graphs, "nash")
        wanted = game.delta * x[:, :, None] * x[:, None, :] >= game.c
        stable = graphs[((graphs == 1) == wanted)[:, ~np.eye(4, dtype=bool)].all(1)]
        assert (stable == greatest).all((1, 2)).sum() == 1
        assert (stable <= greatest).all()
        several += len(stable) > 1
        interior += 0 < greatest.sum() < 12
    assert several > 10 and interior > 15

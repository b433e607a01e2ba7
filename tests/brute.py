"""What tests of games compare with: graphs, and payoffs written from the formula, not the game's file. The
checks are the same for every game; make(rng, N) draws an instance."""

import itertools

import numpy as np


def all_graphs(N):
    """Every labelled graph on N nodes, (2^(N(N-1)/2), N, N)."""
    pairs = list(itertools.combinations(range(N), 2))
    graphs = np.zeros((2 ** len(pairs), N, N), int)
    for k, (i, j) in enumerate(pairs):
        graphs[:, i, j] = graphs[:, j, i] = np.arange(len(graphs)) >> k & 1
    return graphs


def random_graph(rng, N, density=0.5):
    upper = np.triu(rng.random((N, N)) < density, 1).astype(int)
    return upper + upper.T


def star_graph(N):
    G = np.zeros((N, N), int)
    G[0, 1:] = G[1:, 0] = 1
    return G


def bcz_payoffs(game, G, x):
    """The equation at the top of world/bcz.py, term by term."""
    pi = []
    for i in range(game.N):
        links = [game.delta * x[i] * x[j] - game.c for j in range(game.N) if G[i][j]]
        pi.append(game.alpha[i] * x[i] - x[i] ** 2 / 2 + sum(links))
    return np.array(pi)


def check_payoffs(make, payoffs):
    """They are those of the equation, and the gains of a link their change, whether it is there or not."""
    rng = np.random.default_rng(0)
    for k in range(100):
        N = 2 + k % 6
        game, links_NN = make(rng, N), random_graph(rng, N, 0.6)
        kept, x = links_NN.copy(), rng.uniform(0, np.minimum(game.caps, 9))
        np.testing.assert_allclose(game.payoffs(links_NN, x), payoffs(game, links_NN, x), atol=1e-9)
        i, j = pair = rng.permutation(N)[:2]
        with_it, without = links_NN.copy(), links_NN.copy()
        with_it[i, j] = with_it[j, i] = 1
        without[i, j] = without[j, i] = 0
        change = (payoffs(game, with_it, x) - payoffs(game, without, x))[pair]
        np.testing.assert_allclose(game.link_gains(links_NN, x)[pair, pair[::-1]], change, atol=1e-9)
        assert (links_NN == kept).all()


def check_efforts(make):
    """No reply is better than the best one, for the agent or for all. Nobody gains alone at Nash efforts. No
    efforts near those of the planner, and no coarse ones, have a higher welfare. Returns (game, Nash,
    planner) of every draw."""
    rng, found = np.random.default_rng(1), []
    for k in range(40):
        N = 2 + k % 4
        game, links_NN = make(rng, N), random_graph(rng, N, 0.7)
        nash, planner = game.nash_efforts(links_NN), game.planner_efforts(links_NN)
        top = np.minimum(game.caps, 2 * planner.max() + 1)
        others = rng.uniform(0, top)
        social = game.planner_response(links_NN, others)
        for x, best in ((nash, nash), (others, game.best_response(links_NN, others)), (others, social)):
            for i in range(N):
                near = np.clip([best[i] - 1e-3, best[i] + 1e-3], 0, game.caps[i])
                tried = [np.r_[x[:i], e, x[i + 1 :]] for e in (best[i], *near, *np.linspace(0, top[i], 21))]
                pays = [game.payoffs(links_NN, efforts) for efforts in tried]
                values = [pay.sum() if best is social else pay[i] for pay in pays]
                assert values[0] >= max(values) - 1e-9
        near = [np.clip(planner + size * rng.normal(size=N), 0, game.caps) for size in (1e-2, 0.3, 3.0) * 30]
        coarse = itertools.product(*([0, cap / 2, cap] for cap in top))
        best = game.welfare(links_NN, planner)
        assert max(game.welfare(links_NN, np.array(x)) for x in (*near, *coarse)) <= best + 1e-9
        found.append((game, nash, planner))
    return found


def check_efficient_graph(make, solution, draws=40):
    """It is the best of all labelled graphs. Returns which share of the links it has, of every draw."""
    rng, shares = np.random.default_rng(2), []
    for k in range(draws):
        game = make(rng, 2 + k % 3)
        welfares = [game.welfare(G, game.solve_efforts(solution, G)) for G in all_graphs(game.N)]
        G, W = game.efficient_graph(solution)
        G[:] = 2  # the cached answer is not the array that was handed out
        G, _ = game.efficient_graph(solution)
        assert abs(W - max(welfares)) < 1e-9
        assert abs(game.welfare(G, game.solve_efforts(solution, G)) - W) < 1e-9
        assert (G == G.T).all() and set(G.flat) <= {0, 1} and not G.diagonal().any()
        shares.append(G.sum() / game.N / (game.N - 1))
    return shares

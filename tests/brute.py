"""What tests of games compare with: graphs, and payoffs written from the formula, not the game's file."""

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

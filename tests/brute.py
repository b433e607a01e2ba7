"""What tests of games compare with: a graph, and payoffs written from the formula, not the game's file."""

import numpy as np


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

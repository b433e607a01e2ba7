"""Solutions that are kept."""

from functools import lru_cache, wraps

import numpy as np

from games import Game


def solved_once(efficient_graph):
    """Decorator of a game's efficient_graph: every instance is solved once, and each caller gets a copy."""
    solve = lru_cache(maxsize=4096)(efficient_graph)

    @wraps(efficient_graph)
    def cached(game: Game, efforts: str = "nash") -> tuple[np.ndarray, float]:
        links_NN, W = solve(game, efforts)
        return links_NN.copy(), W

    cached.cache_clear = solve.cache_clear
    return cached

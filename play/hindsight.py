"""Looking back at a game: what every choice would have been worth, exactly, and all agents' actions as short
texts for files.
"""

from functools import lru_cache

import numpy as np

import games
from games import Game, State


@lru_cache(maxsize=2**16)
def _nash_payoffs(game: Game, links: bytes) -> np.ndarray:
    links_NN = np.frombuffer(links, dtype=int).reshape(game.N, game.N)
    return game.payoffs(links_NN, game.nash_efforts(links_NN))


def row_payoff(state: State, seat: int, proposals_NN: np.ndarray, row_N: np.ndarray) -> float:
    """What the seat earns with this row among the proposals, at the Nash efforts of the graph that forms."""
    proposals_NN = proposals_NN.copy()
    proposals_NN[seat] = row_N
    return _nash_payoffs(state.game, games.form_links(proposals_NN).tobytes())[seat]


def row_payoffs(state: State, seat: int, proposals_NN: np.ndarray) -> np.ndarray:
    """The same of all rows that the seat could have proposed, in the order of `games.own_rows`."""
    rows = games.own_rows(state.game.N, seat)
    return np.array([row_payoff(state, seat, proposals_NN, row_N) for row_N in rows])


def effort_payoff(state: State, seat: int, efforts_N: np.ndarray, effort: float) -> float:
    """What the seat earns with this effort among the efforts, on the graph that has formed."""
    efforts_N = efforts_N.copy()
    efforts_N[seat] = effort
    return state.game.payoffs(state.links, efforts_N)[seat]


# -------------------- in files


def tell_history(history: tuple[np.ndarray, ...]) -> list[str]:
    """A text for each stage: the rows of the proposals (`0110 1000 1000 0000`), or the efforts
    (`1.33 1.2 1.0 1.0`), which are read as the same numbers again."""
    return [
        " ".join(
            "".join(map(str, of_one)) if actions.ndim == 2 else str(of_one) for of_one in actions.tolist()
        )
        for actions in history
    ]


def read_history(game: Game, told: list[str]) -> State:
    """The state after these stages. Raises ValueError for actions that the game does not allow."""
    state = State(game)
    for text in told:
        graph = state.kind == "G"
        state = state.step(np.array([list(map(int, row)) if graph else float(row) for row in text.split()]))
    return state

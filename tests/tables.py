"""Players that say what they are told to, and a game whose numbers are known by hand.

TRIO: N = 3, alpha = 1, delta = 0.1, c = 0.05, cap 3. Its first best is the complete graph with
x = 1 / (1 - 0.4) = 5/3 and W* = 3 (5/3) / 2 - 2 * 0.05 * 3 = 2.2; nobody linking gives x = 1 and W = 1.5.
"""

from play.players import expert_player
from prompts import PromptStyle
from world.bcz import BCZ

STYLE = PromptStyle()
TRIO = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0)
TRIO_2 = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0, rounds=2)


def constant(text):
    return lambda asks: [text] * len(asks)


def expert(name, seed=0):
    return expert_player(name, STYLE, seed)


def by_seat(rows, effort):
    """A player with a row of links for each seat and one effort."""
    return lambda asks: [f"Decision: {rows[a.seat] if a.state.kind == 'G' else effort}" for a in asks]

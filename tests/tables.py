"""Decisions, players with fixed answers, and a game whose numbers are known by hand.

TRIO: N = 3, alpha = 1, delta = 0.1, c = 0.05, cap 3. Its first best is the complete graph with
x = 1 / (1 - 0.4) = 5/3 and W* = 3 (5/3) / 2 - 2 * 0.05 * 3 = 2.2; nobody linking gives x = 1 and W = 1.5.
"""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np

from decisions import EFFORTS, LINKS
from games import Decision
from play.cast import make_expert
from play.players import expert_player, play_tables
from prompts import PromptStyle, Reply
from rewards import Sample
from settings import Evaluation, Players, Settings
from world.bcz import BCZ
from world.draws import Family

STYLE = PromptStyle()
TRIO = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0)
TRIO_2 = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0, rounds=2)


def row(*entries):
    return Decision(LINKS, np.array(entries))


def effort(x):
    return Decision(EFFORTS, x)


def group_of(decisions):
    """One reply for each of these decisions."""
    return [Sample(Reply("", [7], [-1.0], True), decision) for decision in decisions]


def normalised(values):
    """One level of advantages of a group with these rewards."""
    return (np.array(values) - np.mean(values)) / (np.std(values) + 1e-4)


def constant(text):
    return lambda asks: [text] * len(asks)


def expert(name, seed=0):
    return expert_player(make_expert(name), STYLE, seed)


def play(games, player, seat, others, seed, **options):
    """The player in one seat, or in each game in the seats that the list names; an expert in the others."""
    seats = [(seat,)] * len(games) if isinstance(seat, int) else seat
    rest, pairs = expert_player(others, STYLE, seed), zip(games, seats, strict=True)
    tables = [[player if j in own else rest for j in range(game.N)] for game, own in pairs]
    return play_tables(games, tables, seats, others, seed, **options)


def by_seat(rows, effort):
    """A player with a row of links for each seat and one effort."""
    return lambda asks: [f"Decision: {rows[a.seat] if a.state.kind.letter == 'G' else effort}" for a in asks]


def evaluation_of(expert, games, seat=0, seed=0, families=(Family(),), agents=4):
    """The settings of an evaluation against this expert, without a model."""
    groups = dict.fromkeys(field.name for field in fields(Settings))
    groups |= {"players": Players(expert), "games": SimpleNamespace(families=families)}
    return Settings(**groups | {"evaluation": Evaluation(agents, games, seat, seed=seed)})

"""Experts: the players of the other seats and the teachers of the data.

An expert answers (state, seat, rng, past) with a Decision; `past` is what the agent answered in the stages
before, which only language models look at. Their names:

    second-best   the efficient graph at Nash efforts, then Nash efforts on what formed (the default). In
                  economics the second best is the highest welfare that is possible when agents still choose
                  their efforts for themselves; the first best is the planner's
    planner       the first best: the efficient graph at planner efforts, then planner efforts
    nash          from the complete graph, all links go that cost one end more than they earn it at Nash
                  efforts, and again, until all that are left pay; Nash efforts
    myopic        best response to the latest proposals, graph and efforts; where there are none yet, it
                  assumes that everybody consents to every link and plays effort alpha (PGG: the endowment)
    selfish       the row with the highest own payoff if all others chose everybody, at Nash efforts (in
                  PGG, where nobody gives then, at planner efforts); Nash efforts
    always-link / never-link   everybody / nobody, Nash efforts
    reciprocal    proposes to whoever proposed to it in the last stage of links, first to all; Nash efforts
    random        a fair coin for every link, a uniform effort

play/cast.py makes experts of these names, and mixes of several. [source] of the paper is GPT-o3 as the
expert, 126 games of 4 to 8 agents; the exact experts are a [choice]. To add one, write a rule for links and a
rule for efforts and put them into RULES. `python -m tools.expert_games` writes a data set.
"""

from functools import lru_cache

import numpy as np

import games
from decisions import EFFORTS, LINKS, own_rows, row_payoffs
from games import Decision, Game, State

# -------------------- rules of exact experts, solved for all seats at once


@lru_cache(maxsize=4096)
def _selfish_row(game: Game, seat: int) -> np.ndarray:
    payoffs = row_payoffs(State(game), seat, games.complete_graph(game.N))
    return own_rows(game.N, seat)[payoffs.argmax()]


def _myopic_proposals(state: State) -> np.ndarray:
    """Link wherever the other end consented last time and the link pays at the last graph and efforts."""
    game, proposals_NN = state.game, state.last("G")
    x = np.array(game.types) if state.efforts is None else state.efforts
    links_NN = games.complete_graph(game.N) if proposals_NN is None else state.links
    consent_NN = links_NN if proposals_NN is None else proposals_NN.T
    return consent_NN * (game.link_gains(links_NN, x) >= 0)


def _myopic_efforts(state: State) -> np.ndarray:
    x = np.array(state.game.types) if state.efforts is None else state.efforts
    return state.game.best_response(state.links, x)


def _reciprocal_proposals(state: State) -> np.ndarray:
    proposals_NN = state.last("G")
    return games.complete_graph(state.game.N) if proposals_NN is None else proposals_NN.T


def nash_graph(game: Game) -> np.ndarray:
    """Starts from the complete graph and repeats "keep a link iff it pays both ends at the graph's Nash
    efforts". In the end nobody gains by dropping a link at these efforts (with a new effort some do). In BCZ
    this is the greatest such graph, because a dropped link lowers efforts, which drops more."""
    links_NN = games.complete_graph(game.N)
    while True:
        wanted_NN = game.link_gains(links_NN, game.nash_efforts(links_NN)) >= 0
        remaining_NN = links_NN * (wanted_NN & wanted_NN.T)
        if (remaining_NN == links_NN).all():
            return links_NN
        links_NN = remaining_NN


def _nash(state: State) -> np.ndarray:
    return state.game.nash_efforts(state.links)


# name -> (state -> proposals (N, N), state -> efforts (N,))
RULES = {
    "second-best": (lambda s: s.game.efficient_graph("nash")[0], _nash),
    "planner": (lambda s: s.game.efficient_graph("planner")[0], lambda s: s.game.planner_efforts(s.links)),
    "nash": (lambda s: nash_graph(s.game), _nash),
    "myopic": (_myopic_proposals, _myopic_efforts),
    "selfish": (lambda s: np.array([_selfish_row(s.game, i) for i in range(s.game.N)]), _nash),
    "always-link": (lambda s: games.complete_graph(s.game.N), _nash),
    "never-link": (lambda s: games.empty_graph(s.game.N), _nash),
    "reciprocal": (_reciprocal_proposals, _nash),
}


# -------------------- experts


class Expert:
    """A player. A subclass defines `__call__` or `decide_all`; each calls the other by default. `language`:
    it is a language model, whose answers take time and may cost money."""

    name: str
    language = False

    def __call__(self, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
        return self.decide_all([(state, seat, rng, past)])[0]

    def decide_all(self, calls: list[tuple]) -> list[Decision]:
        """The decisions of several calls (state, seat, rng, past), in order. A language model answers many
        questions in the time of one."""
        return [self(*call) for call in calls]

    def stand_in(self) -> "Expert":
        """An exact expert that draws as many random numbers, for games that are only prepared."""
        return self


class Exact(Expert):
    """Plays its rule, and believes that everybody else plays it too, which is why all seats are solved."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
        propose, exert = RULES[self.name]
        rule = {LINKS: propose, EFFORTS: exert}.get(state.kind)
        actions = rule(state) if rule else state.kind.expert_actions(self.name, state)
        return state.kind.expert_decision(actions, state.game, seat)


class Random(Expert):
    """Draws its decisions and its beliefs (Kind.random)."""

    name = "random"

    def __call__(self, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
        return state.kind.random(state.game, seat, rng)

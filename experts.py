"""Experts: the players of the other seats and the teachers of the data.

An expert is a function (state, seat, rng, past) -> Decision; `past` is what the agent answered in the stages
before, which only language models look at. The exact ones need no model:

    second-best   the efficient graph at Nash efforts, then Nash efforts on what formed (the default)
    planner       the first best: the efficient graph at planner efforts, then planner efforts
    nash          what is left of the complete graph without links that do not pay, Nash efforts
    myopic        best response to the last round (in the first: to efforts of alpha and everybody's consent)
    selfish       the row with the highest own Nash payoff if all others chose everybody, Nash efforts
    always-link / never-link   everybody / nobody, Nash efforts
    random        a coin for every link, a uniform effort
    openai:MODEL / hf:PATH   a language model on a server, a local one: see teachers/language.py
    noisy:EXPERT:RATE   any of them, with that share of its decisions replaced by `random`

[source] of the paper is GPT-o3 as the expert, 126 games of 4 to 8 agents; the exact experts are a [choice].
To add one, write a rule for links and a rule for efforts and put them into RULES. `python -m
tools.expert_games` writes a data set.
"""

import argparse
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

import games
from games import Game, State
from prompts import EFFORT_DIGITS, Decision
from run.files import InputError, share

Expert = Callable[..., Decision]  # (state, seat, rng, past=())


# -------------------- exact experts: a rule for links and a rule for efforts, solved for all seats at once


@lru_cache(maxsize=4096)
def _selfish_row(game: Game, seat: int) -> tuple[int, ...]:
    def own_payoff(row_N):
        proposals_NN = games.complete_graph(game.N)
        proposals_NN[seat] = row_N
        links_NN = games.form_links(proposals_NN)
        return game.payoffs(links_NN, game.nash_efforts(links_NN))[seat]

    return tuple(max(games.own_rows(game.N, seat).tolist(), key=own_payoff))


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


def _nash(state: State) -> np.ndarray:
    return state.game.nash_efforts(state.links)


# name -> (state -> proposals (N, N), state -> efforts (N,))
RULES = {
    "second-best": (lambda s: s.game.efficient_graph("nash")[0], _nash),
    "planner": (
        lambda s: s.game.efficient_graph("planner")[0],
        lambda s: s.game.planner_efforts(s.links),
    ),
    "nash": (lambda s: s.game.nash_graph(), _nash),
    "myopic": (_myopic_proposals, _myopic_efforts),
    "selfish": (lambda s: np.array([_selfish_row(s.game, i) for i in range(s.game.N)]), _nash),
    "always-link": (lambda s: games.complete_graph(s.game.N), _nash),
    "never-link": (lambda s: games.empty_graph(s.game.N), _nash),
}
NAMES = (*RULES, "random")


def _exact(name: str, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
    """Plays its rule, and believes that everybody else plays it too."""
    propose, exert = RULES[name]
    if state.kind == "G":
        proposals_NN = propose(state)
        return Decision("G", proposals_NN[seat], proposals_NN[:, seat])
    efforts_N = np.clip(np.round(exert(state), EFFORT_DIGITS), 0, state.game.caps)
    belief_N = efforts_N.copy()
    belief_N[seat] = 0
    return Decision("E", float(efforts_N[seat]), belief_N)


def random_decision(game: Game, kind: str, seat: int, rng: np.random.Generator) -> Decision:
    """Coins and uniform efforts; so are its beliefs."""
    N, caps = game.N, game.caps
    if kind == "G":
        row_N, belief_N = rng.integers(0, 2, (2, N))
        row_N[seat] = belief_N[seat] = 0
        return Decision("G", row_N, belief_N)
    belief_N = np.round(rng.uniform(0, caps), EFFORT_DIGITS)
    belief_N[seat] = 0
    return Decision("E", float(min(caps[seat], round(rng.uniform(0, caps[seat]), EFFORT_DIGITS))), belief_N)


def _random(state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
    return random_decision(state.game, state.kind, seat, rng)


def _noisy(
    expert: Expert, rate: float, state: State, seat: int, rng: np.random.Generator, past=()
) -> Decision:
    return (_random if rng.random() < rate else expert)(state, seat, rng, past)


def make_expert(name: str, ask=None) -> Expert:
    """The expert of a name. ask: how language models are asked (teachers.language.Asking), None for their
    defaults. Raises InputError for a name that is none, or a language model that cannot be had."""
    if name == "random":
        return _random
    if name in RULES:
        return partial(_exact, name)
    if is_language(name):
        from teachers import language  # here: exact experts do without

        return language.make(name, ask)
    if name.startswith("noisy:"):
        inner, rate = split_noisy(name)
        return partial(_noisy, make_expert(inner), rate)
    known = f"{', '.join(NAMES)}, openai:MODEL, hf:PATH or noisy:EXPERT:RATE"
    raise InputError(f"unknown expert {name!r}; choose from {known}")


def split_noisy(name: str) -> tuple[str, float]:
    """noisy:EXPERT:RATE -> (EXPERT, RATE)."""
    inner, _, rate = name.removeprefix("noisy:").rpartition(":")
    try:
        return inner, share(rate)
    except argparse.ArgumentTypeError:
        raise InputError(
            f"{name!r} is not noisy:EXPERT:RATE, rate 0 to 1, for example noisy:nash:0.15"
        ) from None


def is_language(name: str) -> bool:
    while name.startswith("noisy:"):
        name = name.removeprefix("noisy:").rpartition(":")[0]
    return name.startswith(("openai:", "hf:"))


def decide(expert: Expert, calls: list[tuple]) -> list[Decision]:
    """The decisions of several calls (state, seat, rng, past), in order. Language models, whose `decide_all`
    answers many questions in the time of one, get them together."""
    together = getattr(expert, "decide_all", None)
    return together(calls) if together else [expert(*call) for call in calls]

"""Experts: the players of the other seats and the teachers of the data, and whole games among them.

An expert is a function (state, seat, rng, past) -> Decision; `past` is what the agent answered in the stages
before, which only language models look at. The exact ones need no model:

    second-best   the efficient graph at Nash efforts, then Nash efforts on what formed (the default)
    planner       the first best: the efficient graph at planner efforts, then planner efforts
    nash          the greatest equilibrium graph, Nash efforts
    myopic        best response to the last round (to efforts alpha and everybody's consent in the first)
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
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

import games
from games import Game, State, game_from_json
from prompts import EFFORT_DIGITS, Decision, PromptStyle, format_reply, messages, parse_reply
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


def print_report() -> None:
    """One line for each language model that this process has asked."""
    language = sys.modules.get("teachers.language")
    if language:
        language.print_report()


def decide(expert: Expert, calls: list[tuple]) -> list[Decision]:
    """The decisions of several calls (state, seat, rng, past), in order. Language models, whose `decide_all`
    answers many questions in the time of one, get them together."""
    together = getattr(expert, "decide_all", None)
    return together(calls) if together else [expert(*call) for call in calls]


# -------------------- whole games


@dataclass(frozen=True)
class Record:
    """One decision of one agent in an expert game: one line of the data set.

    prompt: the conversation so far; label: the expert's reply to the state that really arose; reply: the
    reply that was played, a random one where `replaced` (a share of all decisions is replaced at random, else
    an agent could learn to copy the last round). proposals and links: the latest ones after this stage;
    efforts: those played in this stage (None in a graph stage); payoffs: of the round that ended with this
    stage (None if none did)."""

    game: int
    instance: dict
    round: int
    stage: int  # counted from 0 over the whole game
    kind: str  # G or E
    seat: int
    prompt: list
    reply: str
    label: str
    replaced: bool
    proposals: list
    links: list
    efforts: list | None
    payoffs: list | None


def simulate(
    plays: list[tuple[int, Game, np.random.Generator]], expert: Expert, style: PromptStyle, noise: float = 0.0
) -> list[Record]:
    """Plays games with the expert in every seat, side by side; T * len(stages) * N records of each, game by
    game.

    plays: of each game its index, its instance and its random numbers. noise: share of decisions replaced at
    random."""
    states = [State(game) for _, game, _ in plays]
    replies: list[list[list[str]]] = [[[] for _ in range(game.N)] for _, game, _ in plays]
    records: list[list[Record]] = [[] for _ in plays]
    while going := [k for k, state in enumerate(states) if not state.done]:
        calls = [(states[k], i, plays[k][2], replies[k][i]) for k in going for i in range(states[k].game.N)]
        answers = iter(decide(expert, calls))
        for k in going:
            state, (index, game, rng) = states[k], plays[k]
            seats = range(game.N)
            labels = [next(answers) for _ in seats]
            replaced = [bool(rng.random() < noise) for _ in seats]
            played = [_random(state, i, rng) if replaced[i] else labels[i] for i in seats]
            states[k] = after = state.step(np.array([d.action for d in played]))
            round_over = len(after.history) % len(game.stages) == 0
            for i in seats:
                records[k].append(
                    Record(
                        game=index,
                        instance=game.to_json(),
                        round=state.round,
                        stage=len(state.history),
                        kind=state.kind,
                        seat=i,
                        prompt=messages(state, i, replies[k][i], style),
                        reply=format_reply(played[i], style),
                        label=format_reply(labels[i], style),
                        replaced=replaced[i],
                        proposals=after.last("G").tolist(),
                        links=after.links.tolist(),
                        efforts=after.efforts.tolist() if state.kind == "E" else None,
                        payoffs=after.round_results()[-1][2].round(6).tolist() if round_over else None,
                    )
                )
            for i in seats:
                replies[k][i].append(format_reply(played[i], style))
    return [record for of_game in records for record in of_game]


def label_decision(record: Record) -> Decision:
    """The expert's decision, as written in the label."""
    game = game_from_json(record.instance)
    return parse_reply(record.label, record.kind, record.seat, game.N, game.caps[record.seat])

"""Whole games among experts: what SFT imitates, and where the prompts of RFT come from."""

from dataclasses import dataclass

import numpy as np

from experts import Expert, decide, random_decision
from games import Game, State, game_from_json
from prompts import Decision, PromptStyle, format_reply, messages, parse_reply


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
            played = [random_decision(game, state.kind, i, rng) if replaced[i] else labels[i] for i in seats]
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

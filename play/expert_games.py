"""Whole games among experts: what SFT imitates, and where the prompts of RFT come from. tools/expert_games.py
writes them to a file."""

from dataclasses import dataclass, replace

import numpy as np

from decisions import EFFORTS
from experts import Expert
from games import KINDS, Decision, Game, State, game_from_json
from play.cast import decide_together
from play.thoughts import thought
from prompts import PromptStyle, format_reply, messages, parse_reply, read_reply


@dataclass(frozen=True)
class Record:
    """One decision of one agent in an expert game: one line of the data set. prompt: the conversation so
    far; label: the expert's reply to the state that really arose; reply: the one that was played, a random
    one where `replaced` (so that other graphs than the experts' arise, and in games of several rounds
    nobody learns to copy the last one). proposals and links: the latest ones after this stage; efforts:
    those played in this stage (None in a stage of another kind); payoffs: of the round that ended with this
    stage (None if none did)."""

    game: int
    instance: dict
    round: int
    stage: int  # counted from 0 over the whole game
    kind: str  # the letter of the kind, G or E
    seat: int
    prompt: list
    reply: str
    label: str
    replaced: bool
    proposals: list | None
    links: list
    efforts: list | None
    payoffs: list | None
    style: dict | None = None  # PromptStyle.recorded, and who played; older files lack some of it, or all


def simulate(
    plays: list[tuple[int, Game, np.random.Generator]],
    expert: Expert,
    style: PromptStyle,
    noise: float = 0.0,
    partners: Expert | None = None,
    trained: list[int] | None = None,
) -> list[Record]:
    """Plays games with the expert in every seat, side by side; rounds * len(stages) * N records of each,
    game by game. plays: of each game its index, its instance and its random numbers; noise: share of
    decisions replaced at random (without partners).

    trained: with partners, of each game the one seat in which none of them sits. It plays at random, so
    that nothing can be learned by repeating what it did before. Its labels are the expert's, and their Belief
    lines say what the others really do in the same stage [choice]. (With the expert `random` all do.)"""
    made = style.recorded | dict(expert=expert.name, partners=partners.name if partners else None)
    states = [State(game) for _, game, _ in plays]
    replies: list[list[list[str]]] = [[[] for _ in range(game.N)] for _, game, _ in plays]
    records: list[list[Record]] = [[] for _ in plays]
    while active := [k for k, state in enumerate(states) if not state.done]:
        places = [(k, i) for k in active for i in range(states[k].game.N)]
        calls = [(states[k], i, plays[k][2], replies[k][i]) for k, i in places]
        who = [partners if partners and i != trained[k] else expert for k, i in places]
        answers = iter(decide_together(who, calls))
        for k in active:
            state, (index, game, rng) = states[k], plays[k]
            seats, kind = range(game.N), state.kind
            labels = [next(answers) for _ in seats]
            replaced = [i == trained[k] if partners else bool(rng.random() < noise) for i in seats]
            played = [kind.random(game, i, rng) if replaced[i] else labels[i] for i in seats]
            said = [format_reply(decision, style) for decision in played]  # rounded: this is what is played
            actions = np.array([(parse_reply(said[i], state, i) or played[i]).action for i in seats])
            if partners or expert.name == "random":  # beliefs of these labels: what the others now do
                labels = [
                    replace(d, belief=kind.expert_decision(actions, game, i).belief)
                    for i, d in enumerate(labels)
                ]
            states[k] = after = state.step(actions)
            proposals_NN, ended = after.last("G"), after.round > state.round
            shared = dict(game=index, instance=game.to_json(), round=state.round, stage=len(state.history))
            shared |= dict(kind=kind.letter, links=after.links.tolist(), style=made)
            shared["proposals"] = None if proposals_NN is None else proposals_NN.tolist()
            shared["efforts"] = after.efforts.tolist() if kind is EFFORTS else None
            shared["payoffs"] = after.round_results()[-1][2].round(6).tolist() if ended else None
            for i in seats:
                label = thought(state, i, style) + format_reply(labels[i], style)
                own = dict(prompt=messages(state, i, replies[k][i], style), reply=said[i], label=label)
                records[k].append(Record(**shared, **own, seat=i, replaced=replaced[i]))
                replies[k][i].append(said[i])
    return [record for game_records in records for record in game_records]


def label_decision(record: Record) -> Decision:
    """The expert's decision, as written in the label."""
    game = game_from_json(record.instance)
    return read_reply(record.label, KINDS[record.kind], record.seat, game.N, game.caps[record.seat])[0]


def history_to_text(state: State) -> list[str]:
    """A text for each finished stage, for files, such as `0110 1000 1000 0000` or `1.33 1.2 1.0 1.0`."""
    return [state.kind_of(stage).to_text(actions) for stage, actions in enumerate(state.history)]


def history_from_text(game: Game, texts: list[str]) -> State:
    """The state after these stages. Raises ValueError for actions that the game does not allow."""
    state = State(game)
    for text in texts:
        state = state.step(state.kind.from_text(text))
    return state

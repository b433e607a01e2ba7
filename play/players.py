"""Who sits at a table, and games played at tables.

A player answers a list of `Ask`s, all of one stage, with the text of a reply to each, which is parsed as
strictly as in training. A table names a player for every seat of a game; a player in several seats or games
is asked once per stage for all of them. eval.py makes players from their names.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import lora
from decisions import LINKS
from experts import Expert
from games import Decision, State
from models import adapters as adapters_on_disk
from play import expert_games
from play.metrics import Episode, Turn
from play.repair import repair_reply
from play.sampling import random_guesses, sample_texts
from policy import Policy
from prompts import PromptStyle, format_reply, messages, parse_reply
from run import ranks
from run.errors import InputError
from run.seeds import Stream, numpy_generator, torch_generator
from world.draws import Family, draw_game, held_out_grid


@dataclass(frozen=True, eq=False)
class Ask:
    """One decision. game: the number of its game; replies: of this seat in the stages before. Of a language
    model only: chat: what it reads instead of its own conversation; begin: what its reply begins with."""

    game: int
    state: State
    seat: int
    replies: list[str]
    chat: list[dict] | None = None
    begin: str = ""


Player = Callable[[list[Ask]], list[str]]
BATCH = 64  # conversations that a policy continues at once


def policy_player(
    policy: Policy,
    style: PromptStyle,
    temperature: float,
    seed: int,
    stream: int = Stream.PLAYERS,
    *,
    adapter: tuple[dict, lora.LoRAConfig] | None = None,
    examples: dict[str, list[list[dict]]] | None = None,
) -> Player:
    """A player for one play of games. Its first two batches are sessions, which keep the keys and values of
    their conversations from one decision to the next; they take 46 KB a token in the default model, so later
    batches read their conversations again.
    stream: of random numbers, another one for each player at a table; adapter: is on the model for every
    answer and off after it, so that players can share the model; examples: conversations that stand before
    every prompt, by game label."""
    sessions, examples = defaultdict(policy.session), examples or {}
    # Every conversation of a session keeps a copy of the examples.
    batch = max(1, BATCH // (max(map(len, examples.values()), default=0) + 1))

    def prompt(ask: Ask) -> list[int]:
        chat = ask.chat or messages(ask.state, ask.seat, ask.replies, style)
        ids = policy.encode_prompt(with_examples(examples.get(ask.state.game.label, []), chat))
        return ids + (policy.template.encode_reply(ask.begin, whole=False) if ask.begin else [])

    def answer(asks):
        prompts, texts = [prompt(ask) for ask in asks], []
        guesses = random_guesses(policy, [(ask.state, ask.seat) for ask in asks], style)
        limit = style.reply_limit(max(ask.state.game.N for ask in asks))
        with adapter_on(policy, *adapter) if adapter else nullcontext():
            for start in range(0, len(prompts), batch):
                part = prompts[start : start + batch]
                # Games with a person are played alone, so the first game's number is not always 0.
                generator = torch_generator(seed, stream, len(asks[0].replies), asks[0].game + start)
                sampler = sessions[start] if start < 2 * batch else policy
                own = guesses[start : start + batch]
                texts += sample_texts(sampler, part, own, limit, temperature, generator)
        return [ask.begin + text for ask, text in zip(asks, texts, strict=True)]

    return answer


@contextmanager
def adapter_on(policy: Policy, state: dict, config: lora.LoRAConfig):
    lora.inject(policy.model, config, torch.Generator(), policy.layer)
    try:
        adapters_on_disk.load_adapter_state(policy.model, state)
        yield
    finally:
        lora.remove(policy.model)


def expert_decisions(expert: Expert, seed: int, asks: list[Ask]) -> list[Decision]:
    """The random numbers belong to (seed, game, seat, stage), so they do not depend on other players."""
    draws = [numpy_generator(seed, ask.game, ask.seat, len(ask.replies)) for ask in asks]
    return expert.decide_all([(a.state, a.seat, rng, a.replies) for a, rng in zip(asks, draws, strict=True)])


def expert_player(expert: Expert, style: PromptStyle, seed: int) -> Player:
    return lambda asks: [format_reply(d, style) for d in expert_decisions(expert, seed, asks)]


def with_examples(examples: list[list[dict]], chat: list[dict]) -> list[dict]:
    """The conversation `chat` after other, finished ones, as one conversation. Many chat templates accept
    only one system message, at the beginning, so the system message of each later conversation stands at the
    head of its first user message."""
    first, *rest = [*examples, chat]
    joined = list(first)
    for system, question, *more in rest:
        opening = f"A new game. {system['content']}\n{question['content']}"
        joined += [{"role": "user", "content": opening}, *more]
    return joined


def expert_examples(
    count: int, family: Family, N: int, expert: Expert, style: PromptStyle, seed: int
) -> list[list[dict]]:
    """`count` expert games of the training split: of each a random seat's conversation, with its labels."""
    rng, chats = numpy_generator(seed, 0, 0, 0, 2), []
    for _ in range(count):
        game = draw_game(rng, N, "train", family)
        if game.key in {evaluated.key for evaluated in held_out_grid(N, family)}:
            raise InputError("few-shot games would be evaluated ones: the flags leave no other instances")
        seat = int(rng.integers(N))
        own = [r for r in expert_games.simulate([(0, game, rng)], expert, style) if r.seat == seat]
        turns = [(r.prompt[-1], {"role": "assistant", "content": r.label}) for r in own]
        chats.append([own[0].prompt[0], *(message for turn in turns for message in turn)])
    return chats


# -------------------- games at tables


def play_tables(
    games, tables: list[list[Player]], watched, expert: Expert, seed: int, label="", repair=False, first=0
) -> list[Episode]:
    """Plays games of the same stages and rounds side by side, stage by stage. tables: of each game the player
    in each seat; watched: of each game the seats whose turns are recorded; expert: whose decisions in all
    seats a link decision is compared with; repair: of replies that are not compliant, play what can be read
    in them; first: the number of the first game, to which experts' draws belong; label: of the progress bar,
    which is shown only with one. `game_over` of a player that has it is called with the last state of each
    game."""
    players = list({id(player): player for table in tables for player in table}.values())
    states = [State(game) for game in games]
    replies: list[list[list[str]]] = [[[] for _ in table] for table in tables]
    turns: list[list[Turn]] = [[] for _ in games]
    listeners = [player.game_over for player in players if hasattr(player, "game_over")]
    # A progress bar would disturb a person's dialogue.
    hidden = not label or bool(listeners) or not ranks.first()
    stages = range(len(games[0].stages) * games[0].rounds)
    for _ in tqdm(stages, desc=f"playing {label}", unit="stage", leave=False, disable=hidden):
        asks = [Ask(first + i, s, j, replies[i][j]) for i, s in enumerate(states) for j in range(s.game.N)]
        texts: dict[tuple[int, int], str] = {}
        for player in players:
            own = [ask for ask in asks if tables[ask.game - first][ask.seat] is player]
            texts |= {(a.game, a.seat): text for a, text in zip(own, player(own), strict=True)}
        compared = states[0].kind is LINKS
        reference = iter(expert_decisions(expert, seed, asks) if compared else ())
        for i, state in enumerate(states):
            seats = range(state.game.N)
            given = [texts[first + i, j] for j in seats]
            strict = [parse_reply(text, state, j) for j, text in enumerate(given)]
            played = [repair_reply(text, state, j) for j, text in enumerate(given)] if repair else strict
            silent = state.kind.fallback(state.game.N)
            actions = np.array([(decision or silent).action for decision in played])
            expert_actions = np.array([next(reference).action for _ in seats]) if compared else None
            for j in watched[i]:
                turns[i].append(Turn(state, j, given[j], strict[j], played[j], actions, expert_actions))
            for j in seats:
                replies[i][j].append(given[j])
            states[i] = state.step(actions)
    for game_over in listeners:
        for state in states:
            game_over(state)
    welfares = [[float(pay.sum()) for _, _, pay in state.round_results()] for state in states]
    ends = zip(states, turns, welfares, strict=True)
    return [Episode(state.game, own, welfare, state.history) for state, own, welfare in ends]

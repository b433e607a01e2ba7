"""The data set of expert games: how it is made, what SFT imitates in it, and the prompts of RFT."""

import copy
from dataclasses import dataclass, replace

import numpy as np

from experts import Expert
from games import KINDS, Decision, State, game_from_json
from play.expert_games import Record, label_decision, simulate
from play.thoughts import thought_of
from policy import Policy
from prompts import PromptStyle, format_reply, parse_reply
from rewards import Target
from run.errors import InputError
from run.seeds import Stream, numpy_generator, shuffled
from world.draws import Family, draw_game

# -------------------- games


def simulate_many(
    count: int,
    expert: Expert,
    seed: int,
    style: PromptStyle,
    agents: tuple[int, int] = (4, 4),
    split: str = "train",
    families: tuple[Family, ...] = (Family(),),
    noise: float = 0.15,
    partners: Expert | None = None,
    seat: int | str = 0,
) -> list[Record]:
    """The records of `count` games on instances drawn from a split, with agents[0] to agents[1] agents.
    Families take turns. noise: the share of the decisions that are replaced at random; partners: who sits in
    the seats that are not trained, if not the expert (see `simulate`); seat: the trained one.

    A language model plays all games at the same time. It gets the same instances and replaced decisions as
    an exact expert, because none of them depends on the answers: each game is first played by an exact
    expert, to advance the random stream, and then in earnest with a copy of the stream from before."""
    rng = np.random.default_rng([seed, split == "held-out"])
    exact = expert.stand_in()  # itself if exact: then these games are the result
    records, plays, trained = [], [], []
    for index in range(count):
        N = int(rng.integers(agents[0], agents[1] + 1))
        game = draw_game(rng, N, split, families[index % len(families)])
        if expert.language:
            plays.append((index, game, copy.deepcopy(rng)))
        trained.append(seat_of(seat, seed, index, N) if partners else 0)
        records += simulate([(index, game, rng)], exact, style, noise, partners, trained[-1:])
    return simulate(plays, expert, style, noise, partners, trained) if expert.language else records


# -------------------- what is trained


def trained_seats(records: list[Record], seat: int | str, seed: int) -> list[Record]:
    """The decisions that are trained on: those of one seat [source: seat 0], of every seat (`all`), or of one
    seat drawn for each game (`random`)."""
    if seat == "all":
        return records
    return [r for r in records if r.seat == seat_of(seat, seed, r.game, game_from_json(r.instance).N)]


def seat_of(seat: int | str, seed: int, game: int, N: int) -> int:
    """The trained seat of a game of N agents."""
    return int(numpy_generator(seed, Stream.SEATS, game).integers(N)) if seat == "random" else int(seat)


def with_label_noise(
    records: list[Record], rates: dict[str, float], seed: int, style: PromptStyle
) -> list[Record]:
    """Weak demonstrations: in a share of the labels, by kind of decision, the decision becomes a random
    compliant one. The Belief line stays the expert's: no reward of the default run would correct a belief
    that was learned from random lines. Which labels are replaced depends on (seed, game, stage, seat)
    alone. What was played, and so every prompt, stays as it is, and the rewards of RFT do not read these
    labels."""
    noisy = []
    for r in records:
        rng = numpy_generator(seed, Stream.LABEL_NOISE, r.game, r.stage, r.seat)
        if rng.random() < rates.get(r.kind, 0.0):
            drawn, expert = KINDS[r.kind].random(game_from_json(r.instance), r.seat, rng), label_decision(r)
            drawn = replace(drawn, belief=expert.belief)
            r = replace(r, label=thought_of(r.label) + format_reply(drawn, style))
        noisy.append(r)
    return noisy


def targets(records: list[Record], wanted: list[Record]) -> list[tuple[Record, Target]]:
    """The records in `wanted`, each with the state in which the decision is taken and what the
    experts of all agents do there, sorted by game, stage and seat. InputError: the records lack seats or
    stages."""
    places = {(r.game, r.stage, r.seat) for r in wanted}
    stages: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        stages.setdefault((r.game, r.stage), []).append(r)
    pairs: list[tuple[Record, Target]] = []
    histories: dict[int, tuple[np.ndarray, ...]] = {}
    for (game, stage), unsorted in sorted(stages.items()):
        seats = sorted(unsorted, key=lambda r: r.seat)
        state = State(game_from_json(seats[0].instance), histories.get(game, ()))
        if [r.seat for r in seats] != list(range(state.game.N)) or len(state.history) != stage:
            missing = f"the data set lacks decisions of game {game}, stage {stage}"
            raise InputError(f"{missing}: RFT needs all seats and stages")
        played = [action(parse_reply(r.reply, state, r.seat)) for r in seats]
        histories[game] = state.step(played).history
        actions = np.array([action(label_decision(r)) for r in seats])
        pairs += [(r, Target(state, r.seat, actions, game)) for r in seats if (game, stage, r.seat) in places]
    return pairs


def action(decision: Decision | None):
    """What it chooses. InputError where a reply could not be read in the state that its record has led to."""
    if decision is None:
        raise InputError("the records of one game and stage are of different instances")
    return decision.action


# -------------------- prompts of RFT


@dataclass
class Prompt:
    """One decision of an expert game, as a prompt q of RFT. ids: its tokens; target: its state, seat and what
    the experts do there."""

    record: Record
    ids: list[int]
    target: Target

    @property
    def conversation(self) -> tuple[int, int]:
        """(game, seat): all prompts of one agent in one game are one conversation and share tokens."""
        return self.record.game, self.record.seat


def make_prompts(
    policy: Policy | None,
    records: list[Record],
    trained: list[Record],
    counts: dict[str, int],
    style: PromptStyle,
) -> list[list[Prompt]]:
    """The pool from which RFT draws: the records in `trained`, grouped by conversation.
    policy: None if others turn the prompts into tokens; counts: how many decisions of each kind a step needs.
    Raises InputError if a game lacks one of these kinds, or the model's context or --think is too short."""
    for letter, count in counts.items():
        if count and {r.game for r in trained} != {r.game for r in trained if r.kind == letter}:
            lack = f"the data set has games without {KINDS[letter].name} decisions"
            raise InputError(f"{lack}; set their count in --prompts to 0")
    pool: dict[tuple[int, int], list[Prompt]] = {}
    if policy:
        check_labels(policy, trained, style)
    for r, target in targets(records, trained):
        prompt = Prompt(r, policy.encode_prompt(r.prompt) if policy else [], target)
        if policy:
            policy.check_length(len(prompt.ids), style.reply_limit(target.game.N))
        pool.setdefault(prompt.conversation, []).append(prompt)
    return list(pool.values())


def check_labels(policy: Policy, records: list[Record], style: PromptStyle) -> None:
    """Raises InputError if a label is longer than a reply may be with --think."""
    for r in records if style.think else ():
        tokens, limit = len(policy.encode_reply(r.label)), style.reply_limit(game_from_json(r.instance).N)
        if tokens > limit:
            more = "--max-new-tokens" if style.max_new_tokens else "--think"
            raise InputError(f"a label has {tokens} tokens, a reply may have {limit}: give more to {more}")


def next_batch(
    pool: list[list[Prompt]], counts: dict[str, int], step: int, seed: int, order: list[int] | None = None
) -> list[Prompt]:
    """The prompts of a step: `counts` decisions of each kind, from the same conversations where possible,
    since these share tokens. An epoch goes through all conversations. order: of the pool, if given."""
    rng, batch = numpy_generator(seed, Stream.RFT_DECISIONS, step), []
    order = order or shuffled(len(pool), max(counts.values()), step, seed, Stream.RFT_ORDER)
    for k, i in enumerate(order):
        for letter, count in counts.items():
            if k < count:
                choices = [p for p in pool[i] if p.target.kind.letter == letter]
                batch.append(choices[rng.integers(len(choices))])
    return batch

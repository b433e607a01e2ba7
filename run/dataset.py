"""The data set of expert games: which games there are, their flags, and the file that holds them."""

import argparse
import copy
import json
import sys
from dataclasses import asdict, replace

import numpy as np

import experts
from experts import Expert, make_expert
from games import State, game_from_json
from play import expert_games
from play.expert_games import Record, simulate
from prompts import PromptStyle, format_reply, parse_reply
from rewards import Target
from run.files import (
    InputError,
    library_errors,
    one_line,
    parse_range,
    positive_int,
    seat_choice,
    share,
    write_atomic,
)
from world.draws import Family, add_game_arguments, draw_game, families


def simulate_many(
    count: int,
    expert: str,
    seed: int,
    style: PromptStyle,
    agents: tuple[int, int] = (4, 4),
    split: str = "train",
    families: tuple[Family, ...] = (Family(),),
    noise: float = 0.15,
    ask=None,
) -> list[Record]:
    """The records of `count` games on instances drawn from a split, with agents[0] to agents[1] agents.
    Families take turns. ask: how language models are asked.

    A language model plays all games side by side. It gets the instances and the replaced decisions that an
    exact expert gets: none of them turns on the answers, so each game is first played by an exact expert, to
    move on the random stream, and then in earnest with a copy of the stream from before."""
    rng = np.random.default_rng([seed, split == "held-out"])
    player, waits = make_expert(expert, ask), experts.is_language(expert)
    rehearsing = make_expert(exact_stand_in(expert)) if waits else None
    records, plays = [], []
    for index in range(count):
        N = int(rng.integers(agents[0], agents[1] + 1))
        game = draw_game(rng, N, split, families[index % len(families)])
        if waits:
            plays.append((index, game, copy.deepcopy(rng)))
        records += simulate([(index, game, rng)], rehearsing or player, style, noise)
    return simulate(plays, player, style, noise) if waits else records


def exact_stand_in(name: str) -> str:
    """The name with `second-best` in the place of its language model: it draws as many random numbers."""
    if not name.startswith("noisy:"):
        return "second-best"
    inner, rate = experts.split_noisy(name)
    return f"noisy:{exact_stand_in(inner)}:{rate}"


def write_records(path: str, records: list[Record]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(r)) + "\n" for r in records).encode())


def read_records(path: str) -> list[Record]:
    """Reads and checks a data set. Raises InputError that names the file, the line and what is wrong with
    it."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"cannot read the data set {path}: {e}; write one with: python -m tools.expert_games --out FILE"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
            game = game_from_json(record.instance)
            if record.kind not in ("G", "E") or record.seat not in range(game.N):
                raise ValueError("`kind` must be G or E and `seat` one of the game's seats")
            if not all(type(v) is int for v in (record.game, record.seat, record.stage, record.round)):
                raise ValueError("`game`, `seat`, `stage` and `round` must be whole numbers")
            for field in ("reply", "label"):
                if (
                    parse_reply(
                        getattr(record, field), record.kind, record.seat, game.N, game.caps[record.seat]
                    )
                    is None
                ):
                    raise ValueError(f"`{field}` is not a compliant reply: {getattr(record, field)!r}")
            said = [isinstance(m["content"], str) and isinstance(m["role"], str) for m in record.prompt]
            if not said or not all(said):
                raise ValueError("`prompt` must be a list of chat messages")
            "".join(m["content"] for m in record.prompt).encode()  # half a character has no place in UTF-8
            roles = [m["role"] for m in record.prompt]
            if roles[roles[0] == "system" :] != ["user", *["assistant", "user"] * record.stage]:
                raise ValueError("`prompt` must be a conversation with a question and a reply per `stage`")
            where = divmod(record.stage, len(game.stages))
            if (record.round - 1, record.kind) != (where[0], game.stages[where[1]]) or record.stage < 0:
                raise ValueError("`round` and `kind` must be those of the `stage`")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise InputError(f"{path} line {number} is not a valid record: {one_line(e)}") from None
        records.append(record)
    if not records:
        raise InputError(
            f"the data set {path} is empty; write one with: python -m tools.expert_games --out FILE"
        )
    return records


def weak_labels(args, records: list[Record], seen: list[Record]) -> list[Record]:
    """What SFT imitates: the labels of `seen`, a part of the records, or those of a weaker teacher
    (--sft-expert) in the same states; a share of them replaced (--label-noise). What was played, and so every
    prompt, stays as it is, and RFT's rewards do not read these labels."""
    style = style_of(args)
    if args.sft_expert:
        chosen, calls = targets(records, seen), []
        for r, target in chosen:
            past = [m["content"] for m in r.prompt if m["role"] == "assistant"]
            rng = np.random.default_rng([args.seed, 13, r.game, r.stage, r.seat])
            calls.append((target.state, r.seat, rng, past))
        answers = experts.decide(expert_of(args, args.sft_expert), calls)
        seen = [replace(r, label=format_reply(d, style)) for (r, _), d in zip(chosen, answers)]
    return with_label_noise(seen, dict(zip("GE", args.label_noise)), args.seed, style)


def with_label_noise(
    records: list[Record], rates: dict[str, float], seed: int, style: PromptStyle
) -> list[Record]:
    """Weak demonstrations: in a share of the labels, by kind of decision, the decision becomes a random
    compliant one. The Belief line stays the expert's: learned from random lines it would rot, and no reward
    of the default run mends it. Which labels are replaced belongs to (seed, game, stage, seat) alone."""
    found = []
    for r in records:
        rng = np.random.default_rng([seed, 10, r.game, r.stage, r.seat])
        if rng.random() < rates.get(r.kind, 0.0):
            drawn = experts.random_decision(game_from_json(r.instance), r.kind, r.seat, rng)
            drawn = replace(drawn, belief=expert_games.label_decision(r).belief)
            r = replace(r, label=format_reply(drawn, style))
        found.append(r)
    return found


def check_kinds(records: list[Record], prompts: tuple[int, int]) -> None:
    """Raises InputError where a game lacks a kind of decision that the steps of RFT ask for."""
    for kind, count in zip("GE", prompts):
        if count and {r.game for r in records} != {r.game for r in records if r.kind == kind}:
            lack = f"the data set has games without {kind} decisions"
            raise InputError(f"{lack}; set their count in --prompts to 0")


def targets(records: list[Record], seen: list[Record] | None = None) -> list[tuple[Record, Target]]:
    """Every decision (or those of `seen`, a part of the records) with the state in which it is taken and what
    the experts of all agents do there, sorted by game, stage and seat. Raises InputError for a data set that
    lacks seats or stages."""
    wanted = {(r.game, r.stage, r.seat) for r in (records if seen is None else seen)}
    stages: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        stages.setdefault((r.game, r.stage), []).append(r)
    found, histories = [], {}
    for (game, stage), unsorted in sorted(stages.items()):
        seats = sorted(unsorted, key=lambda r: r.seat)
        state = State(game_from_json(seats[0].instance), histories.get(game, ()))
        if [r.seat for r in seats] != list(range(state.game.N)) or len(state.history) != stage:
            missing = f"the data set lacks decisions of game {game}, stage {stage}"
            raise InputError(f"{missing}: RFT needs all seats and stages")
        played = seats[0].proposals if seats[0].kind == "G" else seats[0].efforts
        with library_errors(f"the data set, game {game}, stage {stage}"):
            histories[game] = state.step(np.array(played)).history
        actions = np.array([expert_games.label_decision(r).action for r in seats])
        found += [(r, Target(state, r.seat, actions)) for r in seats if (game, stage, r.seat) in wanted]
    return found


def add_style_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is played and how it is told; training and evaluation share them."""
    add_game_arguments(parser)
    group = parser.add_argument_group("players", "Who sits in the other seats, and what agents are told.")
    add = group.add_argument
    add("--expert", default="second-best", help="the teacher and the other seats (see experts.py)")
    told = "how a language model is asked, such as attempts=3 budget=20 (see docs/language-model-experts.md)"
    add("--ask", nargs="+", metavar="NAME=VALUE", help=told)
    add("--information", choices=("full", "local"), default="full", help="whose types an agent knows")
    add("--belief", action=argparse.BooleanOptionalAction, default=True, help="ask for a Belief line")
    add("--hints", action=argparse.BooleanOptionalAction, default=True, help="worked numbers in prompts")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which expert games there are."""
    add_style_arguments(parser)
    group = parser.add_argument_group("expert games", "What SFT imitates, and the prompts of RFT.")
    add = group.add_argument
    add("--games", type=positive_int, default=126, help="number of expert games [source: 126]")
    add("--agents", type=parse_range, default=(4, 4), metavar="N|A-B", help="agents per game, 4 or 4-8")
    told = (
        "the policy's seat, from 0 [source: 0]; random: one drawn for each game; all: decisions of every seat"
    )
    add("--seat", type=seat_choice("random", "all"), metavar="SEAT|random|all", default=0, help=told)
    add("--noise", type=share, default=0.15, help="share of decisions replaced at random in the data")


def style_of(args: argparse.Namespace) -> PromptStyle:
    return PromptStyle(args.information, args.belief, args.hints)


def expert_of(args: argparse.Namespace, name: str | None = None) -> Expert:
    """The expert of the flags of `add_style_arguments`, or the one of this name. Raises InputError."""
    name = args.expert if name is None else name
    return make_expert(name, ask_of(args, name))


def ask_of(args: argparse.Namespace, name: str):
    """How the expert of this name is asked; exact ones are not."""
    if not experts.is_language(name):
        return None
    from teachers import language  # here: exact experts do without

    return language.asking(args.ask, style_of(args), getattr(args, "device", None))


def simulate_args(args: argparse.Namespace, count: int, seed: int, split: str = "train") -> list[Record]:
    """`simulate_many` with the flags of `add_data_arguments`."""
    settings = style_of(args), args.agents, split, families(args), args.noise, ask_of(args, args.expert)
    return simulate_many(count, args.expert, seed, *settings)


def print_report() -> None:
    """One line for each language model that this process has asked."""
    language = sys.modules.get("teachers.language")
    if language:
        language.print_report()

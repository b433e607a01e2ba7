"""The data set of expert games as a file: written, read and checked."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from experts import Expert
from games import KINDS, game_from_json
from play.dataset import seat_of
from play.expert_games import Record
from prompts import PromptStyle, read_reply
from run.errors import InputError, library_errors, one_line
from run.files import write_atomic
from world.draws import Family, split_of

WRITE_ONE = "write one with: python -m tools.expert_games --out FILE"


def write_records(path: str, records: list[Record]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(r)) + "\n" for r in records).encode())


def read_records(path: str) -> list[Record]:
    """Reads and checks a data set. InputError names the file, the line and what is wrong with it."""
    with (
        library_errors(f"cannot read the data set {path}", f"; {WRITE_ONE}"),
        open(path, encoding="utf-8") as f,
    ):
        lines = f.read().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record(**json.loads(line)))
            check_record(records[-1])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise InputError(f"{path} line {number} is not a valid record: {one_line(e)}") from None
    if not records:
        raise InputError(f"the data set {path} is empty; {WRITE_ONE}")
    return records


def check_seats(path: str, records: list[Record], partners: bool, seat: int | str, seed: int) -> None:
    """Raises InputError for a data set that was made with partners and is read without, the other way round,
    or with another seat: among partners the trained seat alone plays at random, and always."""
    games: dict[int, list[Record]] = {}
    for r in records:
        games.setdefault(r.game, []).append(r)
    for index, own in games.items():
        replaced, N = {r.seat for r in own if r.replaced}, max(r.seat for r in own) + 1
        made_with = len(replaced) == 1 and all(r.replaced for r in own if r.seat in replaced)
        if partners and not (made_with and replaced == {seat_of(seat, seed, index, N)}):
            raise InputError(f"{path} was not made with --partners and this --seat and --seed; {WRITE_ONE}")
        if not made_with:
            return
    if not partners and len(games) > 1:
        raise InputError(f"{path} was made with --partners: give the same ones here")


def check_games(path: str, records: list[Record], families: Iterable[Family]) -> None:
    """InputError: a game of the file is none of these families', or it is held out, except where the flags
    give all its numbers."""
    known = {(family.game, family.stages, family.rounds, family.fee): family for family in families}
    for number, instance in {r.game: r.instance for r in records}.items():
        game = game_from_json(instance)
        family = known.get((game.name, game.stages, game.rounds, game.fee))
        if family is None:
            what = f"{game.label} of {game.rounds} rounds with fee {game.fee:g}"
            raise InputError(f"{path}: game {number} is {what}; give the same flags here, or {WRITE_ONE}")
        if not family.nothing_drawn and split_of(game, family) == "held-out":
            raise InputError(f"{path}: game {number} is held out of training, for evaluation; {WRITE_ONE}")


def check_style(path: str, records: list[Record], style: PromptStyle, partners: Expert | None) -> None:
    """InputError: the records were made with other prompts or partners."""
    here = style.recorded | {"partners": partners.name if partners else None}
    for made in filter(None, (r.style for r in records)):
        for name in (name for name, value in here.items() if made.get(name, value) != value):
            what = f"{path} was made with {name} {one_line(made[name])}, and not with {here[name]}"
            raise InputError(f"{what}; give the same flags, or {WRITE_ONE}")


def check_record(r: Record) -> None:
    """Raises ValueError, or whatever a value of a wrong type leads to."""
    game = game_from_json(r.instance)
    if not all(type(v) is int for v in (r.game, r.seat, r.stage, r.round)) or r.stage < 0:
        raise ValueError("`game`, `seat`, `stage` and `round` must be whole numbers")
    round_before, stage = divmod(r.stage, len(game.stages))
    if (r.round - 1, r.kind) != (round_before, game.stages[stage]) or r.seat not in range(game.N):
        raise ValueError("`round` and `kind` must be those of the `stage`, and `seat` a seat of the game")
    for name, text in (("reply", r.reply), ("label", r.label)):
        if read_reply(text, KINDS[r.kind], r.seat, game.N, game.caps[r.seat])[0] is None:
            raise ValueError(f"`{name}` is not a compliant reply: {text!r}")
    roles = [m["role"] for m in r.prompt]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if roles != ["user", *["assistant", "user"] * r.stage]:
        raise ValueError("`prompt` must be a conversation with a question and a reply per `stage`")
    if not isinstance(r.style, dict | None):
        raise ValueError("`style` must be an object or null")
    "".join(m["content"] for m in r.prompt).encode()  # half of a surrogate pair cannot be encoded

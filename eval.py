"""Evaluation: held-out games with the policy in one seat and experts in the others, or any players anywhere.

    python eval.py --policy base runs/tompo/sft/adapter runs/tompo/adapter --json out.json
    python eval.py --table human runs/tompo/adapter expert:nash expert:nash     # you among them
    python eval.py --seeds runs/seed0/eval.json runs/seed1/eval.json runs/seed2/eval.json

Players have names: `base` (the model without an adapter), `few-shot:K` (the same after K expert games in
the prompt), an adapter folder or a chain of them, `expert:NAME`, `human`. Every policy plays the same
instances, in the same seat, against the same draws of the experts, so rows can be compared game by game. In
self-play s and row compare with what --expert would play in all seats.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
import argparse
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import lora
import settings as flags
from experts import Expert
from games import Game
from models import adapters
from models.load import put_adapter
from play import human
from play.expert_games import simulate
from play.metrics import Episode
from play.players import Player, adapter_on, expert_examples, expert_player, play_tables, policy_player
from play.report import CONSTANTS, format_table, report, report_seeds, summarise
from policy import Policy
from run import ranks
from run.errors import InputError, library_errors, reports_errors
from run.files import refuse_existing, write_json
from run.flags import add_flags
from run.seeds import Stream, numpy_generator
from run.values import number_or_word
from settings import Evaluation, Games, Model, Players, Playing, Settings
from teachers.language import print_report
from world.draws import held_out_games

# -------------------- games and seats


def instances(games: Games, evaluation: Evaluation) -> list[Game]:
    """The games of the grid that are played. Raises GameError for flags that leave none."""
    return held_out_games(games.families, evaluation.agents, evaluation.games)


def seats_in(games: list[Game], seat: int | str, seed: int) -> list[tuple[int, ...]]:
    """The policy's seats in each game. A random one depends on the seed and on its own game alone."""
    if seat == "all":
        return [tuple(range(game.N)) for game in games]
    if seat == "random":
        generators = [numpy_generator(seed, zlib.crc32(game.key.encode()), 0, 0, 1) for game in games]
        return [(int(rng.integers(game.N)),) for rng, game in zip(generators, games, strict=True)]
    return [(i % game.N if seat == "rotate" else seat,) for i, game in enumerate(games)]


def check_lengths(settings: Settings, policy: Policy) -> None:
    """Raises InputError where the last question of some game, after the longest replies, could exceed the
    model's context, so that it is known before training. The games are played by an exact expert."""
    style, expert = settings.players.style, settings.players.others.stand_in()
    for game in instances(settings.games, settings.evaluation):
        limit, stages = style.reply_limit(game.N), game.rounds * len(game.stages)
        last = simulate([(0, game, numpy_generator(0))], expert, style)[-1]
        replies = [m["content"] for m in last.prompt if m["role"] == "assistant"]
        fixed = len(policy.encode_prompt(last.prompt)) - sum(len(policy.encode_reply(r)) for r in replies)
        policy.check_length(fixed + (stages - 1) * limit, limit)


# -------------------- play


def play_held_out(
    settings: Settings, seat: int | str, makers: dict, names: list[str], place=None, repair=False
) -> list[Episode]:
    """Plays the held-out games, together those that have the same stages and rounds, and measures the
    players in these seats. makers: functions that make the players of one play, that of the measured seats
    under True and that of the others under False, or, with a list `place`, under the name that is in it for
    each seat. names: of all players. A person plays one game after the other and may leave after any; then
    the games that were over are returned."""
    games, seed, episodes = instances(settings.games, settings.evaluation), settings.evaluation.seed, {}
    watched, seats = seats_in(games, seat, seed), range(settings.evaluation.agents)
    try:
        for stages in dict.fromkeys((game.stages, game.rounds) for game in games):
            part = [i for i, game in enumerate(games) if (game.stages, game.rounds) == stages]
            size = 1 if human.NAME in names else len(part)
            for first in range(0, len(part), size):
                now, cast = part[first : first + size], {key: make() for key, make in makers.items()}
                tables = [[cast[place[j] if place else j in watched[i]] for j in seats] for i in now]
                given = [games[i] for i in now], tables, [watched[i] for i in now], settings.players.expert
                finished = play_tables(*given, seed, " among ".join(names), repair, first)
                episodes |= zip(now, finished, strict=True)
    except human.Left:
        if not episodes:
            raise
        print(f"the game that you left does not count; {len(episodes)} before it count\n")
    return [episodes[i] for i in sorted(episodes)]


def play_among_experts(settings: Settings, name: str, make_player, repair: bool = False) -> list[Episode]:
    """The player of this name among experts."""
    players, evaluation = settings.players, settings.evaluation
    make_expert = partial(expert_player, players.others, players.style, evaluation.seed)
    makers = {True: make_player, False: make_expert}
    return play_held_out(settings, evaluation.seat, makers, [name], repair=repair)


# -------------------- players by name


def check_name(settings: Settings, name: str, flag: str) -> None:
    """Raises InputError for a name that is no player."""
    kind, _, rest = name.partition(":")
    if kind == "expert":
        settings.players.make_expert(rest)
    elif kind == "few-shot":
        if settings.players.partners:
            raise InputError(f"{flag} {name}: examples are games among experts: leave out --partners")
        if rest not in map(str, range(1, 1001)):  # no context has room for as many
            raise InputError(f"{flag} {name}: K of few-shot:K is a number of expert games from 1 to 1000")
    elif name not in ("base", human.NAME):
        if not all(Path(folder).is_dir() for folder in adapters.chain(name)):
            raise InputError(f"{flag} {name}: not base, human, few-shot:K, expert:NAME or an adapter folder")


def make_cast(
    settings: Settings, names: list[str], flag: str = "--policy"
) -> dict[str, Callable[..., Player]]:
    """{name: a function that makes the player for one play}; it may be given a stream of random numbers. The
    model is loaded once, and an adapter that does not fit is reported before any game is played."""
    for name in names:
        check_name(settings, name, flag)
    players, evaluation = settings.players, settings.evaluation
    style, seed, policy = players.style, evaluation.seed, cache(settings.model.load)

    def make(name):
        kind, _, rest = name.partition(":")
        if kind == "expert":
            player = expert_player(players.make_expert(rest), style, seed)
            return lambda stream=None: player
        if name == human.NAME:
            rule = players.partners.rule if players.partners else lambda game, seat: players.expert
            who = {
                "--table": lambda game, seat: names[seat],
                "--policy": lambda game, seat: f"expert:{rule(game, seat).name}",
            }
            person = human.Human(style, who.get(flag))  # one for all games: it keeps the score
            return lambda stream=None: person
        adapter, examples = None, {}
        if kind == "few-shot":
            drawn = evaluation.agents, players.expert, style, seed
            examples = {f.label: expert_examples(int(rest), f, *drawn) for f in settings.games.families}
        elif name != "base":
            put_adapter(policy(), adapters.chain(name)[0])  # only the first was trained on this base
            lora.remove(policy().model)
            with library_errors(name):
                adapter = adapters.read_chain(name)
                with adapter_on(policy(), *adapter):
                    pass  # the shapes fit
        how = style, evaluation.temperature, seed
        return partial(policy_player, policy(), *how, adapter=adapter, examples=examples)

    return {name: make(name) for name in dict.fromkeys(names)}


# -------------------- rows


def with_baselines(settings: Settings, results: dict[str, dict]) -> dict[str, dict]:
    """The results and, where they are not among them, the rows with which every table ends: the other seats'
    expert, the constant answer with the higher U2 and random play; among partners both constant answers."""
    players, seed = settings.players, settings.evaluation.seed

    def row(expert: Expert) -> dict:
        if f"expert:{expert.name}" in results:
            return results[f"expert:{expert.name}"]
        make = partial(expert_player, expert, players.style, seed)
        return summarise(play_among_experts(settings, expert.name, make))

    rows = {name: row(players.make_expert(name)) for name in CONSTANTS}
    if not players.partners:
        best = max(rows, key=lambda name: rows[name]["all rounds"]["U2"]["mean"])
        chance = players.make_expert("random")
        rows = {players.expert.name: row(players.expert), best: rows[best], chance.name: row(chance)}
    return results | {f"expert:{name}": summary for name, summary in rows.items()}


def evaluate_run(settings: Settings, policy: Policy, folder: Path) -> dict[str, dict]:
    """The rows of a training run, written to FOLDER/eval.json: the trained policy, its SFT stage, the base
    model and the baselines, on the same games. Replies are sampled with random numbers of the run's own seed:
    with the same ones in all runs, intervals over runs would be too narrow. Removes the policy's adapter."""
    results: dict[str, dict] = {}
    how = settings.players.style, settings.evaluation.temperature, settings.run.seed

    def row(name, policy):
        return summarise(play_among_experts(settings, name, partial(policy_player, policy, *how)))

    results[settings.rft.algo] = row("the policy", policy)
    lora.remove(policy.model)  # what is left is the SFT policy
    results["sft"] = row("sft", policy)
    results["base"] = row("base", settings.model.load())
    results = with_baselines(settings, results)
    if ranks.first():
        write_json(folder / "eval.json", {"arguments": settings.flags, "results": results})
    return results


def evaluate_names(settings: Settings, names: list[str], repair: bool) -> dict[str, dict]:
    """One row for each policy, then the baselines. Prints the tables."""
    results: dict[str, dict] = {}
    for name, make_player in make_cast(settings, names).items():
        results[name] = summarise(play_among_experts(settings, name, make_player))
        if repair and name != human.NAME and not name.startswith("expert:"):
            lenient = play_among_experts(settings, name, make_player, repair=True)
            results[f"{name} repaired"] = summarise(lenient)
    results = with_baselines(settings, results)
    titles = {"all": "self-play: the policy in all seats\n", "random": "a random seat of each game\n"}
    print(titles.get(settings.evaluation.seat, "") + report(results))
    if repair:
        counts = ", ".join(f"{n} {s['repaired']}" for n, s in results.items() if n.endswith(" repaired"))
        print(f"\nreplies that are not compliant, but in which a decision was read and played: {counts}")
    return results


def evaluate_table(settings: Settings, names: list[str]) -> dict[str, dict]:
    """{`seat I NAME`: summary} of games in which every seat has its own player; a name in several seats is
    one player. Prints the table."""
    makers, results = make_cast(settings, names, "--table"), {}
    for k, (name, make) in enumerate(makers.items()):
        makers[name] = partial(make, stream=Stream.PLAYERS + k)
    episodes = play_held_out(settings, "all", makers, names, names)
    for i, name in enumerate(names):
        own = [replace(p, turns=[t for t in p.turns if t.seat == i]) for p in episodes]
        results[f"seat {i} {name}"] = summarise(own)
    print(format_table({row: summary["all rounds"] for row, summary in results.items()}))
    return results


def playing_parser(description: str, *words: str) -> argparse.ArgumentParser:
    """The flags that the scripts which only play games share. Seats are theirs alone, since a training run is
    evaluated as it was trained. words: for --seat."""
    parser = argparse.ArgumentParser(description=description)
    add_flags(parser, Model, Games, Players, Playing)
    kinds = {"random": "one drawn for each game", "all": "self-play", "rotate": "0, 1, ... over the games"}
    text = "; ".join(["the policy's seat, from 0 [source: 0]", *(f"{word}: {kinds[word]}" for word in words)])
    seat, metavar = number_or_word(*words), "|".join(["SEAT", *words])
    parser.add_argument("--seat", type=seat, metavar=metavar, default=0, help=text)
    return parser


@reports_errors
def main(argv=None) -> None:
    text = "Play held-out games with policies and experts in the seats."
    parser = playing_parser(text, "random", "all")
    add = parser.add_argument
    names = "base, few-shot:K, an adapter folder (FOLDER+FOLDER: a chain), expert:NAME, human"
    add("--policy", nargs="+", default=["base"], help=names)
    add("--repair", action="store_true", help="add rows in which replies are read leniently")
    add("--table", nargs="+", metavar="PLAYER", help="a player for each seat, named as in --policy")
    add("--json", metavar="FILE", help="write the results, per instance too, to a new file")
    add("--seeds", nargs="+", metavar="EVAL_JSON", help="play nothing: combine these runs' eval.json")
    ranks.start()
    args = parser.parse_args(argv)
    if args.seeds:
        print(report_seeds(args.seeds))
        return
    if args.json:
        refuse_existing(args.json)
    if args.table and (args.seat or args.repair or args.partners):
        raise InputError("--table names a player for each seat: leave out --seat, --repair and --partners")
    if args.table and (len(args.table) != args.agents or args.policy != ["base"]):
        needed = f"a player for each of the {args.agents} seats (--agents)"
        raise InputError(f"--table names {needed}: leave out --policy")
    settings = flags.resolve(args)
    instances(settings.games, settings.evaluation)  # complains about its flags before a model is loaded
    if args.table:
        results = evaluate_table(settings, args.table)
    else:
        results = evaluate_names(settings, args.policy, args.repair)
    print_report()
    if args.json and ranks.first():
        write_json(args.json, {"arguments": settings.flags, "results": results})
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

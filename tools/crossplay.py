"""Cross-play: every player against every other on the held-out games.

    python -m tools.crossplay --player base runs/tompo/adapter expert:second-best expert:always-link

Entry (i, j): player i sits in one seat, player j in all others. Two tables: U3, how well the whole table
does, and U2 of the decisions in i's seat, how well i answers what j plays; means over games with 95 % t
intervals. Read U2 beside U3: where nobody in the other seats links with player i, all its links are equally
good, and U2 is 1. All entries play the same games with the same seats and random numbers.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
from functools import partial
from itertools import product

import settings as flags
from eval import instances, make_cast, play_held_out, playing_parser
from play.intervals import mean_interval
from play.metrics import per_instance
from play.report import format_table
from run import ranks
from run.errors import InputError, reports_errors
from run.seeds import Stream

DEFAULT = ["expert:second-best", "expert:planner", "expert:nash", "expert:always-link", "expert:random"]
SHOWN = {"U3": "U3, welfare of all against the first best", "U2": "U2 of the seat that the row's player has"}


def cross_play(settings: flags.Settings, names: list[str]) -> dict[tuple[str, str], list[dict]]:
    """{(player in one seat, player in all others): the metrics of each game}."""
    cast, pairs = make_cast(settings, names, "--player"), {}
    for a, b in product(names, names):
        makers = {True: partial(cast[a], Stream.PLAYERS), False: partial(cast[b], Stream.PLAYERS + 1)}
        played = play_held_out(settings, settings.evaluation.seat, makers, [a, b])
        pairs[a, b] = [per_instance(game) for game in played]
    return pairs


@reports_errors
def main(argv=None) -> None:
    parser = playing_parser("Every player against every other on the held-out games.", "rotate")
    parser.add_argument("--player", nargs="+", default=DEFAULT, help="as --policy of eval.py")
    ranks.start()
    args = parser.parse_args(argv)
    if args.partners:
        raise InputError("--player names who meets whom: leave out --partners")
    names = list(dict.fromkeys(args.player))
    if len(names) < 2:
        raise InputError("--player: cross-play needs at least two different players")
    settings = flags.resolve(args)
    games = instances(settings.games, settings.evaluation)
    pairs = cross_play(settings, names)
    print(f"{len(games)} games of {args.agents}; row: in one seat ({args.seat}), column: in all others")
    columns = {f"against {k}": name for k, name in enumerate(names, 1)}  # adapters have long names
    for metric, title in SHOWN.items():
        rows = {
            f"{k} {a}": {c: mean_interval(game[metric] for game in pairs[a, b]) for c, b in columns.items()}
            for k, a in enumerate(names, 1)
        }
        print(f"\n{title}\n{format_table(rows, list(columns))}")


if __name__ == "__main__":
    main()

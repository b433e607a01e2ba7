"""Cross-play: every player against every other on the held-out games.

    python -m tools.crossplay --player base runs/tompo/adapter expert:second-best expert:always-link

Entry (i, j): player i sits in one seat, player j in all others. Two tables: U3, how well the whole table
does, and U2 of the decisions in i's seat, how well i answers what j plays; means over games with 95 % t
intervals. The diagonal is self-play. Down a column the opponents are the same, so a column compares players;
a row shows how one player's results depend on whom it meets. A policy trained among experts has met nobody
else: off the expert's column it is out of its training. Read U2 beside U3: where nobody in the other seats
links with the one, all its links are equally good, and U2 is 1.

Players are named as in eval.py; adapters share one base model in memory. All entries play the same games with
the same seats and random numbers, so they are paired by game.
"""

import argparse

from games import Game
from play import human
from play.held_out import add_eval_arguments, add_sampling_arguments, by_stages, held_out_instances
from play.metrics import mean_interval, per_instance, tell_interval
from play.players import make_cast, play_tables
from run import dataset, ranks
from run.files import InputError, refuse_existing, reports_errors, seat_choice, write_json
from run.training import add_model_arguments

DEFAULT = ["expert:second-best", "expert:planner", "expert:nash", "expert:always-link", "expert:random"]
SHOWN = {"U3": "U3, welfare of all against the first best", "U2": "U2 of the seat that the row's player has"}


def seats_of(instances: list[Game], seat: int | str) -> list[int]:
    """The row player's seat in each game; `rotate`: 0, 1, ..., N-1, 0, ..."""
    return [i % g.N if seat == "rotate" else seat for i, g in enumerate(instances)]


def play_pair(args, make_one, make_rest, label: str, person: bool = False) -> list[dict]:
    """The metrics of one player in one seat and another in the others, per game. person: one of them is."""
    instances = held_out_instances(args)
    seats = seats_of(instances, args.seat)

    def play_part(part, first):
        one, rest = make_one(stream=100), make_rest(stream=101)
        tables = [[one if j == seats[i] else rest for j in range(instances[i].N)] for i in part]
        of_part = [instances[i] for i in part], tables, [(seats[i],) for i in part]
        return play_tables(*of_part, dataset.expert_of(args), args.eval_seed, label, first=first)

    return [per_instance(played) for played in by_stages(instances, play_part, person)]


def format_matrix(names: list[str], values: dict[tuple[str, str], dict]) -> str:
    """values: {(row, column): mean and interval}. Columns are numbered, because adapters have long names."""

    rows = [["", *(f"against {k}" for k in range(1, len(names) + 1))]]
    rows += [[f"{k} {a}", *(tell_interval(values[a, b]) for b in names)] for k, a in enumerate(names, 1)]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(text.ljust(w) for text, w in zip(row, widths)).rstrip() for row in rows)


def plot(path: str, names: list[str], tables: dict[str, dict[tuple[str, str], dict]]) -> None:
    """One heat map for each metric, side by side."""
    from matplotlib.figure import Figure

    short = [name if len(name) <= 28 else "..." + name[-25:] for name in names]
    size = 2.5 + 0.9 * len(names)
    figure = Figure(figsize=(size * len(tables), size), layout="constrained")
    for axis, (metric, values) in zip(figure.subplots(1, len(tables)), tables.items()):
        means = [[values[a, b]["mean"] for b in names] for a in names]
        low = min(0, *map(min, means))
        axis.imshow(means, vmin=low, vmax=1, cmap="viridis")
        axis.set(title=SHOWN[metric], xlabel="in all other seats", ylabel="in one seat")
        axis.set_xticks(range(len(names)), short, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), short)
        for i, row in enumerate(means):
            for j, mean in enumerate(row):
                colour = "black" if 2 * mean > low + 1 else "white"
                axis.text(j, i, f"{mean:.2f}", ha="center", va="center", color=colour)
    figure.savefig(path, dpi=110)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Every player against every other on the held-out games.")
    add_model_arguments(parser)
    dataset.add_style_arguments(parser)
    add_eval_arguments(parser, seat=False)
    add = parser.add_argument
    add(
        "--player", nargs="+", default=DEFAULT, help="base, few-shot:K, an adapter folder, expert:NAME, human"
    )
    add_sampling_arguments(parser)
    seat = dict(type=seat_choice("rotate"), default=0, metavar="SEAT|rotate")
    add("--seat", **seat, help="the row player's, from 0; rotate: 0, 1, ... over the games")
    add("--json", metavar="FILE", help="write means, intervals and per-game values to a new file")
    add("--png", metavar="FILE", help="draw the two tables as heat maps in a new file")
    ranks.start()
    args = parser.parse_args(argv)
    for path in filter(None, (args.json, args.png)):
        refuse_existing(path)
    if args.png and not args.png.endswith(".png"):
        raise InputError(f"--png {args.png}: name a file that ends in .png")
    names = list(dict.fromkeys(args.player))
    if len(names) < 2:
        raise InputError("--player: cross-play needs at least two different players")
    instances = held_out_instances(args)
    dataset.expert_of(args)
    cast = make_cast(args, names, args.eval_seed, "--player")
    games = {
        (a, b): play_pair(args, cast[a], cast[b], f"{a} among {b}", human.NAME in (a, b))
        for a in names
        for b in names
    }
    tables = {
        m: {pair: mean_interval([row[m] for row in rows]) for pair, rows in games.items()} for m in SHOWN
    }
    where = "seats in turn" if args.seat == "rotate" else f"seat {args.seat}"
    print(f"{len(instances)} games of {args.eval_agents}; row: in one seat ({where}), column: in all others")
    for metric, title in SHOWN.items():
        print(f"\n{title}\n{format_matrix(names, tables[metric])}")
    if not ranks.first():
        return
    if args.json:
        played = [g.to_json() for g in instances]
        pairs = [
            {"one": a, "rest": b} | {m: tables[m][a, b] | {"games": [row[m] for row in rows]} for m in SHOWN}
            for (a, b), rows in games.items()
        ]
        write_json(args.json, {"arguments": vars(args), "instances": played, "pairs": pairs})
        print(f"\nwritten: {args.json}")
    if args.png:
        plot(args.png, names, tables)
        print(f"drawn: {args.png}")


if __name__ == "__main__":
    main()

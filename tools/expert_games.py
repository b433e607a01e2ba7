"""Write the expert data set, one readable decision per line.

python -m tools.expert_games --games 126 --out expert_games.jsonl
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
import argparse

from play.records import write_records
from run.errors import InputError, reports_errors
from run.files import refuse_existing
from run.flags import add_flags, from_flags
from run.values import seed_int
from settings import Data, Games, Players
from teachers.language import print_report


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write the expert data set: one decision per line, as JSON.")
    add_flags(parser, Games, Players, Data)
    add = parser.add_argument
    add("--out", default="expert_games.jsonl", help="the file to write")
    add("--seed", type=seed_int, default=0, help="seed of instances and noise")
    add("--split", choices=("train", "held-out"), default="train", help="which instances are drawn")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    games, players = from_flags(Games, args), from_flags(Players, args)
    data = from_flags(Data, args, seed=args.seed)
    if isinstance(data.games, str):
        raise InputError("--games must be a number here: the games are played, and not read from a file")
    if players.self_play:
        raise InputError("--partners self is for train_rft.py, which plays with the policy that it trains")
    records = data.simulate(games, players, data.games, args.split)
    write_records(args.out, records)
    print(f"{args.out}: {len(records)} decisions of {data.games} games by {args.expert}")
    print_report()


if __name__ == "__main__":
    main()

"""Write the expert data set, one readable decision per line.

python -m tools.expert_games --games 126 --out expert_games.jsonl
"""

import argparse

import settings as flags
from play.dataset import write_records
from run.errors import InputError, reports_errors
from run.files import refuse_existing
from teachers.language import print_report


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write the expert data set: one decision per line, as JSON.")
    for add_flags in (flags.add_game_flags, flags.add_player_flags, flags.add_data_flags):
        add_flags(parser)
    add = parser.add_argument
    add("--out", default="expert_games.jsonl", help="the file to write")
    add("--seed", type=flags.seed_int, default=0, help="seed of instances and noise")
    add("--split", choices=("train", "held-out"), default="train", help="which instances are drawn")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    games, players, data = flags.resolve_games(args), flags.resolve_players(args), flags.resolve_data(args)
    if data.file:
        raise InputError("--games must be a number here: the games are played, and not read from a file")
    records = data.simulate(games, players, data.games, args.split)
    write_records(args.out, records)
    print(f"{args.out}: {len(records)} decisions of {data.games} games by {args.expert}")
    print_report()


if __name__ == "__main__":
    main()

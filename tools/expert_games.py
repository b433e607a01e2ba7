"""Write the expert data set, one readable decision per line.

python -m tools.expert_games --games 126 --out expert_games.jsonl
"""

import argparse

from run.dataset import add_data_arguments, expert_of, simulate_args, write_records
from run.files import refuse_existing, reports_errors, seed_int


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write the expert data set: one decision per line, as JSON.")
    add_data_arguments(parser)
    parser.add_argument("--out", default="expert_games.jsonl", help="the file to write")
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of instances and noise")
    parser.add_argument(
        "--split", choices=("train", "held-out"), default="train", help="which instances are drawn"
    )
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    expert = expert_of(args)
    records = simulate_args(args, args.games, args.seed, args.split)
    write_records(args.out, records)
    print(f"{args.out}: {len(records)} decisions of {args.games} games by {args.expert}")
    if hasattr(expert, "report"):
        print(expert.report())


if __name__ == "__main__":
    main()

"""Evaluation: held-out games with the policy in one seat and experts in the others, or with any players in any seats.

    python eval.py --policy base runs/rft/sft/adapter runs/rft/adapter --json results.json
    python eval.py --policy runs/rft/adapter --seat all           # self-play; --seat random: one seat drawn per game
    python eval.py --policy runs/rft/adapter --by-seat            # the same games once for every seat
    python eval.py --table runs/rft/adapter base expert:nash expert:nash             # a player for each seat
    python eval.py --policy base --few-shot 3 --repair            # what prompting and lenient reading do
    python eval.py --seeds runs/seed0/eval.json runs/seed1/eval.json runs/seed2/eval.json

--policy takes `base` (the model without an adapter), adapter folders, `few-shot:K` and `expert:NAME`. The rows
`expert:random` and that of the other seats' expert are always added. Every policy plays the same instances (the fixed
held-out grid), in the same seat, against the same draws of the experts, so rows can be compared game by game.

--repair adds, for every policy that is a model, a row `NAME repaired`: of replies that are not compliant, what can be
read in them is played (prompts.repair_reply). U1 is the strict one there too. The strict row minus this one is what
formatting costs; what is left between repaired rows is strategy.

The metrics: see metrics.py. In self-play s, row and the experts' graph are those of --expert in all seats.
"""

import argparse
import zlib

import numpy as np

import experts
import games
from teachers import language as llm_experts
from run import ranks
from games import Game
from world.draws import families, held_out_grid
from play.metrics import METRICS, Played, format_table, mean_over_seats, of_seat, report, report_seeds, summarise
from play.players import expert_player, make_cast, play, play_tables, policy_player
from policy import Policy
from run.files import InputError, number, positive_int, read_json, refuse_existing, reports_errors, seat_choice, seed_int
from run.files import write_json
from train_sft import add_model_arguments


# ---------------------------------------------------------------------------------------------------------------------
# games and seats


def add_eval_arguments(parser: argparse.ArgumentParser, seat_flag: str | None = "--seat") -> None:
    """seat_flag: training has a --seat of its own, which is then the default; None: no flag."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-agents", type=positive_int, default=4, help="agents of the evaluation games")
    group.add_argument("--eval-games", type=positive_int, default=60, help="games of the grid (evenly spread; 60 = all)")
    temperature = dict(type=number(float, 0), default=1.0, help="0 is greedy; 1 is the law that is trained")
    group.add_argument("--eval-temperature", **temperature)
    group.add_argument("--max-new-tokens", type=positive_int, help="longest reply (default: 20 + 7 N)")
    group.add_argument("--eval-seed", type=seed_int, default=0, help="of sampling and expert draws in evaluation")
    if seat_flag is None:
        return
    default, more = (0, "") if seat_flag == "--seat" else (None, " (default: that of --seat)")
    told = "the policy's seat, from 0 [source: 0]; random: one drawn for each game; all: self-play" + more
    seat = dict(type=seat_choice("random", "all"), metavar="SEAT|random|all")
    group.add_argument(seat_flag, **seat, default=default, help=told)


def seat_of(args) -> int | str:
    evaluated = getattr(args, "eval_seat", None)
    return args.seat if evaluated is None else evaluated


def held_out_instances(args) -> list[Game]:
    seat = seat_of(args)
    if not 3 <= args.eval_agents <= games.MAX_AGENTS or not (isinstance(seat, str) or 0 <= seat < args.eval_agents):
        raise InputError(f"--eval-agents must be 3 to {games.MAX_AGENTS}, and the seat one of 0 to agents - 1")
    grid = [game for family in families(args) for game in held_out_grid(args.eval_agents, family)]
    chosen = np.linspace(0, len(grid) - 1, min(args.eval_games, len(grid))).round().astype(int)
    return [grid[i] for i in chosen]


def seats_in(instances: list[Game], seat: int | str, seed: int) -> list[tuple[int, ...]]:
    """The policy's seats in each game. A random one belongs to the seed and the game, so it is the same for all
    policies, however many games are played."""
    if seat == "all":
        return [tuple(range(g.N)) for g in instances]
    if seat == "random":
        return [(int(np.random.default_rng([seed, zlib.crc32(g.key.encode()), 0, 0, 1]).integers(g.N)),) for g in instances]
    return [(seat,)] * len(instances)


def by_stages(instances: list[Game], play_part) -> list[Played]:
    """Plays together the games that have the same stages and rounds. play_part: their indices -> their games played."""
    played: dict[int, Played] = {}
    for stages in dict.fromkeys((g.stages, g.rounds) for g in instances):
        part = [i for i, g in enumerate(instances) if (g.stages, g.rounds) == stages]
        played |= zip(part, play_part(part), strict=True)
    return [played[i] for i in range(len(instances))]


def play_held_out(args, make_player, label: str, seat: int | str | None = None, repair: bool = False) -> list[Played]:
    """One kind of player on the held-out games of these arguments, in its seat or seats and experts in the others."""
    instances = held_out_instances(args)
    seats = seats_in(instances, seat_of(args) if seat is None else seat, args.eval_seed)

    def play_part(part):
        of_part = [instances[i] for i in part], make_player(), [seats[i] for i in part]
        return play(*of_part, experts.expert_of(args), args.eval_seed, label, repair)

    return by_stages(instances, play_part)


def evaluate_policy(args, policy: Policy, label: str) -> dict:
    settings = experts.style_of(args), args.max_new_tokens, args.eval_temperature, args.eval_seed
    return summarise(play_held_out(args, lambda: policy_player(policy, *settings), label))


def evaluate_expert(args, name: str) -> dict:
    settings = experts.expert_of(args, name), experts.style_of(args), args.eval_seed
    return summarise(play_held_out(args, lambda: expert_player(*settings), f"expert:{name}"))


# ---------------------------------------------------------------------------------------------------------------------
# what can be asked for


def evaluate_names(args) -> dict[str, dict]:
    """One row for each policy, then the experts."""
    names = [*args.policy, *([f"few-shot:{args.few_shot}"] if args.few_shot else [])]
    names = list(dict.fromkeys([*names, f"expert:{args.expert}", "expert:random"]))
    results = {}
    for name, make_player in make_cast(args, names).items():
        results[name] = summarise(play_held_out(args, make_player, name))
        if args.repair and not name.startswith("expert:"):
            row = f"{name} repaired"
            results[row] = summarise(play_held_out(args, make_player, row, repair=True))
    return results


def evaluate_by_seat(args, make_player, name: str) -> tuple[dict[str, dict], dict]:
    """({`seat I`: summary of the policy in that seat}, their mean)."""
    played = {f"seat {i}": play_held_out(args, make_player, f"{name} in seat {i}", i) for i in range(args.eval_agents)}
    return {seat: summarise(p) for seat, p in played.items()}, mean_over_seats(list(played.values()))


def evaluate_table(args) -> dict[str, dict]:
    """{`seat I NAME`: summary} of games in which every seat has its own player; a name in several seats is one player."""
    makers, instances = make_cast(args, args.table, "--table"), held_out_instances(args)

    def play_part(part):
        cast = {name: make(stream=100 + k) for k, (name, make) in enumerate(makers.items())}
        table, seats = [cast[name] for name in args.table], tuple(range(args.eval_agents))
        of_part = [instances[i] for i in part], [table] * len(part), [seats] * len(part)
        return play_tables(*of_part, experts.expert_of(args), args.eval_seed, "the table")

    played = by_stages(instances, play_part)
    return {f"seat {i} {name}": summarise(of_seat(played, i)) for i, name in enumerate(args.table)}


def read_results(path: str) -> dict[str, dict]:
    """The results in an eval.json. Raises InputError."""
    try:
        results = read_json(path)["results"]
        for summary in results.values():
            summary["instances"], [summary["all rounds"][m]["mean"] for m in METRICS]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path} is not an eval.json of this version; give those that train_rft.py or --json wrote") from None
    return results


def combine_seeds(paths: list[str]) -> str:
    runs = [read_results(path) for path in paths]
    played = [[i["instance"] for i in next(iter(run.values()))["instances"]] for run in runs]
    for path, of_run, run in zip(paths, played, runs):
        if of_run != played[0]:
            raise InputError(f"{path} was played on other games than {paths[0]}; give runs with the same flags")
        if list(run)[0] != list(runs[0])[0]:
            raise InputError(f"{path} is a run of {list(run)[0]}, {paths[0]} of {list(runs[0])[0]}; give one kind")
    return report_seeds(runs)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Play held-out games with policies and experts in the seats.")
    add_model_arguments(parser)
    experts.add_style_arguments(parser)
    add_eval_arguments(parser)
    parser.add_argument("--policy", nargs="+", default=["base"], help="base, few-shot:K, an adapter folder, expert:NAME")
    parser.add_argument("--few-shot", type=positive_int, metavar="K", help="add few-shot:K: base after K expert games")
    parser.add_argument("--repair", action="store_true", help="add rows in which replies are read leniently")
    parser.add_argument("--by-seat", action="store_true", help="each policy in every seat of the same games, and the mean")
    parser.add_argument("--table", nargs="+", metavar="PLAYER", help="a player for each seat, named as in --policy")
    parser.add_argument("--json", metavar="FILE", help="write the results, per instance too, to a new file")
    parser.add_argument("--seeds", nargs="+", metavar="EVAL_JSON", help="play nothing: combine these runs' eval.json")
    ranks.start()
    args = parser.parse_args(argv)
    if args.seeds:
        print(combine_seeds(args.seeds))
        return
    if args.json:
        refuse_existing(args.json)
    held_out_instances(args)  # complains about its flags before a model is loaded
    experts.expert_of(args)
    if (args.by_seat or args.table) and (args.seat or args.repair or args.few_shot or (args.by_seat and args.table)):
        raise InputError("--by-seat and --table take no --seat, --few-shot or --repair, nor one another")
    if args.table and len(args.table) != args.eval_agents:
        raise InputError(f"--table names {len(args.table)} players, but a game has {args.eval_agents} seats (--eval-agents)")
    if args.by_seat:
        names, results = list(dict.fromkeys(args.policy)), {}
        for name, make_player in make_cast(args, names).items():
            seats, mean = evaluate_by_seat(args, make_player, name)
            print("\n" * bool(results) + f"{name} in each seat, {args.expert} in the others")
            print(format_table({seat: s["all rounds"] for seat, s in seats.items()} | {"mean": mean}), flush=True)
            results |= {f"{name} {seat}": summary for seat, summary in seats.items()}
    elif args.table:
        results = evaluate_table(args)
        print(format_table({row: summary["all rounds"] for row, summary in results.items()}))
    else:
        results = evaluate_names(args)
        if isinstance(args.seat, str):
            print("self-play: the policy in all seats" if args.seat == "all" else "the policy in a random seat of each game")
        print(report(results, args.rounds))
        if args.repair:
            read = ", ".join(f"{n} {s['repaired']}" for n, s in results.items() if n.endswith(" repaired"))
            print(f"\nreplies that are not compliant, but in which a decision was read and played: {read}")
    llm_experts.print_report()
    if args.json and ranks.first():
        write_json(args.json, {"arguments": vars(args), "results": results})
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

"""Evaluation: held-out games with the policy in one seat and experts in the others, or any players anywhere.

    python eval.py --policy base runs/tompo/sft/adapter runs/tompo/adapter --json out.json
    python eval.py --policy runs/tompo/adapter --seat all    # self-play; random: one seat drawn per game
    python eval.py --policy runs/tompo/adapter --by-seat     # the same games once for every seat
    python eval.py --table runs/tompo/adapter base expert:nash expert:nash      # a player for each seat
    python eval.py --table human runs/tompo/adapter expert:nash expert:nash     # you among them
    python eval.py --policy base --few-shot 3 --repair     # what prompting and lenient reading do
    python eval.py --seeds runs/seed0/eval.json runs/seed1/eval.json runs/seed2/eval.json

--policy takes `base` (the model without an adapter), adapter folders, `few-shot:K`, `expert:NAME` and `human`
(play/human.py). Without --by-seat and --table, rows for --expert and `expert:random` are added. Every policy
plays the same instances (the fixed held-out grid), in the same seat, against the same draws of the experts,
so rows can be compared game by game.

--repair adds, for every policy that is a model, a row `NAME repaired`: of replies that are not compliant,
what can be read in them is played (play/repair.py), while U1 stays strict. The repaired row minus the strict
one is what formatting costs; what is left between repaired rows is strategy.

Metrics: play/metrics.py. In self-play s and row compare with what --expert would play in all seats.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: it says how idle threads wait)
import argparse

from play import human
from play.held_out import (
    add_eval_arguments,
    add_sampling_arguments,
    by_stages,
    held_out_instances,
    play_held_out,
    seed_of,
)
from play.metrics import format_table, mean_over_seats, of_seat, report, report_seeds, summarise
from play.players import make_cast, play_tables
from run import dataset, ranks
from run.files import InputError, positive_int, refuse_existing, reports_errors, write_json
from run.training import add_model_arguments


def evaluate_names(args) -> dict[str, dict]:
    """One row for each policy, then the experts."""
    names = [*args.policy, *([f"few-shot:{args.few_shot}"] if args.few_shot else [])]
    names = list(dict.fromkeys([*names, f"expert:{args.expert}", "expert:random"]))
    results = {}
    for name, make_player in make_cast(args, names, seed_of(args)).items():
        results[name] = summarise(play_held_out(args, make_player, name, person=name == human.NAME))
        if args.repair and name != human.NAME and not name.startswith("expert:"):
            row = f"{name} repaired"
            results[row] = summarise(play_held_out(args, make_player, row, repair=True))
    return results


def evaluate_by_seat(args, make_player, name: str) -> tuple[dict[str, dict], dict]:
    """({`seat I`: summary of the policy in that seat}, their mean)."""
    played = {
        f"seat {i}": play_held_out(args, make_player, f"{name} in seat {i}", i, person=name == human.NAME)
        for i in range(args.eval_agents)
    }
    return {seat: summarise(p) for seat, p in played.items()}, mean_over_seats(list(played.values()))


def evaluate_table(args) -> dict[str, dict]:
    """{`seat I NAME`: summary} of games in which every seat has its own player; a name in several seats is
    one player."""
    makers, instances = make_cast(args, args.table, seed_of(args), "--table"), held_out_instances(args)

    def play_part(part, first):
        cast = {name: make(stream=100 + k) for k, (name, make) in enumerate(makers.items())}
        table, seats = [cast[name] for name in args.table], tuple(range(args.eval_agents))
        of_part = [instances[i] for i in part], [table] * len(part), [seats] * len(part)
        return play_tables(*of_part, dataset.expert_of(args), seed_of(args), "the table", first=first)

    played = by_stages(instances, play_part, human.NAME in args.table)
    return {f"seat {i} {name}": summarise(of_seat(played, i)) for i, name in enumerate(args.table)}


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Play held-out games with policies and experts in the seats."
    )
    add_model_arguments(parser)
    dataset.add_style_arguments(parser)
    add_eval_arguments(parser)
    add = parser.add_argument
    add_sampling_arguments(parser)
    told = "base, few-shot:K, an adapter folder (FOLDER+FOLDER: a chain), expert:NAME, human"
    add("--policy", nargs="+", help=f"{told} (default: base)")
    add("--few-shot", type=positive_int, metavar="K", help="add few-shot:K: base after K expert games")
    add("--repair", action="store_true", help="add rows in which replies are read leniently")
    add("--by-seat", action="store_true", help="each policy in every seat of the same games, and the mean")
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
    held_out_instances(args)  # complains about its flags before a model is loaded
    dataset.expert_of(args)
    one_seat = args.by_seat or args.table
    if one_seat and (args.seat or args.repair or args.few_shot or (args.by_seat and args.table)):
        raise InputError("--by-seat and --table take no --seat, --few-shot or --repair, nor one another")
    if args.table and args.policy:
        raise InputError("--table names a player for every seat: leave out --policy")
    args.policy = args.policy or ["base"]
    if args.table and len(args.table) != args.eval_agents:
        agents = f"a game has {args.eval_agents} seats (--eval-agents)"
        raise InputError(f"--table names {len(args.table)} players, but {agents}")
    if args.by_seat:
        names, results = list(dict.fromkeys(args.policy)), {}
        for name, make_player in make_cast(args, names, seed_of(args)).items():
            seats, mean = evaluate_by_seat(args, make_player, name)
            print("\n" * bool(results) + f"{name} in each seat, {args.expert} in the others")
            rows = {seat: summary["all rounds"] for seat, summary in seats.items()} | {"mean": mean}
            print(format_table(rows), flush=True)
            results |= {f"{name} {seat}": summary for seat, summary in seats.items()}
    elif args.table:
        results = evaluate_table(args)
        print(format_table({row: summary["all rounds"] for row, summary in results.items()}))
    else:
        results = evaluate_names(args)
        if isinstance(args.seat, str):
            print(
                {"all": "self-play: the policy in all seats", "random": "a random seat of each game"}[
                    args.seat
                ]
            )
        print(report(results, args.rounds))
        if args.repair:
            read = ", ".join(f"{n} {s['repaired']}" for n, s in results.items() if n.endswith(" repaired"))
            print(f"\nreplies that are not compliant, but in which a decision was read and played: {read}")
    dataset.print_report()
    if args.json and ranks.first():
        write_json(args.json, {"arguments": vars(args), "results": results})
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

"""The flags of RFT alone, and which of them do not go together."""

import argparse

import tompo
import variants.objective  # noqa: F401  (its import fills the tables of tompo)
from experts import is_language
from rewards import FIXED_TERMS, GRAPH_SCORES, TERMS, WEIGHTS
from run import dataset
from run.files import InputError, number, positive_int
from variants.credit import CREDIT
from world.draws import named_numbers


def add_rft_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "reinforcement", "The second stage: sample, reward, compare within groups, step."
    )
    add, weight = group.add_argument, number(float, 0)
    add("--algo", choices=tompo.ALGORITHMS, default="tompo", help="grpo is the sample level alone")
    told = "start from this SFT adapter (FOLDER+FOLDER: a chain), not from a new one"
    add("--sft-adapter", metavar="FOLDER", help=told)
    add("--steps", type=positive_int, default=20, help="optimizer steps (sampling rounds)")
    told = "graph and effort decisions per step"
    add("--prompts", nargs=2, type=number(int, 0), default=(8, 2), metavar=("GRAPH", "EFFORT"), help=told)
    add("--m", type=number(int, 2), default=8, help="replies per prompt: the group")
    add("--lr", type=weight, default=2e-4, help="peak learning rate (warm-up, then cosine to 0)")
    add("--inner-epochs", type=positive_int, default=1, help="optimizer steps on the same samples")
    add("--temperature", type=weight, default=1.0, help="of sampling and of every log-probability")
    group = parser.add_argument_group("reward and objective", "Each in its place in rewards.py and tompo.py.")
    add = group.add_argument
    told = ", ".join(f"{name}={WEIGHTS.get(name, 0)}" for name in {**WEIGHTS, **TERMS})
    add("--reward", nargs="+", metavar="NAME=WEIGHT", help=f"weights of optional terms ({told})")
    levels = dict(nargs=2, type=weight, default=(0.8, 0.2), metavar=("SAMPLE", "GRAPH"))
    add("--level-weights", **levels, help="of A^S and A^G in graph decisions [source: 0.8 0.2]")
    told = "s: likeness to the expert graph; welfare; likeness of the graph of all trained seats' replies"
    add("--graph-score", choices=GRAPH_SCORES, default="hamming", help=told)
    told = "groups without variance: leave them out, train on them (their KL is left), ask others instead"
    add("--idle-groups", choices=("skip", "keep", "redraw"), default="skip", help=told)
    told = "credit by returns, not by likeness (variants/credit.py): [gamma=G] per round, [zeta=Z]"
    add("--credit", nargs="*", metavar="NAME=VALUE", help=told)
    told = "clip range of the ratio; two numbers: below and above 1"
    add("--clip-eps", nargs="+", type=weight, default=[0.2], help=told)
    add("--beta", type=weight, default=0.04, help="weight of KL(pi, pi_ref); 0 skips the reference")
    told = "; ".join(f"{name}: {', '.join(table)}" for name, table in tompo.TABLES.items())
    add(
        "--objective",
        nargs="+",
        metavar="NAME=CHOICE",
        help=f"variants of tompo.py, the first by default ({told})",
    )


def objective_of(args) -> dict[str, str]:
    """The choice of every table of tompo.py, by its name. Raises InputError."""
    chosen = {name: next(iter(table)) for name, table in tompo.TABLES.items()}
    for text in args.objective or ():
        name, _, choice = text.partition("=")
        if choice not in tompo.TABLES.get(name, ()):
            known = "; ".join(f"{name}={'|'.join(table)}" for name, table in tompo.TABLES.items())
            raise InputError(f"--objective {text}: write NAME=CHOICE, of {known}")
        chosen[name] = choice
    return chosen


def check_rft_arguments(args) -> None:
    """Raises InputError for flags that do not go together, before anything is trained."""
    weights = named_numbers(args.reward, "--reward", {**WEIGHTS, **TERMS})
    taken = [name for name in TERMS if name in FIXED_TERMS]
    if taken:
        raise InputError(f"the reward term {taken[0]} has the name of a fixed one; give it another")
    if weights.get("belief") and not args.belief:
        raise InputError("--reward belief is for the Belief line, which --no-belief switches off")
    if sum(args.prompts) == 0:
        raise InputError("--prompts 0 0: a step needs prompts")
    if args.train_on == "separate":
        advice = "use train_sft.py, or train on both"
        raise InputError(f"--train-on separate makes two adapters, RFT trains one policy: {advice}")
    if args.temperature <= 0:
        raise InputError("--temperature must be above 0: a greedy policy has no group to compare")
    if len(args.clip_eps) > 2:
        raise InputError("--clip-eps takes one number, or two: how far the ratio may go below and above 1")
    if args.credit is not None and is_language(args.expert):
        raise InputError(
            "--credit plays every game to its end with the expert: choose an exact --expert for it"
        )
    named_numbers(args.credit, "--credit", CREDIT)
    if args.graph_score == "joint" and (args.seat != "all" or args.idle_groups == "redraw"):
        raise InputError(
            "--graph-score joint asks all seats of a game at once: give --seat all, no --idle-groups redraw"
        )
    objective_of(args)
    dataset.expert_of(args)

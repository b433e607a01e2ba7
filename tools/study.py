"""The study: the same policy trained in many ways, over several seeds, and the results with intervals.

    python -m tools.study                            # all arms; hours. What is finished is never done again
    python -m tools.study --arms algorithm --seeds 0-3 --jobs 2
    python -m tools.study --jobs 12 --flags "--dtype bfloat16"   # on a large GPU; docs/speed.md
    python -m tools.study --report                   # tables and figures from results/study.jsonl, in seconds

An arm is a list of flags behind `python train_rft.py --seed S`. Its SFT stage is made once per seed and
shared by all arms whose flags do not change it, so arms are paired by seed, by game and by the experts'
draws. What is measured in a unit (an arm and a seed) becomes one line of the results file. A unit that fails
is named and does not stop the rest. A study that was killed continues where it was, also within a run.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

import settings
from eval import playing_parser
from run.errors import InputError, reports_errors
from run.files import JsonLines, cpu_name, read_json, read_lines
from run.values import number_or_range, positive_int
from tools import study_report
from tools.page.groups import read_prompts
from tools.page.text import rounded

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
STORED = ("U1", "s", "row", "U2", "U3", "belief", "U2 | ok", "U3 | ok")
PROBED = ("step", "seconds", "U1", "row", "s", "U2", "belief")


@dataclass(frozen=True)
class Arm:
    """flags: of train_rft.py; rft: more of them, which leave its SFT stage as it is; seeds: how many it is to
    have; of: the name of the arm whose policy plays (by default its own); sft: whether the SFT stage of that
    arm plays instead; evaluation: flags of eval.py in the place of those of the training."""

    name: str
    family: str
    flags: str = ""
    seeds: int = 4
    of: str | None = None
    sft: bool = False
    evaluation: str | None = None
    rft: str = ""


ALGORITHMS = ("tompo", "grpo", "sft")
PGG = "--game pgg --expert planner"
GAMES = {"GEE": "--stages GEE", "6 agents": "--agents 6", "PGG": PGG}
GAMES |= {"heterogeneous": "--types linear half hub"}
WHERE = {"few games": "--games 16", "6 agents": "--agents 6", "GGE": "--stages GGE", "PGG": PGG}
DR_GRPO = "--algo grpo --objective advantage=mean aggregation=constant"
GRAPH_ALONE = "--weights A_S=0 A_G=1"
ALL_SEATS = "--seat all --games 63"
ONE_GRAPH = f"{ALL_SEATS} --reward-from joint --prompts 2 2"
in_one_graph = partial(Arm, family="where it may act, one graph", evaluation="--seat all")
STAKES = f"{ALL_SEATS} --reward-from game"  # own payoff and welfare, in all seats: the levels disagree
in_stakes = partial(Arm, family="own stake and common good", evaluation="--seat all")
GIVERS = "--game pgg --types homogeneous --fix c=1 --partners planner --expert random --label-noise 0"
GIVERS += " --sft-steps 24 --steps 16 --prompts 2 8 --reward-from game --dtype bfloat16"
among_givers = partial(Arm, family="among those who give")  # does the policy give, too, or take a free ride?
NO_BONUS = "local=0 global=0"
OTHERS = settings.PRESETS["others"]  # which eval.py has no flag for
SEEN = " ".join(["--partners", *OTHERS["partners"], "--fix", *OTHERS["fix"]])
SEEN += f" --rounds {OTHERS['rounds']} --expert {OTHERS['expert']}"
to_read = partial(Arm, family="reading the others", flags="--preset others --dtype bfloat16", evaluation=SEEN)
REUSED = "--steps 5 --inner-epochs 4"  # a quarter of the replies, as many updates: rho leaves 1
in_epochs = partial(Arm, family="inner epochs", seeds=2)
LONG = "--steps 200 --dtype bfloat16"
once = partial(Arm, family="seen once", seeds=1)  # options on which no claim rests: what each of them does
TEACHERS = [
    *(Arm(f"label noise {rate}", "teachers", f"--label-noise {rate}", 3) for rate in (0, 0.25, 0.75, 0.9, 1)),
    Arm("SFT on efforts", "teachers", "--train-on effort", 2),  # no reply about links is ever compliant
    Arm("SFT on links", "teachers", "--train-on graph", 2),  # none about efforts is
]
ARMS = [  # in the order in which they are run; all others of a family are compared with its tompo
    Arm("tompo", "algorithm", seeds=8),
    Arm("grpo", "algorithm", "--algo grpo", 8),
    Arm("sft", "algorithm", seeds=8, sft=True),
    Arm("weights 0.5 0.5", "graph level", "--weights A_S=0.5 A_G=0.5", 8),
    Arm("weights 0.2 0.8", "graph level", "--weights A_S=0.2 A_G=0.8", 8),
    Arm("graph level alone", "graph level", GRAPH_ALONE, 6),
    Arm("no memory", "graph level", "--weights global=0"),
    Arm("no best of the group", "graph level", "--weights local=0"),
    Arm("neither bonus", "graph level", "--weights local=0 global=0"),
    Arm("welfare", "graph level", "--reward-from welfare"),
    Arm("Dr. GRPO", "objective", DR_GRPO),  # with a KL term, which its paper does without
    Arm("Dr. GRPO, beta 0", "objective", f"{DR_GRPO} --beta 0"),
    Arm("RLOO", "objective", "--algo grpo --objective advantage=loo"),
    in_epochs("5 steps", flags="--steps 5"),
    in_epochs("5 steps, 4 epochs", flags=REUSED),
    in_epochs("4 epochs, no clip", flags=f"{REUSED} --clip-eps 1000"),
    in_epochs("4 epochs, cispo", flags=f"{REUSED} --objective loss=cispo"),
    in_epochs("4 epochs, sequence ratio", flags=f"{REUSED} --objective ratio=sequence"),
    in_epochs("4 epochs, clip 0.2 0.4", flags=f"{REUSED} --clip-eps 0.2 0.4", seeds=1),
    once("token aggregation", flags="--objective aggregation=token"),
    once("KL k2", flags="--objective kl=k2"),
    once("credit", flags="--reward-from credit"),
    once("credit, zeta 0.5", flags="--reward-from credit --weights zeta=0.5"),
    once("own type alone", flags="--information local"),
    Arm("tompo, 200 steps", "200 steps", LONG, 2),
    Arm("grpo, 200 steps", "200 steps", f"--algo grpo {LONG}", 2),
    Arm("no Belief line", "belief", "--no-belief"),
    *TEACHERS,
    *(replace(arm, name=f"{arm.name}, SFT alone", family="SFT alone", sft=True) for arm in TEACHERS),
    Arm("all seats", "seats", of="tompo, all seats", evaluation="--seat random"),
    Arm("seat 0", "seats", of="tompo", evaluation="--seat random"),
    *(Arm(f"{a} in all seats", "self-play", "", 4, a, a == "sft", "--seat all") for a in ALGORITHMS),
    *(
        Arm(f"{a} on {game}", f"transfer, {game}", "", 4, a, a == "sft", flags)
        for game, flags in GAMES.items()
        for a in ALGORITHMS
    ),
    *(
        Arm(f"{algo}, {name}", f"where it may act, {name}", f"--algo {algo} {flags}")
        for name, flags in WHERE.items()
        for algo in ("tompo", "grpo")
    ),
    in_one_graph("tompo, all seats", flags=ALL_SEATS),
    in_one_graph("grpo, all seats", flags=f"--algo grpo {ALL_SEATS}"),
    in_one_graph("graph level alone, all seats", flags=f"{GRAPH_ALONE} {ALL_SEATS}"),
    in_one_graph("one graph", flags=ONE_GRAPH),
    in_one_graph("graph level alone, one graph", flags=f"{GRAPH_ALONE} {ONE_GRAPH}"),
    in_stakes("tompo, game's rewards", flags=STAKES),
    in_stakes("grpo, game's rewards", flags=f"--algo grpo {STAKES}"),
    in_stakes("weights 0.2 0.8, game's rewards", flags=f"--weights A_S=0.2 A_G=0.8 {STAKES}"),
    in_stakes("sft, game's rewards", flags=STAKES, sft=True),
    among_givers("tompo, public good", flags=f"{GIVERS} --weights A_S=0.8 A_G=0.2 {NO_BONUS}"),
    among_givers("weights 0.2 0.8, public good", flags=f"{GIVERS} --weights A_S=0.2 A_G=0.8 {NO_BONUS}"),
    among_givers("sft, public good", flags=GIVERS, sft=True),
    among_givers("grpo, public good", flags=f"{GIVERS} --algo grpo --weights {NO_BONUS}"),
    to_read("tompo, others", seeds=8),
    to_read("grpo, others", seeds=8, rft="--algo grpo"),
    to_read("weights 0.2 0.8, others", seeds=8, rft="--weights A_S=0.2 A_G=0.8"),
    to_read("sft, others", seeds=8, sft=True),
    to_read("imitation, others", rft="--expert myopic --reward-from expert"),
]

# -------------------- the commands of an arm


def parsers() -> dict[str, argparse.ArgumentParser]:
    """What train_sft.py, train_rft.py and eval.py know."""
    sft = settings.training_parser("", "")
    rft = settings.training_parser("", "", settings.RFT, settings.Evaluation)
    return {"sft": sft, "rft": rft, "eval": playing_parser("", "random", "all")}


def part(flags: str, script: str) -> list[str]:
    """Those of the flags that a script knows, with their values."""
    words, known = shlex.split(flags), parsers()[script]._option_string_actions
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    chunks = [words[i:j] for i, j in pairwise([*starts, len(words)])]
    return [word for chunk in chunks if chunk[0] in known for word in chunk]


def commands(arm: Arm, seed: int, common: str, folder: Path) -> list[tuple[Path, list[str]]]:
    """(the file or folder that a command leaves, the command) of the SFT stage, of RFT and of the evaluation.
    common: flags of every run."""
    trained = next((other for other in ARMS if other.name == arm.of), arm)
    flags, seeded = f"{common} {trained.flags}", ["--seed", str(seed)]
    sft_flags = part(flags, "sft")
    name = "_".join(sft_flags).replace("--", "").replace("/", "-").replace(":", "-") or "default"
    sft, rft = folder / "sft" / name / f"seed{seed}", folder / trained.name.replace(" ", "_") / f"seed{seed}"
    policy = sft / "adapter"
    steps = [(policy, ["train_sft.py", *seeded, *sft_flags, "--out", str(sft)])]
    if not arm.sft:
        argv = ["train_rft.py", *seeded, *part(f"{flags} {trained.rft}", "rft"), "--eval-games", "0"]
        argv += ["--sft-adapter", str(policy), "--out", str(rft)]
        policy = rft / "adapter"
        steps.append((policy, argv))
    result = folder / "eval" / arm.name.replace(" ", "_") / f"seed{seed}.json"
    played = part(flags if arm.evaluation is None else f"{common} {arm.evaluation}", "eval")
    # Random numbers of its own for each seed, so that intervals over seeds hold the luck of sampling, too.
    played += ["--eval-seed", str(seed)]
    return [*steps, (result, ["eval.py", *played, "--policy", str(policy), "--json", str(result)])]


# -------------------- running


class Study:
    """Makes and measures units, also several at once. folder: of the runs; common: flags of every run. Once
    `stopped` is set, no command is begun."""

    def __init__(self, folder: Path, common: str):
        self.folder, self.common, self.stopped = folder, common, threading.Event()
        self.locks = defaultdict(threading.Lock)  # by product: two arms may want the same SFT stage at once

    def run(self, arm: Arm, seed: int) -> dict:
        """Makes what a unit lacks. Returns its line of the results file. InputError: as in `make`."""
        began = time.perf_counter()
        steps = commands(arm, seed, self.common, self.folder)
        for product, command in steps:
            with self.locks[product]:
                if not product.exists():
                    self.make(product, command)
        minutes = round((time.perf_counter() - began) / 60, 1)
        return measured(arm, seed, steps) | {"minutes": minutes} | machine()

    def make(self, product: Path, command: list[str]) -> None:
        """Runs one command, or resumes it. InputError: it was stopped, or failed, or left no product."""
        run = Path(command[-1])  # its folder, or eval.py's file
        if (run / "config.json").exists():
            command = [command[0], "--resume", str(run)]
        run.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        with open(run.with_name(run.stem + ".log"), "a+", encoding="utf-8", errors="replace") as log:
            if not self.stopped.is_set():
                argv = [sys.executable, *command]
                done = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=log, env=environment)
            if self.stopped.is_set() or done.returncode in (130, -2):  # Ctrl-C
                raise InputError("stopped; the same command goes on")
            if done.returncode or not product.exists():
                log.seek(0)
                last = (log.read().strip().splitlines() or [""])[-1]
                raise InputError(f"{last[-200:]} (see {log.name})")


def measured(arm: Arm, seed: int, steps: list[tuple[Path, list[str]]]) -> dict:
    """The unit's line of the results file, without its time and machine."""
    result = next(iter(read_json(steps[-1][0])["results"].values()))
    rows = result["instances"]
    line = {"arm": arm.name, "seed": seed, "family": arm.family, "flags": f"{arm.flags} {arm.rft}".strip()}
    line |= {"sft": True} if arm.sft else {}
    line["values"] = {metric: [row.get(metric) for row in rows] for metric in STORED}
    rounds = [part for name, part in result.items() if name.startswith("round ")]
    line |= {"U2 of links by round": [part["U2 graph"]["mean"] for part in rounds]} if rounds[1:] else {}
    if len(steps) == 3 and arm.of is None:
        run = steps[1][0].parent
        samples, probe, metrics = (read_lines(run / f"{n}.jsonl") for n in ("samples", "probe", "metrics"))
        line["probe"] = [{key: entry.get(key) for key in PROBED} for entry in probe if "stage" in entry]
        line["levels"] = study_report.levels_of(samples)
        line["updates"] = study_report.updates_of(metrics)
        line |= study_report.graph_replies(samples)
        asked = read_prompts(run)
        line["efforts"] = study_report.efforts_of(samples, asked)
        line["rule"] = study_report.rules_of(samples, asked)
        line |= {"groups": study_report.a_dozen(samples)} if seed == 0 else {}
    return rounded(line, 4)


def machine() -> dict:
    """Where this process runs, and with which versions."""
    argv = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(argv, cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"commit": commit or "unknown", "machine": cpu_name() + gpu, "packages": packages}


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Trains and evaluates many arms over several seeds.")
    add = parser.add_argument
    known = sorted({name for arm in ARMS for name in (arm.name, arm.family)})
    add("--arms", nargs="+", metavar="NAME", choices=known, help="arms or families (default: all)")
    add("--seeds", type=number_or_range(0, 2**32 - 1), help="such as 0-7 (default: those of each arm)")
    add("--jobs", type=positive_int, default=2, help="runs at once")
    add("--flags", default="", help="flags of every run, in one string, for a quick look")
    file = "the measured units, a line each; their runs lie in runs/STEM, where STEM.jsonl is this file"
    add("--results", type=Path, metavar="FILE", default=Path("results/study.jsonl"), help=file)
    add("--report", action="store_true", help="run nothing: write tables and figures beside the results")
    args = parser.parse_args(argv)
    if args.report:
        print(study_report.write(args.results, {arm.name: arm.seeds for arm in ARMS}))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    log = JsonLines(args.results, lambda line: True)  # removes half a line that a kill has left
    done = {(line["arm"], line["seed"]) for line in log.rows}
    arms = [arm for arm in ARMS if not args.arms or {arm.family, arm.name} & set(args.arms)]
    # The seeds of the first arm come first and make the SFT stages: no two jobs wait for the same one.
    seeds = args.seeds and range(args.seeds[0], args.seeds[1] + 1)
    units = [(arm, seed) for arm in arms for seed in seeds or range(arm.seeds)]
    todo = [(arm, seed) for arm, seed in units if (arm.name, seed) not in done]
    study, failed = Study(RUNS / args.results.stem, args.flags), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            running = {pool.submit(study.run, arm, seed): f"{arm.name}, seed {seed}" for arm, seed in todo}
            for unit in tqdm(as_completed(running), total=len(todo), unit="run", smoothing=0.1):
                if error := unit.exception():  # it ends this unit alone
                    failed += 1
                    what = error if isinstance(error, InputError) else repr(error)
                    tqdm.write(f"failed: {running[unit]}: {what}")
                else:
                    log.write(unit.result())
        except KeyboardInterrupt:  # the commands that run have got it too
            study.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{len(todo) - failed} units done, {failed} failed; tables: python -m tools.study --report")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

import settings
from run.errors import InputError, reports_errors
from run.files import JsonLines, cpu_name, read_json, read_lines
from run.values import positive_int
from tools import study_report
from tools.page.groups import read_prompts

ROOT = Path(__file__).resolve().parent.parent
STORED = ("U1", "s", "row", "U2", "U3", "belief", "U2 | ok", "U3 | ok")
PROBED = ("step", "seconds", "U1", "row", "s", "U2", "belief")


@dataclass(frozen=True)
class Arm:
    """flags: of train_rft.py; seeds: how many it is to have; of: the name of the arm whose policy plays (by
    default its own); sft: whether the SFT stage of that arm plays instead; evaluation: flags of eval.py in
    the place of those of the training; sft_flags: flags that the SFT stage alone has."""

    name: str
    family: str
    flags: str = ""
    seeds: int = 4
    of: str | None = None
    sft: bool = False
    evaluation: str | None = None
    sft_flags: str = ""


ALGORITHMS = ("tompo", "grpo", "sft")
PGG = "--game pgg --expert planner"
GAMES = {
    "GEE": "--stages GEE",
    "6 agents": "--agents 6",
    "PGG": PGG,
    "heterogeneous": "--types linear half hub",
}
FEW = "--games 16 --steps 64"
WHERE = {"few games": FEW, "6 agents": "--agents 6", "GGE": "--stages GGE", "PGG": PGG}
DR_GRPO = "--algo grpo --objective advantage=mean aggregation=constant"
GRAPH_ALONE = "--weights A_S=0 A_G=1"
ALL_SEATS = "--seat all --games 63"
ONE_GRAPH = f"{ALL_SEATS} --reward-from joint --prompts 2 2"
TEACHERS = [
    *(Arm(f"label noise {rate}", "teachers", f"--label-noise {rate}") for rate in (0, 0.25, 0.75, 0.9, 1)),
    *(
        Arm(f"SFT by {expert}", "teachers", "--label-noise 0", sft_flags=f"--expert {expert}")
        for expert in ("nash", "myopic", "noisy:second-best:0.3")
    ),
    Arm("SFT on efforts", "teachers", "--train-on effort"),
    Arm("SFT on links", "teachers", "--train-on graph"),
    *(Arm(f"{n} games", "teachers", f"--games {n}") for n in (13, 38)),
]
ARMS = [  # in the order in which they are run; all others of a family are compared with its tompo
    Arm("tompo", "algorithm", seeds=8),
    Arm("grpo", "algorithm", "--algo grpo", 8),
    Arm("sft", "algorithm", seeds=8, sft=True),
    Arm("weights 0.5 0.5", "graph level", "--weights A_S=0.5 A_G=0.5", 8),
    Arm("weights 0.2 0.8", "graph level", "--weights A_S=0.2 A_G=0.8", 8),
    Arm("graph level alone", "graph level", GRAPH_ALONE, 8),
    Arm("no memory", "graph level", "--weights global=0", 8),
    Arm("no best of the group", "graph level", "--weights local=0", 8),
    Arm("neither bonus", "graph level", "--weights local=0 global=0", 8),
    Arm("welfare", "graph level", "--reward-from welfare", 8),
    Arm("Dr. GRPO", "objective", DR_GRPO, 2),  # with a KL term, which its paper does without
    Arm("Dr. GRPO, beta 0", "objective", f"{DR_GRPO} --beta 0"),
    Arm("RLOO", "objective", "--algo grpo --objective advantage=loo"),
    Arm("token aggregation", "objective", "--objective aggregation=token"),
    Arm("no KL", "objective", "--beta 0"),
    Arm("m 4", "objective", "--m 4 --prompts 16 4"),
    Arm("m 16", "objective", "--m 16 --prompts 4 1"),
    Arm("credit", "objective", "--reward-from credit"),
    Arm("credit, zeta 0.1", "objective", "--reward-from credit --weights zeta=0.1"),
    Arm("no Belief line", "belief", "--no-belief"),
    Arm("belief reward", "belief", "--weights belief=0.5"),
    Arm("label noise 1, no Belief line", "belief", "--label-noise 1 --no-belief"),
    *TEACHERS,
    *(replace(arm, name=f"{arm.name}, SFT alone", family="SFT alone", sft=True) for arm in TEACHERS),
    Arm("random seat", "seats", "--seat random --games 252", evaluation="--seat random"),
    Arm("all seats", "seats", of="tompo, all seats", evaluation="--seat random"),
    Arm("seat 0", "seats", seeds=8, of="tompo", evaluation="--seat random"),
    *(Arm(f"{a} in all seats", "self-play", "", 8, a, a == "sft", "--seat all") for a in ALGORITHMS),
    *(
        Arm(f"{a} on {game}", f"transfer, {game}", "", 8, a, a == "sft", flags)
        for game, flags in GAMES.items()
        for a in ALGORITHMS
    ),
    *(
        Arm(f"{algo}, {name}", f"where it may act, {name}", f"--algo {algo} {flags}")
        for name, flags in WHERE.items()
        for algo in ("tompo", "grpo")
    ),
    *(
        Arm(name, "where it may act, one graph", flags, evaluation="--seat all")
        for name, flags in (
            ("tompo, all seats", ALL_SEATS),
            ("grpo, all seats", f"--algo grpo {ALL_SEATS}"),
            ("graph level alone, all seats", f"{GRAPH_ALONE} {ALL_SEATS}"),
            ("one graph", ONE_GRAPH),
            ("graph level alone, one graph", f"{GRAPH_ALONE} {ONE_GRAPH}"),
        )
    ),
    Arm("no worked numbers", "prompts", "--no-hints --sft-steps 240 --steps 48"),
]

# -------------------- the commands of an arm


def parsers() -> dict[str, argparse.ArgumentParser]:
    """What train_sft.py, train_rft.py and eval.py know."""
    sft = settings.training_parser("", "")
    rft = settings.training_parser("", "", settings.RFT, settings.Objective)
    settings.add_evaluation_flags(rft, fewest=0)
    return {"sft": sft, "rft": rft, "eval": settings.playing_parser("", "random", "all")}


def part(flags: str, script: str) -> list[str]:
    """Those of the flags that a script knows, with their values."""
    words, known = shlex.split(flags), parsers()[script]._option_string_actions
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    chunks = [words[i:j] for i, j in pairwise([*starts, len(words)])]
    return [word for chunk in chunks if chunk[0] in known for word in chunk]


def commands(arm: Arm, seed: int, arms: dict[str, Arm], common: str, folder: Path) -> list[tuple[Path, list]]:
    """(the file or folder that a command leaves, the command) of the SFT stage, of RFT and of the evaluation.
    common: flags of every run."""
    trained = arms[arm.of] if arm.of else arm
    flags = f"{common} {trained.flags}"
    sft_flags = [*part(flags, "sft"), *shlex.split(trained.sft_flags)]
    name = "_".join(sft_flags).replace("--", "").replace("/", "-").replace(":", "-") or "default"
    sft, rft = folder / "sft" / name / f"seed{seed}", folder / trained.name.replace(" ", "_") / f"seed{seed}"
    policy, seeded = sft / "adapter", ["--seed", str(seed)]
    steps = [(policy, ["train_sft.py", *seeded, *sft_flags, "--out", str(sft)])]
    if not arm.sft:
        argv = ["train_rft.py", *seeded, *part(flags, "rft"), "--eval-games", "0"]
        policy = rft / "adapter"
        steps.append((policy, [*argv, "--sft-adapter", str(sft / "adapter"), "--out", str(rft)]))
    result = folder / "eval" / arm.name.replace(" ", "_") / f"seed{seed}.json"
    played = part(flags if arm.evaluation is None else f"{common} {arm.evaluation}", "eval")
    return [*steps, (result, ["eval.py", *played, "--policy", str(policy), "--json", str(result)])]


# -------------------- running


class Study:
    """Runs units, several at once, and writes their lines. folder: of the runs; common: flags of every run;
    threads: of each run. failed: what went wrong, a line for each unit."""

    def __init__(self, arms: list[Arm], folder: Path, results: Path, common: str, threads: int):
        self.arms = {arm.name: arm for arm in arms}
        self.folder, self.common, self.threads = folder, common, threads
        self.lock, self.busy, self.failed = threading.Lock(), {}, []
        self.stopped = threading.Event()
        results.parent.mkdir(parents=True, exist_ok=True)
        self.log = JsonLines(results, lambda line: True)  # removes half a line that a kill has left

    def units(self, wanted: list[str] | None, seeds: list[int], all_seeds: bool) -> list[tuple[Arm, int]]:
        """What is not done yet of the wanted arms and families, arm by arm: the seeds of the first arm make
        the SFT stages, and no two jobs wait for the same one. InputError: a name is unknown."""
        arms = self.arms.values()
        known = {name for arm in arms for name in (arm.name, arm.family)}
        if unknown := set(wanted or ()) - known:
            choices = ", ".join(sorted(known))
            raise InputError(f"--arms {unknown.pop()}: no such arm or family; choose from {choices}")
        chosen = [arm for arm in arms if not wanted or {arm.family, arm.name} & set(wanted)]
        done = {(line["arm"], line["seed"]) for line in self.log.rows}
        units = [(arm, seed) for arm in chosen for seed in seeds if seed < arm.seeds or all_seeds]
        return [(arm, seed) for arm, seed in units if (arm.name, seed) not in done]

    def run(self, arm: Arm, seed: int) -> None:
        """Makes what a unit lacks, measures it and writes its line. An error ends this unit alone."""
        began = time.perf_counter()
        try:
            steps = commands(arm, seed, self.arms, self.common, self.folder)
            for product, command in steps:
                with self.lock:
                    own = self.busy.setdefault(product, threading.Lock())
                with own:  # two arms may want the same SFT stage at once
                    if not product.exists() and not self.stopped.is_set():
                        self.execute(command, product)
                if self.stopped.is_set():
                    return
            line = measured(arm, seed, steps) | {"minutes": round((time.perf_counter() - began) / 60, 1)}
            with self.lock:
                self.log.write(line | machine())
        except (OSError, ValueError, KeyError) as e:
            what = str(e) if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
            with self.lock:
                self.failed.append(f"{arm.name}, seed {seed}: {what}")
            tqdm.write(f"failed: {self.failed[-1]}")

    def execute(self, command: list[str], product: Path) -> None:
        """Runs one command, or resumes it. InputError: it failed, or has not left its product."""
        run = Path(command[-1])  # its folder, or eval.py's file
        if (run / "config.json").exists():
            command = [command[0], "--resume", str(run)]
        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(run.stem + ".log")
        environment = os.environ | dict(OMP_NUM_THREADS=str(self.threads), OMP_WAIT_POLICY="PASSIVE")
        with open(log, "a", encoding="utf-8") as file:
            argv = [sys.executable, *command]
            done = subprocess.run(argv, cwd=ROOT, stdout=file, stderr=file, env=environment)
        if done.returncode in (130, -2):  # Ctrl-C
            self.stopped.set()
        elif done.returncode or not product.exists():
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise InputError(f"{last[-200:]} (see {log})")


def rounded(row: dict, keys: tuple[str, ...]) -> dict:
    return {key: None if row.get(key) is None else round(row[key], 4) for key in keys}


def measured(arm: Arm, seed: int, steps: list[tuple[Path, list]]) -> dict:
    """The unit's line of the results file, without its time and machine."""
    summary = next(iter(read_json(steps[-1][0])["results"].values()))
    rows = [rounded(row, STORED) for row in summary["instances"]]
    line = {"arm": arm.name, "seed": seed, "family": arm.family, "flags": arm.flags}
    line |= ({"sft_flags": arm.sft_flags} if arm.sft_flags else {}) | ({"sft": True} if arm.sft else {})
    line["values"] = {metric: [row[metric] for row in rows] for metric in STORED}
    if len(steps) == 3 and arm.of is None:
        run = steps[1][0].parent
        samples, metrics, probe = (read_lines(run / f"{n}.jsonl") for n in ("samples", "metrics", "probe"))
        line["probe"] = [rounded(entry, PROBED) for entry in probe if "stage" in entry]
        line["levels"] = study_report.levels_of(samples)
        line |= study_report.graph_replies(samples)
        targets = {place: target for place, (target, _) in read_prompts(run).items()}
        line["rule"] = study_report.rules_of(samples, targets)
        line |= {"groups": study_report.a_dozen(samples)} if seed == 0 else {}
        line["idle"] = [round(entry["zero_variance_groups"], 3) for entry in metrics]
    return line


def machine() -> dict:
    """Where this process runs, and with which versions."""
    argv = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"commit": commit or "unknown", "machine": cpu_name() + gpu, "packages": packages}


def parse_seeds(text: str) -> list[int]:
    """`3` -> [3], `0-2` -> [0, 1, 2]; for argparse, which reports a ValueError."""
    low, high = map(int, (text.split("-") * 2)[:2])
    return list(range(low, high + 1))


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Trains and evaluates many arms over several seeds.")
    add = parser.add_argument
    add("--arms", nargs="+", metavar="NAME", help="arms or families (default: all)")
    seeds = "such as 0-7; each arm has its own number of seeds"
    add("--seeds", type=parse_seeds, default=parse_seeds("0-7"), help=seeds)
    add("--all-seeds", action="store_true", help="all of --seeds for every arm")
    add("--jobs", type=positive_int, default=2, help="runs at once")
    add("--threads", type=positive_int, default=1, help="threads of each")
    add("--flags", default="", help="flags of every run, in one string, for a quick look")
    add("--folder", type=Path, default=Path("runs/study"), help="the runs")
    add("--results", type=Path, default=Path("results/study.jsonl"), help="the measured units, a line each")
    report = "run nothing: write tables and figures"
    add("--report", type=Path, metavar="FOLDER", nargs="?", const=Path("results"), help=report)
    args = parser.parse_args(argv)
    if args.report:
        planned = [(arm.name, arm.seeds) for arm in ARMS]
        print(study_report.write(args.results, args.report, planned))
        return
    study = Study(ARMS, args.folder, args.results, args.flags, args.threads)
    units = study.units(args.arms, args.seeds, args.all_seeds)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(units), unit="run", smoothing=0.1) as bar:
        try:
            for future in [pool.submit(study.run, *unit) for unit in units]:
                future.add_done_callback(lambda _: bar.update())
            pool.shutdown(wait=True)
        except KeyboardInterrupt:
            study.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for text in study.failed:
        print(f"failed: {text}")
    if study.stopped.is_set():
        print("stopped; the same command goes on")
        raise SystemExit(130)
    done = len(units) - len(study.failed)
    print(f"{done} units done, {len(study.failed)} failed; tables: python -m tools.study --report")
    if study.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

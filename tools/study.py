"""The study: the same policy trained in many ways, over several seeds, and what came of it with intervals.

    python -m tools.study                            # all arms; hours. What is finished is never done again
    python -m tools.study --arms algorithm --seeds 0-3 --jobs 2
    python -m tools.study --jobs 12 --flags "--device cuda"      # a large GPU; docs/speed.md
    python -m tools.study --report                   # tables and figures from results/study.jsonl, in seconds

An arm is what one would write behind `python train_rft.py --seed S`. Its SFT stage is made once per seed and
shared by all arms whose flags do not change it, so arms are paired by seed, by game and by the experts'
draws. What is measured in a unit (an arm and a seed) becomes one line of the results file. A unit that fails
is named and does not stop the rest; a study that was killed goes on where it was, within a run.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from play.held_out import add_eval_arguments
from run import dataset, training
from run.files import InputError, JsonLines, cpu_name, positive_int, read_json, read_lines, reports_errors
from run.rft_flags import add_rft_arguments
from tools import study_report

ROOT = Path(__file__).resolve().parent.parent
STORED = ("U1", "s", "row", "U2", "U3", "belief", "U2 | ok", "U3 | ok")


@dataclass(frozen=True)
class Arm:
    """flags: those of train_rft.py. of: the arm whose policy plays (its own by default); sft: its SFT stage
    plays instead; evaluation: flags of eval.py in the place of those of the training."""

    name: str
    family: str
    flags: str = ""
    seeds: int = 4
    of: str | None = None
    sft: bool = False
    evaluation: str | None = None


GAMES = {"GEE": "--stages GEE", "6 agents": "--eval-agents 6", "PGG": "--game pgg --expert planner"}
GAMES |= {"heterogeneous": "--types linear half hub"}
FEW = "--games 16 --steps 64"
ALL_SEATS = "--seat all --games 63"
ONE_GRAPH = f"{ALL_SEATS} --graph-score joint --prompts 2 2"
TEACHERS = {f"label noise {rate}": f"--label-noise {rate}" for rate in (0, 0.25, 0.75, 0.9, 1)}
TEACHERS |= {
    f"SFT by {name}": f"--label-noise 0 --sft-expert {name}"
    for name in ("nash", "myopic", "noisy:second-best:0.3")
}
TEACHERS |= {"SFT on efforts": "--train-on effort", "SFT on links": "--train-on graph"}
TEACHERS |= {f"{n} games": f"--games {n}" for n in (13, 38)}
ARMS = [  # in the order in which they are run; tompo is what all others of its family are held against
    Arm("tompo", "algorithm", seeds=8),
    Arm("grpo", "algorithm", "--algo grpo", 8),
    Arm("sft", "algorithm", seeds=8, sft=True),
    Arm("weights 0.5 0.5", "graph level", "--level-weights 0.5 0.5", 8),
    Arm("weights 0.2 0.8", "graph level", "--level-weights 0.2 0.8", 8),
    Arm("graph level alone", "graph level", "--level-weights 0 1", 8),
    Arm("no memory", "graph level", "--reward global=0", 8),
    Arm("no best of the group", "graph level", "--reward local=0", 8),
    Arm("neither bonus", "graph level", "--reward local=0 global=0", 8),
    Arm("welfare", "graph level", "--graph-score welfare", 8),
    Arm("Dr. GRPO", "objective", "--algo grpo --objective advantage=mean aggregation=constant"),
    Arm("RLOO", "objective", "--algo grpo --objective advantage=loo"),
    Arm("token aggregation", "objective", "--objective aggregation=token"),
    Arm("no KL", "objective", "--beta 0"),
    Arm("m 4", "objective", "--m 4 --prompts 16 4"),
    Arm("m 16", "objective", "--m 16 --prompts 4 1"),
    Arm("credit", "objective", "--credit"),
    Arm("credit, zeta 0.1", "objective", "--credit zeta=0.1"),
    Arm("no Belief line", "belief", "--no-belief"),
    Arm("belief reward", "belief", "--reward belief=0.5"),
    Arm("label noise 1, no Belief line", "belief", "--label-noise 1 --no-belief"),
    *(Arm(name, "teachers", flags) for name, flags in TEACHERS.items()),
    *(Arm(f"{name}, SFT alone", "SFT alone", flags, sft=True) for name, flags in TEACHERS.items()),
    Arm("random seat", "seats", "--seat random --games 252", evaluation="--seat random"),
    Arm("all seats", "seats", of="tompo, all seats", evaluation="--seat random"),
    Arm("seat 0", "seats", seeds=8, of="tompo", evaluation="--seat random"),
    *(
        Arm(f"{algo} in all seats", "self-play", seeds=8, of=algo, sft=algo == "sft", evaluation="--seat all")
        for algo in ("tompo", "grpo", "sft")
    ),
    *(
        Arm(f"{algo} on {game}", f"transfer, {game}", seeds=8, of=algo, sft=algo == "sft", evaluation=flags)
        for game, flags in GAMES.items()
        for algo in ("tompo", "grpo", "sft")
    ),
    *(
        Arm(f"{algo}, {name}", f"where it may act, {name}", f"--algo {algo} {flags}")
        for name, flags in (
            ("few games", FEW),
            ("6 agents", "--agents 6 --eval-agents 6"),
            ("GGE", "--stages GGE"),
            ("PGG", "--game pgg --expert planner"),
        )
        for algo in ("tompo", "grpo")
    ),
    *(
        Arm(name, "where it may act, one graph", flags, evaluation="--seat all")
        for name, flags in (
            ("tompo, all seats", ALL_SEATS),
            ("grpo, all seats", f"--algo grpo {ALL_SEATS}"),
            ("graph level alone, all seats", f"--level-weights 0 1 {ALL_SEATS}"),
            ("one graph", ONE_GRAPH),
            ("graph level alone, one graph", f"--level-weights 0 1 {ONE_GRAPH}"),
        )
    ),
    Arm("no worked numbers", "prompts", "--no-hints --sft-steps 240 --steps 48"),
]


# -------------------- an arm's commands


def chunks(flags: str) -> list[list[str]]:
    """--a 1 2 --b -> [[--a, 1, 2], [--b]]."""
    found: list[list[str]] = []
    for word in shlex.split(flags):
        if word.startswith("--"):
            found.append([word])
        else:
            found[-1].append(word)
    return found


def parsers() -> dict[str, argparse.ArgumentParser]:
    """What train_sft.py, train_rft.py and eval.py know."""
    sft, rft, evaluation = (argparse.ArgumentParser() for _ in range(3))
    training.add_training_arguments(sft, "")
    training.add_training_arguments(rft, "")
    add_rft_arguments(rft)
    add_eval_arguments(rft, seat=False, fewest=0)
    training.add_model_arguments(evaluation)
    dataset.add_style_arguments(evaluation)
    add_eval_arguments(evaluation)
    return {"sft": sft, "rft": rft, "eval": evaluation}


def part(flags: str, script: str) -> list[str]:
    """Those of the flags that a script knows."""
    known = parsers()[script]._option_string_actions
    return [word for chunk in chunks(flags) if chunk[0] in known for word in chunk]


def commands(arm: Arm, seed: int, arms: dict[str, Arm], common: str, folder: Path) -> list[tuple[Path, list]]:
    """(what a command leaves, the command) of the SFT stage, of RFT, of the evaluation."""
    trained = arms[arm.of] if arm.of else arm
    flags = f"{common} {trained.flags}"
    of_sft = part(flags, "sft")
    name = "_".join(of_sft).replace("--", "").replace("/", "-").replace(":", "-") or "default"
    sft, own = folder / "sft" / name / f"seed{seed}", folder / trained.name.replace(" ", "_") / f"seed{seed}"
    policy, seeded = sft / "adapter", ["--seed", str(seed)]
    found = [(sft / "adapter", ["train_sft.py", *seeded, *of_sft, "--out", str(sft)])]
    if not arm.sft:
        policy = own / "adapter"
        argv = ["train_rft.py", *seeded, *part(flags, "rft"), "--eval-games", "0"]
        found.append((policy, [*argv, "--sft-adapter", str(sft / "adapter"), "--out", str(own)]))
    result = folder / "eval" / arm.name.replace(" ", "_") / f"seed{seed}.json"
    played = part(flags if arm.evaluation is None else f"{common} {arm.evaluation}", "eval")
    return [*found, (result, ["eval.py", *played, "--policy", str(policy), "--json", str(result)])]


# -------------------- running


class Study:
    def __init__(self, args):
        self.args, self.folder, self.results = args, Path(args.folder), Path(args.results)
        self.arms = {arm.name: arm for arm in ARMS}
        self.lock, self.busy, self.failed = threading.Lock(), {}, []
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self.log = JsonLines(self.results, lambda line: True)  # half a line that a kill has left goes
        self.done = {(line["arm"], line["seed"]) for line in self.log.rows}
        self.stopped = threading.Event()

    def units(self) -> list[tuple[Arm, int]]:
        """What is not done yet, arm by arm: the first arm's seeds make the SFT stages, and no two jobs wait
        for the same one."""
        wanted, known = self.args.arms, {name for a in ARMS for name in (a.name, a.family)}
        for name in wanted or ():
            if name not in known:
                raise InputError(
                    f"--arms {name}: no such arm or family; choose from {', '.join(sorted(known))}"
                )
        chosen = [a for a in ARMS if not wanted or a.family in wanted or a.name in wanted]
        every = [(a, n) for a in chosen for n in self.args.seeds if n < a.seeds or self.args.all_seeds]
        return [(a, n) for a, n in every if (a.name, n) not in self.done]

    def run(self, unit: tuple[Arm, int]) -> None:
        try:
            self.make(*unit)
        except (OSError, ValueError, KeyError) as e:  # of one unit; the rest goes on
            self.fail(*unit, f"{type(e).__name__}: {e}")

    def fail(self, arm: Arm, seed: int, why: str) -> None:
        with self.lock:
            self.failed.append(f"{arm.name}, seed {seed}: {why}")
        tqdm.write(f"failed: {self.failed[-1]}")

    def make(self, arm: Arm, seed: int) -> None:
        began = time.perf_counter()
        steps = commands(arm, seed, self.arms, self.args.flags, self.folder)
        for left, command in steps:
            with self.lock:
                own = self.busy.setdefault(left, threading.Lock())
            with own:  # two arms may want the same SFT stage at once
                if self.stopped.is_set() or (
                    not left.exists() and not self.command(arm, seed, left, command)
                ):
                    return
        line = self.measured(arm, seed, steps, time.perf_counter() - began)
        with self.lock:
            self.log.write(line)

    def command(self, arm: Arm, seed: int, left: Path, command: list[str]) -> bool:
        run = Path(command[-1])  # its folder, or eval.py's file
        if (run / "config.json").exists():
            command = [command[0], "--resume", str(run)]
        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(run.stem + ".log")
        with open(log, "a", encoding="utf-8") as file:
            threads = dict(OMP_NUM_THREADS=str(self.args.threads), OMP_WAIT_POLICY="PASSIVE")
            argv = [sys.executable, *command]
            done = subprocess.run(argv, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **threads})
        if done.returncode == 0 and left.exists():
            return True
        if done.returncode in (130, -2):
            self.stopped.set()
            return False
        said = log.read_text(errors="replace").strip().splitlines() or [""]
        self.fail(arm, seed, f"{said[-1][-200:]} (see {log})")
        return False

    def measured(self, arm: Arm, seed: int, steps: list, seconds: float) -> dict:
        results = read_json(steps[-1][0])["results"]
        rows = next(iter(results.values()))["instances"]
        values = {m: [None if r[m] is None else round(r[m], 4) for r in rows] for m in STORED}
        line = {"arm": arm.name, "seed": seed, "family": arm.family, "flags": arm.flags}
        line |= ({"sft": True} if arm.sft else {}) | {"values": values}
        if len(steps) == 3 and arm.of is None:
            own = steps[1][0].parent
            keys = ("step", "seconds", "U1", "row", "s", "U2", "belief")
            probe = [entry for entry in read_lines(own / "probe.jsonl") if "stage" in entry]
            line["probe"] = [{key: round(entry[key], 4) for key in keys} for entry in probe]
            samples = read_lines(own / "samples.jsonl")
            line["levels"] = study_report.levels_of(samples)
            line["belief followed"] = study_report.belief_followed(samples)
            line["links chosen"] = study_report.links_chosen(samples)
            line["rule"] = rules_of(own, samples)
            if seed == 0:
                line["groups"] = study_report.a_dozen(samples)
            line["idle"] = [round(e["zero_variance_groups"], 3) for e in read_lines(own / "metrics.jsonl")]
        return line | {"minutes": round(seconds / 60, 1)} | self.machine

    @property
    def machine(self) -> dict:
        argv = ["git", "rev-parse", "--short", "HEAD"]
        try:
            commit = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:  # a machine without git
            commit = ""
        gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
        packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
        return {"commit": commit or "unknown", "machine": cpu_name() + gpu, "packages": packages}


def rules_of(run: Path, samples: list[dict]) -> dict:
    """The threshold rule of the expert in the run's training games, of its SFT policy and of its last
    quarter."""
    config = argparse.Namespace(**read_json(run / "config.json"))
    worth = study_report.worked_numbers(training.load_records(config))
    first = [s for s in samples if s["step"] == 0]
    final = [s for s in samples if s["step"] >= 0.75 * config.steps]
    expert = [s | {"reply": s["expert"], "compliance": 0.5} for s in samples]
    parts = {"expert": expert, "sft": first, "final": final}
    return {name: study_report.threshold_rule(of, worth) for name, of in parts.items()}


def parse_seeds(text: str) -> list[int]:
    low, _, high = text.partition("-")
    try:
        return list(range(int(low), int(high or low) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number such as 3 or a range such as 0-7"
        ) from None


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Trains and evaluates many arms over several seeds.")
    add = parser.add_argument
    add("--arms", nargs="+", metavar="NAME", help="arms or families (default: all)")
    add(
        "--seeds", type=parse_seeds, default=parse_seeds("0-7"), help="such as 0-7; an arm has its own number"
    )
    add("--all-seeds", action="store_true", help="all of --seeds for every arm")
    add("--jobs", type=positive_int, default=2, help="runs at once")
    add("--threads", type=positive_int, default=1, help="threads of each")
    add("--flags", default="", help="flags of every run, in one string, for a quick look")
    add("--folder", default="runs/study", help="the runs")
    add("--results", default="results/study.jsonl", help="the measured units, a line each")
    add(
        "--report", metavar="FOLDER", nargs="?", const="results", help="run nothing: write tables and figures"
    )
    args = parser.parse_args(argv)
    if args.report:
        planned = [(arm.name, arm.seeds) for arm in ARMS]
        print(study_report.write(Path(args.results), Path(args.report), planned))
        return
    study = Study(args)
    units = study.units()
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(units), unit="run", smoothing=0.1) as bar:
        try:
            for future in [pool.submit(partial(study.run, unit)) for unit in units]:
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

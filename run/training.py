"""What SFT and RFT have in common: flags, the optimizer, and all that surrounds the steps of a stage
(`Loop`).
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import experts
import lora
from models import adapters
from models.load import ENGINES, device, load_policy
from models.pretrained import DEFAULT_MODEL
from play.expert_games import Record
from policy import Policy
from run import checkpoint, dataset, files, ranks
from run.files import (
    InputError,
    JsonLines,
    StopSignal,
    argv_of,
    library_errors,
    number,
    positive_int,
    resumed_arguments,
    seed_int,
    share,
)
from run.probe import Probe

MAX_GRAD_NORM = 1.0

# The defaults are for SmolLM2-135M on two CPU cores. The paper's values:
PAPER = dict(model="Qwen/Qwen2.5-7B-Instruct", rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, games=126)
PAPER |= dict(agents=(4, 8), train_on="effort", label_noise=[0.0])
PAPER |= dict(lr=1e-5)  # ours, since the paper leaves the rate of RFT open
PAPER |= dict(dtype="bfloat16")  # ours, so that the 7B model fits into one GPU of 80 GB


# -------------------- flags


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "Which model, and how it is computed.")
    add = group.add_argument
    add("--model", default=DEFAULT_MODEL, help="Hugging Face id or folder of a causal chat model")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=here, help="torch device")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    add("--engine", choices=ENGINES, default="fast", help="plain: policy.py as it stands, slow and short")


def add_training_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What train_sft.py and train_rft.py have in common. out: the default run folder."""
    add_model_arguments(parser)
    dataset.add_data_arguments(parser)
    add = parser.add_argument_group(
        "LoRA", "The adapter of each stage: h = W x + (alpha / r) B A x."
    ).add_argument
    add("--rank", type=number(int, 1, 4096), default=32, help="LoRA rank r")
    above_0 = number(float, 0, above=True)
    add("--lora-alpha", type=above_0, default=64.0, help="LoRA alpha; the scaling is alpha / r")
    add("--targets", nargs="+", default=list(lora.DEFAULT_TARGETS), help="names of the adapted layers")
    group = parser.add_argument_group(
        "supervised fine-tuning", "The first stage: imitate the expert's replies."
    )
    add, choices = group.add_argument, ("effort", "graph", "both", "separate")
    add("--train-on", choices=choices, default="both", help="decisions; separate: an adapter for each kind")
    add("--sft-expert", metavar="NAME", help="a teacher for SFT alone (default: --expert)")
    told = "share of the labels whose decision is random, of graph [and of effort] labels"
    add("--label-noise", nargs="+", type=share, default=[0.5], metavar="RATE", help=told)
    add("--sft-steps", type=positive_int, default=40, help="optimizer steps")
    add("--sft-batch", type=positive_int, default=4, help="conversations per step")
    add("--sft-lr", type=number(float, 0), default=1e-3, help="peak learning rate (warm-up, cosine to 0)")
    add = parser.add_argument_group(
        "run", "Seeds, memory, saving. None of these changes the method."
    ).add_argument
    add("--out", default=out, help="the run folder")
    add("--preset", choices=("small", "paper"), default="small", help="defaults: small, or the paper's")
    add("--data", metavar="FILE", help="expert games of tools.expert_games (else they are simulated)")
    add("--resume", metavar="RUN", help="continue this run with its own settings")
    add("--seed", type=seed_int, default=0, help="of data, adapters, order and sampling")
    add("--max-steps", type=positive_int, help="end every stage after this many steps")
    add("--probes", type=number(int, 0), default=4, help="how often each stage answers held-out prompts")
    add("--micro-batch", type=positive_int, default=2, help="rows per forward pass (memory, not maths)")
    add("--save-every", type=positive_int, default=20, help="steps between checkpoints")


def parse(parser: argparse.ArgumentParser, script: str, argv=None) -> argparse.Namespace:
    """Parses the flags, with the paper's values as defaults under --preset paper; under --resume they are
    those of the run (a flag that is newer than the run has its default)."""
    known, _ = parser.parse_known_args(argv)
    folder, flags = known.resume, {action.dest for action in parser._actions}
    if folder:
        print(f"continuing {folder} with the settings in its config.json (other flags do not count)")
        of_run = resumed_arguments(folder, script) | {"out": folder}
        gone = sorted(set(of_run) - flags - {"script", "resumed"})
        if gone:
            advice = "continue it with the version of the code that it was made with"
            raise InputError(f"{folder} was made with settings that are gone ({', '.join(gone)}); {advice}")
        argv = argv_of(parser, of_run)  # someone may have edited the file
        known, _ = parser.parse_known_args(argv)
    if known.preset == "paper":
        parser.set_defaults(**{name: value for name, value in PAPER.items() if name in flags})
    args = parser.parse_args(argv)
    args.script, args.resumed = script, bool(folder)
    if isinstance(args.seat, int) and args.seat >= args.agents[0]:
        agents = f"the number of agents, which is {args.agents[0]} in some games"
        raise InputError(f"--seat {args.seat} must be below {agents}")
    if len(args.label_noise) > 2:
        raise InputError(
            "--label-noise takes one share, of graph decisions, or two: of graph and of effort decisions"
        )
    if args.data:  # a run may be resumed from another working directory
        args.data = os.path.abspath(args.data)
    if experts.is_language(args.expert):
        from teachers import language  # here: exact experts do without

        args.ask = language.with_record(args.ask)  # its record by an absolute path, for the same reason
    if getattr(args, "sft_adapter", None):
        args.sft_adapter = "+".join(map(os.path.abspath, adapters.chain(args.sft_adapter)))
    return args


# -------------------- what a stage starts from


def load_policy_of_rank(args) -> Policy:
    """The model on this process's device."""
    with ranks.first_goes_first():  # it may fetch and convert the default model
        return load_policy(args.model, args.dtype, ranks.device(args.device), args.engine)


@contextmanager
def run_folder(args):
    """The folder of this run, made unless it is resumed, and inside kept from other runs."""
    with ExitStack() as held:
        with ranks.first_goes_first():
            if ranks.first():
                held.enter_context(files.run_folder(args.out, None if args.resumed else vars(args)))
        yield Path(args.out)


def load_records(args) -> list[Record]:
    return (
        dataset.read_records(args.data) if args.data else dataset.simulate_args(args, args.games, args.seed)
    )


def in_trained_seats(args, records: list[Record]) -> list[Record]:
    """Those of the decisions that are trained on: of the policy's seat [source: seat 0], of one drawn per
    game, or of every seat."""
    if args.seat != "random":
        return [r for r in records if args.seat == "all" or r.seat == args.seat]
    agents: dict[int, int] = {}
    for r in records:
        agents[r.game] = max(agents.get(r.game, 0), r.seat + 1)
    drawn = {game: np.random.default_rng([args.seed, 9, game]).integers(N) for game, N in agents.items()}
    return [r for r in records if r.seat == drawn[r.game]]


def new_adapter(policy: Policy, args, purpose: int) -> lora.LoRAConfig:
    """A fresh adapter on the policy's model; the purpose keeps the random numbers of SFT and RFT apart."""
    try:
        config = lora.LoRAConfig(args.rank, args.lora_alpha, tuple(args.targets), policy.name)
        lora.inject(policy.model, config, checkpoint.seeded(args.seed, purpose), policy.layer)
        lora.require_untied(policy.model)  # now, not when SFT is done and is to be merged
    except ValueError as e:
        raise InputError(str(e)) from None
    return config


# -------------------- steps


def micro_batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def settings(args) -> dict:
    """The arguments as config.json holds them, but for what names the run."""
    return {k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in ("out", "resumed")}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, but at least 3, then cosine to 0; `step` from 0.

    Adam's first steps are the sign of the gradient at full length: without a warm-up the first batch of RFT
    alone can push a policy to one answer for everything."""
    warmup = max(3, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(policy: Policy) -> torch.optim.AdamW:
    # Not fused: fast/lora_products.py would not see the change
    parameters = lora.lora_parameters(policy.model)
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=False)


def clip_gradient(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Sums the gradients of all processes and clips them. Returns the norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients(parameters)
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


class Loop:
    """The steps of a training stage, and all that surrounds them: checkpoints and resume, the log, the
    progress bar, Ctrl-C, processes that are lost.

        with Loop(...) as loop:
            for step in loop:
                ...                              # gradients
                lr, norm = loop.optimizer_step()
                loop.end_step(line, live)
        loop.finished

    A checkpoint is the state at the end of a step, so an adapter in the midst of one is never saved.
    """

    def __init__(
        self, args, policy: Policy, folder: Path, name: str, steps: int, peak_lr: float, stop: StopSignal
    ):
        self.args, self.policy, self.folder, self.stop = args, policy, folder, stop
        self.optimizer, self.peak_lr, self.planned = make_optimizer(policy), peak_lr, steps
        self.steps = min(steps, args.max_steps or steps)
        self.done, self.extra, self.untouched, self.stopping = 0, {}, True, False
        self.seconds = 0.0  # that the steps have taken, probes left out
        self.keep: Callable[[], dict] = dict  # what a checkpoint holds besides; `extra` is what it held
        self.logs: list[JsonLines] = []
        with library_errors(f"the checkpoint in {folder} is of other settings than its config.json"):
            saved = checkpoint.restore(folder / "checkpoints", self.optimizer)
            if saved:
                self.done, adapter, self.extra = saved
                adapters.load_adapter_state(policy.model, adapter)
                self.seconds = self.extra.pop("seconds", 0.0)
                self.tell_edits(self.extra.pop("settings", {}))
                if ranks.first():
                    checkpoint.prune(folder / "checkpoints", self.done)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = self.open_log("metrics")
        shown = dict(total=self.steps, initial=self.done, desc=name, unit="step", disable=not ranks.first())
        self.bar = tqdm(**shown)
        probes = args.probes and not experts.is_language(args.expert)  # whose answers cost money
        self.probe = Probe(args, policy, name, self.steps, self.done) if probes else None
        if self.probe:
            self.watch(self.probe.log)

    def tell_edits(self, made_with: dict) -> None:
        """Says which settings are others than those of the checkpoint. Some may be changed with a good reason
        (--device, --max-steps), and a setting that is newer than the checkpoint is none that was changed."""
        now = settings(self.args)
        edits = [f"{k} {v!r} -> {now[k]!r}" for k, v in made_with.items() if k in now and now[k] != v]
        if edits:
            was = f"{self.folder}: config.json was changed after the checkpoint ({', '.join(edits)})"
            tqdm.write(f"{was}; this is no longer the run that was begun, and goes on with what it says now")

    def open_log(self, name: str) -> JsonLines:
        """FOLDER/name.jsonl without the lines of steps that will be done again; the first process writes."""
        done = lambda row: type(row.get("step")) is int and row["step"] < self.done
        return self.watch(JsonLines(self.folder / f"{name}.jsonl", done, ranks.first()))

    def watch(self, log: JsonLines) -> JsonLines:
        """Counts the lines of a log in every checkpoint, and says if it has fewer than at the one before. It
        is no reason to stop: no weight depends on a log, and the lines would not come back."""
        had = self.extra.get("lines", {}).get(log.path.name, 0)
        if log.count < had:
            tqdm.write(
                f"{log.path} has lost {had - log.count} of its {had} lines; the weights are not touched"
            )
        self.logs.append(log)
        return log

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        if isinstance(error, ranks.LostRank):
            if self.done and self.untouched:
                self.save()
            advice = f"continue from the newest checkpoint with --resume {self.args.out}"
            raise InputError(f"{error}; {advice}") from None

    def __iter__(self):
        if self.probe:  # also what a process that was lost has cut short
            self.probe(self.done, self.seconds)
        while self.done < self.steps and not self.stopping:
            self.started = time.perf_counter()
            yield self.done

    def optimizer_step(self, loss: float) -> tuple[float, float]:
        """Steps with the gradients of all processes, clipped, and clears them. loss: of all of them. Returns
        (the learning rate that was used, the gradient norm before clipping)."""
        lr = learning_rate(self.done, self.planned, self.peak_lr)
        norm = clip_gradient(self.optimizer, MAX_GRAD_NORM)
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                kept = f"the checkpoints in {self.folder} are from before; try a lower learning rate"
                raise InputError(f"step {self.done}: the {what} is {value}, and training ends here; {kept}")
        self.untouched = False
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return lr, norm

    def end_step(self, line: dict, live: str) -> None:
        """Logs the line, shows the live values, and saves where it is time; on Ctrl-C in any process all
        stop."""
        self.log.write({"step": self.done} | line)
        self.done, self.untouched = self.done + 1, True
        self.seconds += time.perf_counter() - self.started
        if self.probe:
            self.probe(self.done, self.seconds)
            live += self.probe.text
        self.bar.set_postfix_str(live)
        self.bar.update()
        self.stopping = any(ranks.exchange(self.stop.requested))
        if self.stopping or self.finished or self.done % self.args.save_every == 0:
            self.save()
        if self.stopping:
            ranks.exchange(None)  # nobody leaves before the first process has saved

    def save(self) -> None:
        if ranks.first():
            state = adapters.adapter_state(self.policy.model)
            adapters.require_finite(state, f"after step {self.done - 1}, not saved")
            for log in self.logs:
                log.sync()  # so that no checkpoint is newer than what a power cut leaves of the logs
            extra = self.keep() | {"seconds": self.seconds, "settings": settings(self.args)}
            extra["lines"] = {log.path.name: log.count for log in self.logs}
            checkpoint.save_checkpoint(self.folder / "checkpoints", self.done, state, self.optimizer, extra)

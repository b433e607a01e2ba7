"""Supervised fine-tuning (SFT) on expert games: LoRA on the agents' replies.

    python train_sft.py --out runs/sft

[source] LoRA rank 64, alpha 32, learning rate 5e-5, batch 16, on expert effort decisions: `--preset paper`.
[choice] The small default model trains on both kinds of decision, because it keeps to the reply format in no case
before any training, and RFT has no signal without some compliant replies.

How it works: all decisions of an agent in a game are one conversation, and one forward pass trains all of them. The
loss is the mean of -log pi over the reply tokens of the chosen kind (and each reply's end-of-turn token); `separate`
trains an adapter for each kind. Where the data holds a decision that was replaced at random, the expert's own answer is
trained beside it, not the random one.
"""

import argparse
import math
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models import adapters as adapter_files
from run import checkpoint
import experts
from teachers import language as llm_experts
import lora
from run import ranks
from policy import Policy, load_policy
from models.pretrained import DEFAULT_MODEL
from run.files import InputError, JsonLines, StopSignal, Stopwatch, new_run_folder, positive_int, reports_errors, resumed_arguments, seed_int
from fast.shared_prefix import Row, pack

# The defaults are for SmolLM2-135M on two CPU cores. The paper's values:
PAPER = dict(model="Qwen/Qwen2.5-7B-Instruct", rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, games=126)
PAPER |= dict(agents=(4, 8), train_on="effort")
PAPER |= dict(dtype="bfloat16", micro_batch=2)  # ours, so that the 7B model fits into one GPU of 80 GB


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face id or folder of a causal chat model")
    group.add_argument("--cache", help="folder for the default model (else $TOMPO_CACHE or ~/.cache/tompo)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What train_sft.py and train_rft.py have in common."""
    add_model_arguments(parser)
    experts.add_data_arguments(parser)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=positive_int, default=32, help="LoRA rank r")
    group.add_argument("--lora-alpha", type=float, default=64.0, help="LoRA alpha; the scaling is alpha / r")
    group.add_argument("--targets", nargs="+", default=list(lora.DEFAULT_TARGETS), help="names of the adapted layers")
    group = parser.add_argument_group("supervised fine-tuning")
    choices = ("effort", "graph", "both", "separate")
    group.add_argument("--train-on", choices=choices, default="both", help="decisions; separate: an adapter for each kind")
    group.add_argument("--sft-steps", type=positive_int, default=50, help="optimizer steps")
    group.add_argument("--sft-batch", type=positive_int, default=4, help="conversations per step")
    group.add_argument("--sft-lr", type=float, default=1e-3, help="peak learning rate (warm-up, then cosine to 0)")
    group.add_argument("--sft-held-out", type=positive_int, default=12, help="held-out games for the reply loss")
    group = parser.add_argument_group("run")
    group.add_argument("--preset", choices=("small", "paper"), default="small", help="defaults: small, or the paper's")
    group.add_argument("--data", metavar="FILE", help="expert games written by experts.py (else they are simulated)")
    group.add_argument("--resume", metavar="RUN", help="continue this run with its own settings")
    group.add_argument("--seed", type=seed_int, default=0, help="of data, adapters, order and sampling")
    group.add_argument("--max-steps", type=positive_int, help="end every stage after this many steps")
    group.add_argument("--micro-batch", type=positive_int, default=4, help="rows per forward pass (memory, not maths)")
    group.add_argument("--save-every", type=positive_int, default=20, help="steps between checkpoints")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping")


def parse(parser: argparse.ArgumentParser, script: str, paper: dict, argv=None) -> argparse.Namespace:
    """Parses the flags, with the paper's values as defaults under --preset paper; under --resume they are those of
    the run."""
    known, _ = parser.parse_known_args(argv)
    if known.preset == "paper":
        parser.set_defaults(**paper)
    args = parser.parse_args(argv)
    if args.resume:
        print(f"continuing {args.resume} with the settings in its config.json (other flags do not count)")
        return argparse.Namespace(**resumed_arguments(args.resume, script) | {"out": args.resume, "resumed": True})
    args.script, args.resumed = script, False
    if args.seat != "random" and args.seat >= args.agents[0]:
        raise InputError(f"--seat {args.seat} must be below the number of agents, which is {args.agents[0]} in some games")
    for name in ("data", "sft_adapter", "expert_cache"):  # a run may be resumed from another working directory
        if getattr(args, name, None):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    return args


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, but at least 3, then cosine to 0; `step` from 0.

    Adam's first steps are the sign of the gradient at full length: without a warm-up the first batch of RFT alone can
    push a policy to one answer for everything.
    """
    warmup = max(3, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def new_adapter(policy: Policy, args, purpose: int) -> lora.LoRAConfig:
    """A fresh adapter on the policy's model."""
    try:
        config = lora.LoRAConfig(args.rank, args.lora_alpha, tuple(args.targets), policy.name)
        lora.inject(policy.model, config, checkpoint.seeded(args.seed, purpose))
    except ValueError as e:
        raise InputError(str(e)) from None
    return config


def load_policy_of_rank(args) -> Policy:
    """The model on this process's device."""
    with ranks.first_goes_first():  # it may fetch and convert the default model
        return load_policy(args.model, args.cache, getattr(torch, args.dtype), ranks.device(args.device))


def run_folder(args) -> Path:
    """The folder of this run, made unless it is resumed."""
    with ranks.first_goes_first():
        if ranks.first() and not args.resumed:
            new_run_folder(args.out, vars(args))
    return Path(args.out)


def load_records(args) -> list[experts.Record]:
    return experts.read_records(args.data) if args.data else experts.simulate_args(args, args.games, args.seed)


def in_trained_seats(args, records: list[experts.Record]) -> list[experts.Record]:
    """Those of the decisions that are trained on: the policy's seat [source: seat 0], one drawn per game, or every seat."""
    if args.all_seats or args.seat != "random":
        return [r for r in records if args.all_seats or r.seat == args.seat]
    agents: dict[int, int] = {}
    for r in records:
        agents[r.game] = max(agents.get(r.game, 0), r.seat + 1)
    drawn = {game: np.random.default_rng([args.seed, 9, game]).integers(N) for game, N in agents.items()}
    return [r for r in records if r.seat == drawn[r.game]]


def conversations(policy: Policy, records: list[experts.Record], train_on: str) -> list[tuple[Row, str]]:
    """One row for each (game, seat) of the data set (more, should the chat template rewrite history), and the kind of
    decision, G or E, of each of its targets. Its decisions of the trained kind are prompts with the expert's answer as
    their one reply; what was really played, where that was something else, stands in the later prompts."""
    kinds = {"effort": "E", "graph": "G", "both": "GE"}[train_on]
    turns: dict[tuple[int, int], list] = {}
    for r in records:
        if r.kind in kinds:
            turn = (policy.encode_prompt(r.prompt), [policy.encode_reply(r.label)], r.kind)
            turns.setdefault((r.game, r.seat), []).append(turn)
    rows = []
    for conversation in turns.values():
        prompts, replies, kind = zip(*conversation)
        for row in pack(prompts, replies):
            rows.append((row, "".join(kind[i] * len(replies[i][0]) for i in row.prompts)))
    policy.check_length(max((max(row.positions()) for row, _ in rows), default=0) + 1, 0)
    return rows


def micro_batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def reply_loss(policy: Policy, rows: list[tuple[Row, str]], rows_per_pass: int = 12) -> dict[str, float]:
    """Mean -log pi of the target tokens, by kind of decision."""
    losses: dict[str, list[float]] = {}
    for part in micro_batches(rows, rows_per_pass):
        logps = torch.cat(policy.token_logps([row for row, _ in part])).tolist()
        for kind, logp in zip("".join(kinds for _, kinds in part), logps, strict=True):
            losses.setdefault(kind, []).append(-logp)
    return {kind: sum(values) / len(values) for kind, values in losses.items()}


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> float:
    """Sums the gradients of all processes, clips, steps with exactly this learning rate, clears the gradients. Returns
    the norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_optimizer(policy: Policy) -> torch.optim.AdamW:
    parameters = lora.lora_parameters(policy.model)  # not fused: LoRALinear.sum would not see the change
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=False)


@contextmanager
def saved_if_a_rank_is_lost(save, run: str):
    """If another process dies in the body, rank 0 calls `save`, and the run ends."""
    try:
        yield
    except ranks.LostRank as e:
        if ranks.first():
            save()
        raise InputError(f"{e}; continue from the newest checkpoint with --resume {run}") from None


def agreed_stop(stop: StopSignal, save, run: str) -> bool:
    """Has any process been asked to stop after this step?"""
    with saved_if_a_rank_is_lost(save, run):
        return any(ranks.exchange(stop.requested))


def sft(policy: Policy, args, records: list[experts.Record], folder: Path, stop: StopSignal) -> bool:
    """Trains a new adapter on `policy` and saves it to FOLDER/adapter; continues from a checkpoint in FOLDER if there
    is one. Returns False if it was stopped before the end (after saving a checkpoint)."""
    config = new_adapter(policy, args, purpose=1)
    rows = [row for row, _ in conversations(policy, in_trained_seats(args, records), args.train_on)]
    held_out = in_trained_seats(args, experts.simulate_args(args, args.sft_held_out, args.seed, "held-out"))
    test_rows = conversations(policy, held_out, "both")
    optimizer, done = make_optimizer(policy), 0
    saved = checkpoint.latest_checkpoint(folder / "checkpoints")
    if saved:
        done, adapter, _ = checkpoint.load_checkpoint(saved, optimizer)
        lora.load_adapter_state(policy.model, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    log = JsonLines(folder / "metrics.jsonl", done, ranks.first())
    steps = min(args.sft_steps, args.max_steps or args.sft_steps)

    def test(step):
        if not ranks.first():
            return
        losses = {{"G": "graph", "E": "effort"}[kind]: loss for kind, loss in reply_loss(policy, test_rows).items()}
        log.write({"step": step} | {f"held_out_loss_{kind}": loss for kind, loss in losses.items()})
        tqdm.write("SFT held-out reply loss: " + ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))

    if done == 0:
        test(0)

    def save(steps_done):
        if ranks.first():
            state = lora.adapter_state(policy.model)
            checkpoint.save_checkpoint(folder / "checkpoints", steps_done, state, optimizer, {})

    clock, bar = Stopwatch(), tqdm(total=steps, initial=done, desc="SFT", unit="step", disable=not ranks.first())
    for step in range(done, steps):
        with clock("step"), saved_if_a_rank_is_lost(lambda: step and save(step), args.out):
            batch = [rows[i] for i in checkpoint.shuffled(len(rows), args.sft_batch, step, args.seed, 2)]
            targets = sum(len(row.targets) for row in batch)  # one denominator for the whole step
            loss = 0.0
            mine = [batch[i] for i in ranks.share(range(len(batch)))]
            for rows_of_pass in micro_batches(mine, args.micro_batch):
                part = -torch.cat(policy.token_logps(rows_of_pass)).sum() / targets
                part.backward()
                loss += part.item()
            loss = sum(ranks.exchange(loss))
            lr = learning_rate(step, args.sft_steps, args.sft_lr)
            norm = optimizer_step(optimizer, lr, args.max_grad_norm)
        speed = sum(len(row.ids) for row in batch) / clock.last
        log.write({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": speed})
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tok/s")
        bar.update()
        stopping = agreed_stop(stop, lambda: save(step + 1), args.out)
        if stopping or ((step + 1) % args.save_every == 0 and step + 1 < steps):
            save(step + 1)
        if stopping:
            ranks.exchange(None)  # nobody leaves before rank 0 has saved
            bar.close()
            return False
    bar.close()
    test(steps)
    if ranks.first():
        adapter_files.save_adapter(policy.model, folder / "adapter", config)
    return True


def sft_separately(policy: Policy, args, records: list[experts.Record], folder: Path, stop: StopSignal) -> bool:
    """An adapter for each kind of decision: FOLDER/graph/adapter and FOLDER/effort/adapter; what was finished before a
    resume is kept. Returns False if it was stopped before the end."""
    for kind in ("graph", "effort"):
        if not (folder / kind / "adapter" / adapter_files.CONFIG_FILE).exists():
            of_kind = argparse.Namespace(**vars(args) | {"train_on": kind})
            if not sft(policy, of_kind, records, folder / kind, stop):
                return False
            lora.remove(policy.model)
    return True


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="LoRA fine-tuning on expert games.")
    add_training_arguments(parser)
    parser.add_argument("--out", default="runs/sft", help="the run folder")
    ranks.start()
    args = parse(parser, "train_sft.py", PAPER, argv)
    records = load_records(args)
    policy = load_policy_of_rank(args)
    folder = run_folder(args)
    with StopSignal() as stop:
        separate = args.train_on == "separate"
        finished = (sft_separately if separate else sft)(policy, args, records, folder, stop)
    if not finished:
        print(f"stopped and saved; continue with: python train_sft.py --resume {folder}")
        raise SystemExit(130)
    llm_experts.print_report()
    if separate:
        print(f"adapters: {folder}/graph/adapter, {folder}/effort/adapter\nnext:     python eval.py --policy {folder}")
        return
    print(f"adapter: {folder / 'adapter'}\nnext:    python train_rft.py --sft-adapter {folder / 'adapter'}")


if __name__ == "__main__":
    main()

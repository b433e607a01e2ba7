"""Supervised fine-tuning (SFT) on expert games: LoRA on the agents' replies.

    python train_sft.py --out runs/sft

[source] LoRA rank 64, alpha 32, learning rate 5e-5, batch 16, on expert effort decisions: `--preset paper`.
[choice] The default model trains on both kinds of decision: untrained, it never keeps to the reply format,
and RFT has no signal without some compliant replies.

All decisions of an agent in a game are one conversation. The loss is the mean of -log pi over the reply
tokens of the chosen kind (and each reply's end-of-turn token); `--train-on separate` trains an adapter for
each kind. A label is the expert's answer, also where a random one was played. By default run/dataset.py:
weak_labels then makes half of the link decisions in the labels random (--label-noise).
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: it says how idle threads wait)
import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from models import adapters
from play.expert_games import Record
from policy import Policy
from run import checkpoint, dataset, ranks, training
from run.files import StopSignal, Stopwatch, reports_errors

HELD_OUT_GAMES = 12  # for the reply loss before and after


@dataclass
class Conversation:
    """The trained decisions of one agent in one game. rows: what the policy scores; kinds: of each target, G
    or E."""

    rows: list
    kinds: str


def conversations(policy: Policy, records: list[Record], train_on: str) -> list[Conversation]:
    """One conversation for each (game, seat) of the data set: its decisions of the trained kind as prompts,
    with the label as their one reply. Later prompts hold what was played, which may differ from the label."""
    kinds = {"effort": "E", "graph": "G", "both": "GE"}[train_on]
    decisions: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        if r.kind in kinds:
            decisions.setdefault((r.game, r.seat), []).append(r)
    found = []
    for of_agent in decisions.values():
        prompts = [policy.encode_prompt(r.prompt) for r in of_agent]
        replies = [[policy.encode_reply(r.label)] for r in of_agent]
        rows = policy.pack(prompts, replies)
        policy.check_length(max(row.longest for row in rows), 0)
        order = [i for row in rows for i in row.prompts]
        found.append(Conversation(rows, "".join(of_agent[i].kind * len(replies[i][0]) for i in order)))
    return found


@torch.no_grad()
def reply_loss(
    policy: Policy, test: list[Conversation], conversations_per_pass: int = 12
) -> dict[str, float]:
    """Mean -log pi of the target tokens, by kind of decision."""
    losses: dict[str, list[float]] = {}
    for part in training.micro_batches(test, conversations_per_pass):
        logps = torch.cat(policy.token_logps([row for c in part for row in c.rows])).tolist()
        for kind, logp in zip("".join(c.kinds for c in part), logps, strict=True):
            losses.setdefault(kind, []).append(-logp)
    return {kind: sum(values) / len(values) for kind, values in losses.items()}


def sft(policy: Policy, args, records: list[Record], folder: Path, stop: StopSignal) -> bool:
    """Trains a new adapter on `policy` and saves it to FOLDER/adapter; continues from a checkpoint in FOLDER
    if there is one. Returns False if it was stopped before the end (after saving a checkpoint)."""
    config = training.new_adapter(policy, args, purpose=1)
    trained = training.in_trained_seats(args, records)
    data = conversations(policy, dataset.weak_labels(args, records, trained), args.train_on)
    held_out = dataset.simulate_args(args, HELD_OUT_GAMES, args.seed, "held-out")
    test = conversations(policy, training.in_trained_seats(args, held_out), "both")
    with training.Loop(args, policy, folder, "SFT", args.sft_steps, args.sft_lr, stop) as loop:
        if loop.done == 0:
            log_reply_loss(loop, policy, test)
        clock = Stopwatch()
        for step in loop:
            with clock("step"):
                batch = checkpoint.shuffled(len(data), args.sft_batch, step, args.seed, 2)
                rows = [data[i].rows for i in batch]
                targets = sum(len(row.targets) for of_one in rows for row in of_one)  # of the whole step
                mine = [row for i in ranks.share(range(len(rows))) for row in rows[i]]
                loss = 0.0
                for part in training.micro_batches(mine, args.micro_batch):
                    part_loss = -torch.cat(policy.token_logps(part)).sum() / targets
                    part_loss.backward()
                    loss += part_loss.item()
                loss = sum(ranks.exchange(loss))
                lr, norm = loop.optimizer_step(loss)
            speed = sum(len(row.ids) for of_one in rows for row in of_one) / clock.last["step"]
            line = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": speed}
            loop.end_step(line, f"loss {loss:.3f}, {speed:.0f} tok/s")
    if not loop.finished:
        return False
    log_reply_loss(loop, policy, test)
    if ranks.first():
        adapters.save_adapter(policy.model, folder / "adapter", config)
    return True


def log_reply_loss(loop: training.Loop, policy: Policy, test: list[Conversation]) -> None:
    if ranks.first():
        losses = {
            {"G": "graph", "E": "effort"}[kind]: loss for kind, loss in reply_loss(policy, test).items()
        }
        loop.log.write({"step": loop.done} | {f"held_out_loss_{kind}": loss for kind, loss in losses.items()})
        told = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
        tqdm.write(f"SFT held-out reply loss: {told}")


def sft_separately(policy: Policy, args, records: list[Record], folder: Path, stop: StopSignal) -> bool:
    """An adapter for each kind of decision: FOLDER/graph/adapter and FOLDER/effort/adapter; what was finished
    before a resume is kept. Returns False if it was stopped before the end."""
    for kind in ("graph", "effort"):
        if not (folder / kind / "adapter" / adapters.CONFIG_FILE).exists():
            of_kind = argparse.Namespace(**vars(args) | {"train_on": kind, "probes": 0})
            if not sft(policy, of_kind, records, folder / kind, stop):
                return False
            lora.remove(policy.model)
    return True


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="LoRA fine-tuning on expert games.")
    training.add_training_arguments(parser, "runs/sft")
    ranks.start()
    args = training.parse(parser, "train_sft.py", argv)
    records = training.load_records(args)
    policy = training.load_policy_of_rank(args)
    with training.run_folder(args) as folder, StopSignal() as stop:
        separate = args.train_on == "separate"
        finished = (sft_separately if separate else sft)(policy, args, records, folder, stop)
    dataset.print_report()
    if not finished:
        print(f"stopped and saved; continue with: python train_sft.py --resume {folder}")
        raise SystemExit(130)
    if separate:
        print(f"adapters: {folder}/graph/adapter, {folder}/effort/adapter")
        print(f"next:     python eval.py --policy {folder}")
        return
    print(f"adapter: {folder / 'adapter'}\nnext:    python train_rft.py --sft-adapter {folder / 'adapter'}")


if __name__ == "__main__":
    main()

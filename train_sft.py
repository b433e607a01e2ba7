"""Supervised fine-tuning (SFT) on expert games: LoRA on the agents' replies.

    python train_sft.py --out runs/sft

[source] LoRA rank 64, alpha 32, learning rate 5e-5, batch 16, on expert effort decisions: `--preset paper`.
[choice] The default model trains on both kinds of decision: untrained, it never keeps to the reply format,
and RFT has no signal without some compliant replies.

All decisions of an agent in a game are one conversation. The loss is the mean of -log pi over the tokens of
the labels (and each label's end-of-turn token). A label is the expert's answer, also where a random one was
played. [choice] In half of the labels of links the decision is random (--label-noise), so that RFT has
something to learn.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from games import KINDS
from models import adapters
from play.dataset import Record, check_labels, trained_seats, with_label_noise
from play.probe import Probe, probe_targets
from policy import Policy
from run import ranks
from run.errors import InputError, library_errors, memory_errors, reports_errors
from run.files import StopSignal, run_folder
from run.seeds import Stream, shuffled, torch_generator
from run.stage import Stage
from settings import SFT, LoRA, Settings, parse_training, training_parser
from teachers.language import print_report
from world.draws import spread

HELD_OUT_GAMES = 12  # for the reply loss before and after; fewer where they have several rounds
HELD_OUT_PASS = 12  # conversations in a pass of the reply loss, which has no gradients to keep
MAX_GRAD_NORM = 1.0
PROBE_EVERY = 20  # steps


@dataclass
class Conversation:
    """The trained decisions of one agent in one game: the prompts, the one reply to each that is imitated,
    the weight of each of its tokens in the loss, and the kinds of decision by name. Later prompts contain
    what was played, which may differ from the label."""

    prompts: list[list[int]]
    replies: list[list[list[int]]]
    weights: list[list[float]]
    kinds: list[str]

    @property
    def tokens(self) -> int:
        """At most: the last prompt contains the earlier ones, and their replies as they were played."""
        return max(map(len, self.prompts)) + sum(len(reply) for (reply,) in self.replies)


def token_weights(policy: Policy, label: str, ids: list[int], format_only: bool) -> list[float]:
    """1 for every token of a label; with `format_only` 0 for tokens with a digit behind `Decision:`, so that
    only the form is imitated."""
    if not format_only:
        return [1.0] * len(ids)
    before, word, _ = label.rpartition("Decision:")
    start = len(policy.template.encode_reply(before + word, whole=False))
    texts = [policy.tokenizer.decode([token]) for token in ids]
    return [float(k < start or not any(map(str.isdigit, text))) for k, text in enumerate(texts)]


def make_conversations(
    policy: Policy, records: list[Record], kinds: tuple[str, ...], format_only: bool = False
) -> list[Conversation]:
    """One for each agent of each game, with its decisions of these kinds (letters)."""
    decisions: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        if r.kind in kinds:
            decisions.setdefault((r.game, r.seat), []).append(r)
    result = []
    for agent in decisions.values():
        prompts = [policy.encode_prompt(r.prompt) for r in agent]
        replies = [[policy.encode_reply(r.label)] for r in agent]
        for prompt, (reply,) in zip(prompts, replies, strict=True):
            policy.check_length(len(prompt), len(reply))
        labels = zip(agent, replies, strict=True)
        weights = [token_weights(policy, r.label, reply, format_only) for r, (reply,) in labels]
        result.append(Conversation(prompts, replies, weights, [KINDS[r.kind].name for r in agent]))
    return result


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def prompts_and_replies(part: list[Conversation]) -> tuple[list, list]:
    """Those of all these conversations, in order."""
    return [p for c in part for p in c.prompts], [r for c in part for r in c.replies]


@torch.no_grad()
def reply_loss(policy: Policy, test: list[Conversation]) -> dict[str, float]:
    """Mean -log pi of the label tokens that count, by kind of decision."""
    losses: dict[str, list[float]] = {}
    for part in chunks(test, HELD_OUT_PASS):
        places = [(kind, w) for c in part for kind, w in zip(c.kinds, c.weights, strict=True)]
        for (kind, weights), logps in zip(
            places, policy.token_logps(*prompts_and_replies(part)), strict=True
        ):
            counted = zip(logps.tolist(), weights, strict=True)
            losses.setdefault(kind, []).extend(-logp for logp, weight in counted if weight)
    return {kind: sum(values) / len(values) for kind, values in losses.items()}


def sft(
    policy: Policy, cfg: SFT, data: list[Conversation], optimizer, stage: Stage, seed: int, micro_batch: int
) -> None:
    """The training loop. micro_batch: see Policy.batches."""
    for step in stage.steps():
        # 1. A batch of conversations; every epoch goes through all of them in a new order.
        order = shuffled(len(data), cfg.batch, step, seed, Stream.SFT_ORDER)
        batch = [data[i] for i in order]
        counted = sum(weight for c in batch for weights in c.weights for weight in weights)
        # 2. The mean of -log pi over the label tokens of the batch that count, pass by pass; processes share
        # the batch.
        loss = 0.0
        for part in chunks([batch[i] for i in ranks.share(range(len(batch)))], micro_batch):
            # The engine splits the prompts of these conversations into passes, in an order of its own; within
            # a pass they are in the order of the data.
            prompts, replies = prompts_and_replies(part)
            weights = [weights for c in part for weights in c.weights]
            for own in map(sorted, policy.batches(prompts, replies, micro_batch)):
                logps = policy.token_logps([prompts[i] for i in own], [replies[i] for i in own])
                w_T = torch.tensor([w for i in own for w in weights[i]], device=policy.device)
                part_loss = -(w_T * torch.cat(logps)).sum() / counted
                part_loss.backward()
                loss += part_loss.item()
        loss = sum(ranks.exchange(loss))
        # 3. The optimizer step.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.lr)
        norm = clip_gradient(optimizer, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        values = {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
        values["tokens_per_s"] = sum(c.tokens for c in batch) / stage.elapsed
        stage.end_step(values, f"loss {values['loss']:.3f}, {values['tokens_per_s']:.0f} tok/s")


# -------------------- what both stages of training share


def new_adapter(policy: Policy, config: LoRA, seed: int, stream: Stream) -> lora.LoRAConfig:
    """Injects a fresh adapter into the policy's model. stream: SFT and RFT draw A from different ones."""
    try:
        # Other libraries find the base by this name: a whole path, or the id on the hub.
        base = policy.model.name_or_path
        adapter = lora.LoRAConfig(config.rank, config.alpha, config.targets, base)
        lora.inject(policy.model, adapter, torch_generator(seed, stream), policy.layer)
        lora.require_untied(policy.model)  # now, and not when SFT is done and is to be merged
    except ValueError as e:
        raise InputError(str(e)) from None
    # A first pass, with gradients that are not kept, so that a layer that cannot be trained is named now.
    what = "an adapter does not fit the layers of --targets"
    with library_errors(what, "; leave some out"), memory_errors("an adapter's first pass"):
        logp_T = policy.token_logps([[0, 1]], [[[0]]])[0]
        torch.autograd.grad(logp_T.sum(), lora.lora_parameters(policy.model), allow_unused=True)
    return adapter


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    # A fused optimizer changes A and B without counting a version up, by which fast/lora_products.py sees it.
    parameters = lora.lora_parameters(model)
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=False)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, but at least 3, then cosine to 0; `step` from 0.

    Adam's first steps are the sign of the gradient at full length: without a warm-up the first batch of RFT
    alone can push a policy to one answer for everything."""
    warmup = max(3, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clip_gradient(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Sums the gradients of all processes (0 where there is none) and clips the sum. Returns its norm before
    clipping."""
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients(parameters)
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


# -------------------- the stage


def run_sft(
    settings: Settings, policy: Policy, records: list[Record], folder: Path, stop: StopSignal
) -> bool:
    """Trains a new adapter on the policy and saves it to FOLDER/adapter; continues from a checkpoint in
    FOLDER if there is one. Returns False if it was stopped before the end, after saving a checkpoint."""
    cfg, seed, style, data = settings.sft, settings.run.seed, settings.players.style, settings.data
    trained = trained_seats(records, data.seat, seed)
    labels = with_label_noise(trained, {"G": cfg.label_noise}, seed, style)
    count = max(1, HELD_OUT_GAMES // settings.games.rounds)
    held_out = data.simulate(settings.games, settings.players, count, "held-out")
    held_out, format_only = trained_seats(held_out, data.seat, seed), cfg.train_on == "format"
    test = make_conversations(policy, held_out, tuple(KINDS), format_only)
    test = spread(test, count)  # as many conversations as games, of all seats (every N-th would be of one)
    train = make_conversations(policy, labels, cfg.kinds, format_only)
    check_labels(policy, labels, style)
    adapter = new_adapter(policy, settings.lora, seed, Stream.SFT_ADAPTER)
    optimizer = make_optimizer(policy.model)
    parameters = adapters.named_parameters(policy.model)
    with Stage(folder, "SFT", cfg.steps, parameters, optimizer, stop, settings.flags) as stage:
        stage.probe = make_probe(settings, policy, stage, "SFT", PROBE_EVERY)
        if stage.steps_done == 0:
            log_reply_loss(stage, policy, test)
        sft(policy, cfg, train, optimizer, stage, seed, settings.run.micro_batch)
        if stage.finished:
            log_reply_loss(stage, policy, test)
            if ranks.first():
                adapters.save_adapter(policy.model, folder / "adapter", adapter)
    return stage.finished


def make_probe(settings: Settings, policy: Policy, stage: Stage, name: str, every: int) -> Probe | None:
    """The probe of a stage, every so many steps. None with a language model as the expert, whose answers
    may cost money."""
    players, data = settings.players, settings.data
    if players.expert.language:
        return None
    seat = data.seat if isinstance(data.seat, int) else 0
    games = settings.games.families, data.agents[0], seat
    targets = probe_targets(*games, players.expert, players.style, players.partners)
    return Probe(
        stage, name, every, policy, targets, players.style, Path(settings.run.out), settings.run.seed
    )


def log_reply_loss(stage: Stage, policy: Policy, test: list[Conversation]) -> None:
    """Writes the reply loss of the held-out conversations to metrics.jsonl, and prints it."""
    if ranks.first():
        losses = reply_loss(policy, test)
        named = {f"held_out_loss_{kind}": loss for kind, loss in losses.items()}
        stage.log.write({"step": stage.steps_done} | named)
        text = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
        tqdm.write(f"SFT held-out reply loss: {text}")


@reports_errors
def main(argv=None) -> None:
    ranks.start()
    parser = training_parser("LoRA fine-tuning on expert games.", "runs/sft")
    settings = parse_training(parser, "train_sft.py", argv)
    records = settings.load_data()
    policy = settings.load_model()
    with run_folder(settings.run.out, None if settings.run.resume else settings.flags) as folder:
        with StopSignal() as stop:
            finished = run_sft(settings, policy, records, folder, stop)
    print_report()
    if not finished:
        print(f"stopped and saved; continue with: python train_sft.py --resume {folder}")
        raise SystemExit(130)
    print(f"adapter: {folder / 'adapter'}\nnext:    python train_rft.py --sft-adapter {folder / 'adapter'}")


if __name__ == "__main__":
    main()

"""The main job: from a pretrained model to a ToMPO policy, its evaluation and its curves.

    python train_rft.py --out runs/tompo            # SFT, then ToMPO, then the table
    python train_rft.py --algo grpo --out runs/grpo --sft-adapter runs/tompo/sft/adapter
    python train_rft.py --resume runs/tompo         # after Ctrl-C or a crash: the same adapter, bit for bit

One step, in the symbols of the paper (arXiv 2509.21134), is the body of the loop in `rft`:
1. Take a batch of prompts q: decisions of one agent in expert games, graph and effort.
2. Sample m replies to each from pi_theta (= pi_old) and record their log-probabilities.
3. Rewards (rewards.py): compliance, sample level, and graph level with the memory of the game instance.
4. Advantages (tompo.py): each level normalised within its group, A = w_sample A^S + w_graph A^G.
5. Drop groups whose A is 0 throughout (--idle-groups). Minimise -J: clipped ratio times A, minus beta k3.

pi_ref is the SFT policy: the SFT adapter is merged into the base weights before a new adapter is added, so
"adapter off" is pi_ref, and KL(pi, pi_ref) is 0 at step 0. RUN/adapter holds both adapters as one, for the
plain base model.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: it says how idle threads wait)
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lora
import tompo
from models import adapters
from models.load import put_adapter
from play import held_out, metrics
from play.expert_games import Record
from policy import Policy, Rollout
from prompts import parse_reply, reply_tokens
from rewards import WEIGHTS, Memory, Target, group_rewards
from run import checkpoint, dataset, ranks, training
from run.curves import plot_curves
from run.files import StopSignal, Stopwatch, print_times, reports_errors
from run.rft_flags import add_rft_arguments, check_rft_arguments, objective_of
from run.rft_log import SampleLog, add_sums, live_line, step_metrics, timing
from tools import diagnose, view
from train_sft import sft
from variants import joint
from variants.credit import step_credits
from world.draws import named_numbers

REDRAWS = 2  # how often a step may ask for other prompts, with --idle-groups redraw


@dataclass
class Prompt:
    """One decision of an expert game, as a prompt of RFT."""

    record: Record
    ids: list[int]
    target: Target


def make_prompts(policy: Policy, records: list[Record], args) -> list[list[Prompt]]:
    """The decisions in the trained seats, by conversation (an agent in a game). Checks all that RFT needs."""
    trained, conversations = training.in_trained_seats(args, records), {}
    dataset.check_kinds(trained, args.prompts)
    for r, target in dataset.targets(records, trained):
        prompt = Prompt(r, policy.encode_prompt(r.prompt), target)
        policy.check_length(len(prompt.ids), 0)  # the longest may take minutes to encode
        conversations.setdefault((r.game, r.seat), []).append(prompt)
    prompts = sum(conversations.values(), [])
    policy.check_length(max(len(p.ids) for p in prompts), reply_limit(args, prompts))
    return list(conversations.values())


def next_batch(
    conversations: list[list[Prompt]], counts: list[int], step: int, seed: int, draw: int = 0
) -> list[Prompt]:
    """The prompts of a step: counts[0] graph and counts[1] effort decisions, from the same conversations
    where possible (they share tokens). Draw 0 goes through all conversations once an epoch; later draws take
    random ones."""
    # Here and below the number behind the seed is a purpose: every use of the run's seed has its own.
    rng, batch = np.random.default_rng([seed, 7, step, draw]), []
    order = checkpoint.shuffled(len(conversations), max(counts), step, seed, 4)
    for k, i in enumerate(rng.permutation(len(conversations))[: max(counts)] if draw else order):
        for kind, count in zip("GE", counts):
            if k < count:
                of_kind = [p for p in conversations[i] if p.target.kind == kind]
                batch.append(of_kind[rng.integers(len(of_kind))])
    return batch


def reply_limit(args, prompts: list[Prompt]) -> int:
    return args.max_new_tokens or reply_tokens(max(p.target.game.N for p in prompts))


def share_of(batch: list[Prompt]) -> list[int]:
    """Which of the prompts this process computes; those of one conversation stay together."""
    return ranks.share([(p.record.game, p.record.seat) for p in batch])


def act(
    args, policy: Policy, conversations: list[list[Prompt]], step: int, memory: Memory
) -> tuple[list[Prompt], list[list[Rollout]]]:
    """The prompts of a step and a judged group of m replies to each. With `--idle-groups redraw`, others are
    asked until the step has its numbers of groups with variance, at most REDRAWS times."""
    batch, groups, lacking = [], [], args.prompts
    for draw in range(1 + REDRAWS * (args.idle_groups == "redraw")):
        more = next_batch(conversations, lacking, step, args.seed, draw)
        more = joint.with_other_seats(args, more, conversations)
        sampled = sample(args, policy, more, checkpoint.seeded(args.seed, 6, step, draw))
        credits, proposals = step_credits(args, more, sampled, step), joint.proposals(args, more, sampled)
        for p, group, of_credit, of_joint in zip(more, sampled, credits, proposals):
            judge(args, group, p.target, memory, credits=of_credit, proposals=of_joint)
        batch, groups = batch + more, groups + sampled
        live = "".join(p.target.kind for p, group in zip(batch, groups) if has_variance(group))
        lacking = [count - live.count(kind) for kind, count in zip("GE", args.prompts)]
        if not any(lacking):
            break
    return batch, groups


def sample(args, policy: Policy, batch: list[Prompt], generator: torch.Generator) -> list[list[Rollout]]:
    """m replies to every prompt, each with what the strict parser reads in it."""
    mine, limit = share_of(batch), reply_limit(args, batch)
    groups = policy.sample([p.ids for p in batch], args.m, limit, args.temperature, generator, only=mine)
    groups = ranks.whole(mine, groups)
    for p, group in zip(batch, groups):
        for o in group:
            o.decision = parse_reply(o.text, *p.target.place)
    return groups


def has_variance(group: list[Rollout]) -> bool:
    """False for an idle group: every A is 0, so that only the KL penalty could move the policy."""
    return any(o.advantage for o in group)


def judge(args, group: list[Rollout], target: Target, memory: Memory, credits=None, proposals=None) -> None:
    """Writes the rewards and the advantage of every rollout of a group into it. credits, proposals: see
    rewards.group_rewards."""
    terms = group_rewards(
        [o.decision for o in group],
        target,
        memory_best=memory.get(target.game.key),
        weights=WEIGHTS | named_numbers(args.reward, "--reward"),
        score=args.graph_score,
        credits=credits,
        proposals=proposals,
    )
    r_S_M = torch.tensor([t["r_S"] for t in terms])
    R_G_M = torch.tensor([t["R_G"] for t in terms]) if target.kind == "G" else None
    settings = dict(weights=args.level_weights, advantage=objective_of(args)["advantage"])
    A_M, A_S_M, A_G_M = tompo.dual_level_advantages(r_S_M, R_G_M, algo=args.algo, **settings)
    for o, t, A, A_S, A_G in zip(group, terms, A_M.tolist(), A_S_M.tolist(), A_G_M.tolist()):
        o.rewards, o.advantage = t | {"A_S": A_S, "A_G": A_G}, A


def gradient(
    args, policy: Policy, groups: list[list[Rollout]], mine: list[int], limit: int
) -> tuple[float, dict]:
    """Adds the gradient of -J over the groups `mine`, weighted as part of all groups. limit: the longest
    reply allowed. Returns their part of the loss, and sums for the log."""
    if not groups:
        return 0.0, {}
    rollouts = [o for group in groups for o in group]
    objective = objective_of(args)
    weights = tompo.AGGREGATIONS[objective["aggregation"]]([len(o.reply_ids) for o in rollouts], limit)
    for o, weight in zip(rollouts, weights):
        o.weight = weight
    groups = [groups[i] for i in mine]
    rows = policy.pack([group[0].prompt_ids for group in groups], [[o.reply_ids for o in g] for g in groups])
    loss, sums = 0.0, []
    for part in training.micro_batches(rows, args.micro_batch):
        rollouts = [o for row in part for i in row.prompts for o in groups[i]]
        assert [t for row in part for t in row.targets] == [t for o in rollouts for t in o.reply_ids]

        lengths = [len(o.reply_ids) for o in rollouts]

        def per_token(values):  # of each rollout -> of each reply token
            return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(policy.device)

        old_logps = [logp for o in rollouts for logp in o.sampled_logps]
        ref_logp_T = torch.cat(policy.reference_logps(part, args.temperature)) if args.beta else None
        part_loss, part_sums = tompo.objective_loss(
            torch.cat(policy.token_logps(part, args.temperature)),
            old_logp_T=torch.tensor(old_logps, device=policy.device),
            ref_logp_T=ref_logp_T,
            advantage_T=per_token([o.advantage for o in rollouts]),
            weight_T=per_token([o.weight for o in rollouts]),
            clip_eps=(args.clip_eps[0], args.clip_eps[-1]),
            beta=args.beta,
            lengths=lengths,
            **{name: objective[name] for name in ("loss", "ratio", "kl")},
        )
        part_loss.backward()
        loss, sums = loss + part_loss.item(), [*sums, part_sums]
    return loss, add_sums(sums)


def rft(policy: Policy, args, conversations: list[list[Prompt]], folder: Path, stop: StopSignal) -> bool:
    """Trains a new adapter on the SFT policy; continues from a checkpoint in FOLDER if there is one. Returns
    False if it was stopped before the end (after saving a checkpoint)."""
    config = training.new_adapter(policy, args, purpose=3)
    limit = reply_limit(args, sum(conversations, []))
    with training.Loop(args, policy, folder, args.algo.upper(), args.steps, args.lr, stop) as loop:
        memory, clock, samples = Memory(loop.extra.get("memory")), Stopwatch(), SampleLog(loop)
        loop.keep = lambda: {"memory": memory.best}
        if loop.done == 0 and ranks.first():
            tqdm.write("RFT: a policy loss of 0 at step 0 is right: rho is 1, and advantages have mean 0")
        for step in loop:
            with clock("sample"):
                batch, groups = act(args, policy, conversations, step, memory)
            kept = [i for i, g in enumerate(groups) if args.idle_groups == "keep" or has_variance(g)]
            trained, mine = [groups[i] for i in kept], share_of([batch[i] for i in kept])
            with clock("update"):
                for _ in range(args.inner_epochs):
                    losses, sums = zip(*ranks.exchange(gradient(args, policy, trained, mine, limit)))
                    lr, norm = loop.optimizer_step(sum(losses))
            for p, group in zip(batch, groups):  # only now: within a step all groups see the same memory
                if p.target.kind == "G":
                    memory.update(p.target.game.key, [o.rewards["s"] for o in group])
            line = step_metrics(batch, groups, add_sums(list(sums)))
            line |= {"loss": sum(losses), "lr": lr, "grad_norm": norm} | timing(groups, clock)
            samples.write(step, batch, groups)
            loop.end_step(line, live_line(line))
    if loop.finished and ranks.first():
        of_sft = adapters.read_chain(args.sft_adapter or folder / "sft" / "adapter")
        stacked = adapters.stack_adapters(*of_sft, adapters.adapter_state(policy.model), config)
        adapters.write_adapter(folder / "adapter", *stacked)
    return loop.finished


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="ToMPO: SFT, reinforcement and evaluation in one run.")
    training.add_training_arguments(parser, "runs/tompo")
    add_rft_arguments(parser)
    held_out.add_eval_arguments(parser, seat=False, fewest=0)
    ranks.start()
    args = training.parse(parser, "train_rft.py", argv)
    check_rft_arguments(args)
    held_out.held_out_instances(args)  # complains about its flags before anything is trained
    clock = Stopwatch()
    with clock("load"):
        records = training.load_records(args)
        policy = training.load_policy_of_rank(args)
        if args.sft_adapter:
            put_adapter(policy, args.sft_adapter)
        conversations = make_prompts(policy, records, args)
        held_out.check_lengths(args, policy)
    with training.run_folder(args) as folder, StopSignal() as stop:
        finished = True
        if not args.sft_adapter:
            with clock("SFT"):
                if (folder / "sft" / "adapter" / adapters.CONFIG_FILE).exists():
                    put_adapter(policy, folder / "sft" / "adapter")
                else:
                    finished = sft(policy, args, records, folder / "sft", stop)
        if finished:
            lora.merge(policy.model)
            with clock("RFT"):
                finished = rft(policy, args, conversations, folder, stop)
    if ranks.first():
        plot_curves(folder)
    if not finished:
        print(f"stopped and saved; continue with: python train_rft.py --resume {folder}")
        raise SystemExit(130)
    if args.eval_games:
        with clock("evaluation"):
            results = held_out.evaluate_run(args, policy, folder)
    if ranks.first():
        if args.eval_games:
            print("\n" + metrics.report(results, args.rounds))
        print("\n" + diagnose.summary(folder))
        dataset.print_report()
        print_times(folder, clock)
        print(f"adapter (SFT and {args.algo} in one): {folder / 'adapter'}\ncurves: {folder / 'curves.png'}")
        print(f"every sampled reply with its rewards: {folder / 'samples.jsonl'}")
        print(f"{view.of_run(folder)}\nwhat the columns of the table mean: docs/settings.md, section Metrics")


if __name__ == "__main__":
    main()

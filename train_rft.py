"""The main job: from a pretrained model to a ToMPO policy, its evaluation and its curves.

    python train_rft.py --out runs/tompo            # SFT, then ToMPO, then the table
    python train_rft.py --algo grpo --out runs/grpo --sft-adapter runs/tompo/sft/adapter
    python train_rft.py --resume runs/tompo         # after Ctrl-C or a crash: ends in the same adapter, bit for bit

One step, in the symbols of the paper (arXiv 2509.21134):
1. Take a batch of prompts q: decisions of one agent in expert games, graph and effort.
2. Sample m replies to each from pi_theta (= pi_old) and record their log-probabilities.
3. Rewards (rewards.py): compliance, sample level, and graph level with the memory of the game instance.
4. Advantages (tompo.py): each level normalised within its group, A = w_sample A^S + w_graph A^G.
5. Minimise -J: clipped ratio times A, minus beta KL(pi, pi_ref), with one denominator for the whole step.

How this departs from the paper, all [choice]: exact experts instead of GPT-o3; prompts come from a fixed set of expert
games (so the memory of an instance is met again); the reward of an effort decision and the two weights in R^G; a
135M-parameter model by default (`--preset paper` has the paper's model and values).

pi_ref is the SFT policy: the SFT adapter is merged into the base weights (in bf16: kept beside them, see lora.py) before
a new adapter is added, so "adapter off" is pi_ref, and KL(pi, pi_ref) is 0 at step 0. RUN/adapter holds both adapters
as one, for the plain base model.
The policy loss at step 0 prints 0, and that is right: rho is 1 and advantages have mean 0; its gradient is not 0.
"""

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models import adapters as adapter_files
from run import checkpoint
from tools import diagnose
import eval as evaluation
import experts
from teachers import language as llm_experts
import lora
from run import ranks
import tompo
from games import Game, State
from world.draws import game_from_json
from play.players import default_max_new_tokens
from policy import Policy, Rollout, put_adapter
from prompts import Decision, parse_reply
from rewards import GRAPH_SCORES, Memory, Target, group_rewards, made_consistent, return_credits
from run.files import InputError, JsonLines, StopSignal, Stopwatch, number, positive_int
from run.files import reports_errors, write_json
from fast.shared_prefix import pack
from train_sft import (
    PAPER,
    add_training_arguments,
    agreed_stop,
    in_trained_seats,
    learning_rate,
    load_policy_of_rank,
    load_records,
    make_optimizer,
    micro_batches,
    new_adapter,
    optimizer_step,
    parse,
    run_folder,
    saved_if_a_rank_is_lost,
    sft,
)


@dataclass
class Prompt:
    """One decision of an expert game, as a prompt of RFT. state: the one in which it is taken."""

    record: experts.Record
    ids: list[int]
    state: State
    target: Target

    @property
    def game(self) -> Game:
        return self.state.game


def make_prompts(policy: Policy, records: list[experts.Record], args) -> list[Prompt]:
    """The decisions in the trained seats, with what the experts of all agents would do in their place."""
    trained = {(r.game, r.stage, r.seat) for r in in_trained_seats(args, records)}
    stages: dict[tuple[int, int], list] = {}
    for r in records:
        stages.setdefault((r.game, r.stage), []).append(r)
    prompts, histories = [], {}
    for game_index, stage in sorted(stages):
        of_stage = sorted(stages[game_index, stage], key=lambda r: r.seat)
        state = State(game_from_json(of_stage[0].instance), histories.get(game_index, ()))
        if [r.seat for r in of_stage] != list(range(state.game.N)) or len(state.history) != stage:
            missing = f"the data set lacks decisions of game {game_index}, stage {stage}"
            raise InputError(f"{missing}: RFT needs all seats and stages")
        played = of_stage[0].proposals if of_stage[0].kind == "G" else of_stage[0].efforts
        histories[game_index] = (*state.history, np.array(played))
        actions = np.array([experts.label_decision(r).action for r in of_stage])
        for r in of_stage:
            if (r.game, r.stage, r.seat) in trained:
                prompts.append(Prompt(r, policy.encode_prompt(r.prompt), state, Target(state.game, r.kind, r.seat, actions)))
    for kind, name, count in (("G", "graph", args.graph_prompts), ("E", "effort", args.effort_prompts)):
        if count and not all(of_kind[kind] for of_kind in by_conversation(prompts)):
            raise InputError(f"the data set has games without {name} decisions; set --{name}-prompts 0 or give other data")
    return prompts


def by_conversation(prompts: list[Prompt]) -> list[dict[str, list[Prompt]]]:
    """The prompts of each conversation (an agent in a game), by kind of decision."""
    conversations: dict[tuple[int, int], dict[str, list[Prompt]]] = {}
    for p in prompts:
        conversations.setdefault((p.record.game, p.record.seat), {"G": [], "E": []})[p.record.kind].append(p)
    return list(conversations.values())


def next_batch(prompts: list[Prompt], graph: int, effort: int, step: int, seed: int) -> list[Prompt]:
    """The prompts of a step: so many graph and effort decisions. As far as possible they are decisions of the same
    conversations (drawn in a new random order every epoch), which share most of their tokens."""
    drawn = by_conversation(prompts)
    rng = np.random.default_rng([seed, 7, step])
    batch = []
    for k, i in enumerate(checkpoint.shuffled(len(drawn), max(graph, effort), step, seed, 4)):
        for kind, count in (("G", graph), ("E", effort)):
            if k < count:
                batch.append(drawn[i][kind][rng.integers(len(drawn[i][kind]))])
    return batch


def credits_of(args, batch: list[Prompt], decisions: list[list[Decision | None]], step: int) -> list[list[float] | None]:
    """The credit of every rollout of a step, which takes the place of the sample level; None under --credit immediate."""
    if args.credit == "immediate":
        return [None] * len(batch)
    expert, credits = experts.expert_of(args), {}
    keys = [((p.record.game, p.record.seat, p.record.round), p.record.kind) for p in batch]
    for key, p, of_group in zip(keys, batch, decisions):
        seed = [args.seed, 8, step, p.record.game]
        credits.setdefault(key, []).extend(return_credits(of_group, p.target, p.state, expert, args.gamma, seed))
    credits = {key: iter(values) for key, values in made_consistent(credits, args.zeta).items()}
    return [[next(credits[key]) for _ in of_group] for key, of_group in zip(keys, decisions)]


def rewards_and_advantages(args, batch: list[Prompt], groups: list[list[Rollout]], memory: Memory, step: int) -> None:
    """Fills in rewards and advantages of all groups of a step, in place."""
    decisions = []
    for p, group in zip(batch, groups):
        place = p.record.kind, p.record.seat, p.game.N, p.game.caps[p.record.seat]
        decisions.append([parse_reply(o.text, *place) for o in group])
    settings = args.w_local, args.w_global if args.memory else 0.0, args.graph_score, args.w_belief
    for p, group, of_group, credits in zip(batch, groups, decisions, credits_of(args, batch, decisions, step)):
        terms = group_rewards(of_group, p.target, memory.get(p.game.key), *settings, credits)
        r_S_M = torch.tensor([t["r_S"] for t in terms])
        R_G_M = torch.tensor([t["R_G"] for t in terms]) if p.record.kind == "G" else None
        A, A_S, A_G = tompo.dual_level_advantages(r_S_M, R_G_M, args.algo, args.w_sample, args.w_graph)
        for i, o in enumerate(group):
            o.advantage = float(A[i])
            o.rewards = terms[i] | {"A_S": float(A_S[i]), "A_G": float(A_G[i])}


def update(
    args, policy: Policy, groups: list[list[Rollout]], mine: Sequence[int], beta: float
) -> tuple[float, tompo.Sums]:
    """Adds the gradient of -J over the groups `mine`, weighted as part of all groups. Returns their part of the loss,
    and their diagnostics."""
    lengths = [len(o.reply_ids) for group in groups for o in group]
    limit = args.max_new_tokens or max(lengths)
    weights = tompo.token_weights(lengths, args.aggregation, limit)
    weight_of = {id(o): w for o, w in zip((o for group in groups for o in group), weights)}
    groups = [groups[i] for i in mine]
    rows = pack([group[0].prompt_ids for group in groups], [[o.reply_ids for o in group] for group in groups])
    loss, sums = 0.0, tompo.Sums()
    for part in micro_batches(rows, args.micro_batch):
        rollouts = [o for row in part for i in row.prompts for o in groups[i]]  # in the order of the targets

        def by_token(values):  # one value per rollout -> one per reply token
            return torch.tensor([v for v, o in zip(values, rollouts) for _ in o.reply_ids], device=policy.device)

        ref_logp_T = torch.cat(policy.reference_logps(part, args.temperature)) if beta else None
        part_loss = tompo.objective_loss(
            torch.cat(policy.token_logps(part, args.temperature)),
            torch.tensor([v for o in rollouts for v in o.sampled_logps], device=policy.device),
            ref_logp_T,
            by_token([o.advantage for o in rollouts]),
            by_token([weight_of[id(o)] for o in rollouts]),
            args.clip_eps,
            beta,
            sums,
            args.clip_eps_high,
        )
        part_loss.backward()
        loss += part_loss.item()
    return loss, sums


def step_metrics(groups: list[list[Rollout]], prompts: list[Prompt], sums: tompo.Sums) -> dict:
    """What one step's samples look like. Every key is explained in the README's glossary."""
    everything = [o for group in groups for o in group]
    graph = [o for p, group in zip(prompts, groups) for o in group if p.record.kind == "G"]
    effort = [o for p, group in zip(prompts, groups) for o in group if p.record.kind == "E"]

    def mean(rollouts, value):
        return sum(map(value, rollouts)) / len(rollouts) if rollouts else None

    return {
        "reward": mean(everything, lambda o: o.rewards["r_S"]),
        "reward_graph": mean(graph, lambda o: o.rewards["r_S"]),
        "reward_effort": mean(effort, lambda o: o.rewards["r_S"]),
        "s": mean(graph, lambda o: o.rewards["s"]),
        "R_G": mean(graph, lambda o: o.rewards["R_G"]),
        "belief": mean(everything, lambda o: o.rewards["belief"]),
        "U1": mean(everything, lambda o: o.rewards["compliance"] > 0),
        "kl": sums.kl / sums.tokens if sums.has_reference else None,
        "approx_kl": sums.approx_kl / sums.tokens,
        "clip_fraction": sums.clipped / sums.tokens,
        "max_ratio_error": sums.max_ratio_error,
        "zero_variance_groups": mean(groups, lambda g: all(o.advantage == 0 for o in g)),
        "distinct_replies": mean(groups, lambda g: len({o.text for o in g}) / len(g)),
        "reply_tokens": mean(everything, lambda o: len(o.reply_ids)),
        "entropy": -mean(everything, lambda o: sum(o.sampled_logps)) / mean(everything, lambda o: len(o.reply_ids)),
    }


def sample_lines(step: int, groups: list[list[Rollout]], prompts: list[Prompt]):
    """One line of samples.jsonl for every sampled reply."""
    for prompt, group in zip(prompts, groups):
        r = prompt.record
        for o in group:
            where = {"step": step, "game": r.game, "stage": r.stage, "kind": r.kind, "seat": r.seat}
            yield where | {"reply": o.text, "expert": r.label, **o.rewards, "advantage": o.advantage}


def rft(policy: Policy, args, records: list[experts.Record], folder: Path, stop: StopSignal) -> bool:
    """Trains a new adapter on the SFT policy; continues from a checkpoint in FOLDER if there is one. Returns False if
    it was stopped before the end (after saving a checkpoint)."""
    config = new_adapter(policy, args, purpose=3)
    prompts, memory = make_prompts(policy, records, args), Memory()
    optimizer, done, beta = make_optimizer(policy), 0, args.beta
    saved = checkpoint.latest_checkpoint(folder / "checkpoints")
    if saved:
        done, adapter, extra = checkpoint.load_checkpoint(saved, optimizer)
        lora.load_adapter_state(policy.model, adapter)
        memory, beta = Memory(extra["memory"]), extra["beta"]
    longest = max(prompts, key=lambda p: len(p.ids))
    policy.check_length(len(longest.ids), args.max_new_tokens or default_max_new_tokens(longest.game.N))
    metrics, samples = (JsonLines(folder / f"{name}.jsonl", done, ranks.first()) for name in ("metrics", "samples"))
    steps = min(args.steps, args.max_steps or args.steps)

    def save(steps_done):
        if ranks.first():
            state = lora.adapter_state(policy.model)
            checkpoint.save_checkpoint(folder / "checkpoints", steps_done, state, optimizer, {"memory": memory.best, "beta": beta})

    clock, bar = Stopwatch(), tqdm(total=steps, initial=done, desc=args.algo.upper(), unit="step", disable=not ranks.first())
    for step in range(done, steps):
        inner = 0  # after the first inner step the adapter is no longer that of a step's end, and not saved
        with saved_if_a_rank_is_lost(lambda: step and inner == 0 and save(step), args.out):
            with clock("sample"):
                batch = next_batch(prompts, args.graph_prompts, args.effort_prompts, step, args.seed)
                mine = ranks.share([(p.record.game, p.record.seat) for p in batch])
                limit = args.max_new_tokens or default_max_new_tokens(max(p.game.N for p in batch))
                generator = checkpoint.seeded(args.seed, 6, step)
                groups = policy.sample([p.ids for p in batch], args.m, limit, args.temperature, generator, only=mine)
                groups = ranks.whole(mine, groups)
            sample_s = clock.last
            rewards_and_advantages(args, batch, groups, memory, step)
            with clock("update"):
                lr = learning_rate(step, args.steps, args.lr)
                for inner in range(args.inner_epochs):
                    losses, sums = zip(*ranks.exchange(update(args, policy, groups, mine, beta)))
                    norm = optimizer_step(optimizer, lr, args.max_grad_norm)
            loss, sums = sum(losses), tompo.Sums.of_all(sums)
        for prompt, group in zip(batch, groups):  # only now: within a step all groups see the same memory
            if prompt.record.kind == "G":
                memory.update(prompt.game.key, [o.rewards["s"] for o in group])
        line = {"step": step} | step_metrics(groups, batch, sums) | {"loss": loss, "lr": lr, "grad_norm": norm, "beta": beta}
        tokens = sum(len(o.reply_ids) for group in groups for o in group)
        line |= {"tokens_per_s": tokens / (sample_s + clock.last), "sample_s": sample_s, "update_s": clock.last}
        if args.kl_target:
            beta = tompo.adapted_beta(beta, line["kl"], args.kl_target)
        metrics.write(line)
        for sample in sample_lines(step, groups, batch):
            samples.write(sample)
        live = {"reward": "reward", "U1": "U1", "s": "s", "KL": "kl"}
        live = ", ".join(f"{name} {line[key]:.3f}" for name, key in live.items() if line[key] is not None)
        bar.set_postfix_str(f"{live}, {line['tokens_per_s']:.0f} reply tok/s")
        bar.update()
        stopping = agreed_stop(stop, lambda: save(step + 1), args.out)
        if stopping or (step + 1) % args.save_every == 0 or step + 1 == steps:
            save(step + 1)
        if ranks.first() and (step + 1) % max(8, steps // 4) == 0 and step + 1 < steps:  # the end has its own
            tqdm.write(diagnose.summary(folder))
        if stopping:
            ranks.exchange(None)  # nobody leaves before rank 0 has saved
            bar.close()
            return False
    bar.close()
    if ranks.first():
        sft_adapter = adapter_files.read_adapter(sft_folder(args, folder))
        stacked = adapter_files.stack_adapters(*sft_adapter, lora.adapter_state(policy.model), config)
        adapter_files.write_adapter(folder / "adapter", *stacked)
    return True


def sft_folder(args, folder: Path) -> str:
    return args.sft_adapter or str(folder / "sft" / "adapter")


def evaluate_run(args, policy: Policy, folder: Path) -> dict:
    """Base, SFT and trained policy, the other seats' expert and random play, on the same held-out games."""
    results = {args.algo: evaluation.evaluate_policy(args, policy, args.algo)}
    lora.remove(policy.model)  # what is left is the SFT policy
    results["sft"] = evaluation.evaluate_policy(args, policy, "sft")
    results["base"] = evaluation.evaluate_policy(args, load_policy_of_rank(args), "base")
    for name in (args.expert, "random"):
        results[f"expert:{name}"] = evaluation.evaluate_expert(args, name)
    if ranks.first():
        write_json(folder / "eval.json", {"arguments": vars(args), "results": results})
    return results


def plot_curves(folder: Path, sft_metrics: Path) -> None:
    """curves.png: what SFT and RFT did, with the steps' own values in light and a running mean of 5 in full."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def draw(axis, rows, key, label, colour):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if not points:
            return
        x, y = np.array(points).T
        width = min(5, len(y))
        smooth = [y[max(0, i - width + 1) : i + 1].mean() for i in range(len(y))]
        axis.plot(x, y, colour, alpha=0.25)
        axis.plot(x, smooth, colour, label=f"{label}: {smooth[-1]:.2f} at the end")
        axis.legend(fontsize=8)

    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    sft_rows, rows = read(sft_metrics), read(folder / "metrics.jsonl")
    draw(a, sft_rows, "loss", "SFT reply loss", "C0")
    draw(b, rows, "reward_graph", "graph decisions", "C0")
    draw(b, rows, "reward_effort", "effort decisions", "C1")
    draw(c, rows, "s", "graph score s", "C2")
    draw(d, rows, "U1", "compliance U1", "C3")
    draw(e, rows, "kl", "KL(pi, pi_ref) per token", "C4")
    draw(f, rows, "entropy", "entropy per token", "C5")
    draw(f, rows, "zero_variance_groups", "groups without variance", "C7")
    titles = ("SFT: loss", "RFT: reward r^S (at most 2.5)", "RFT: graph score s of sampled replies")
    titles += ("RFT: compliance of sampled replies", "RFT: distance from the SFT policy", "RFT: variety")
    for axis, title in zip((a, b, c, d, e, f), titles):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    c.set_ylim(top=1.02)
    d.set_ylim(top=1.02)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def add_rft_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reinforcement fine-tuning")
    group.add_argument("--algo", choices=tompo.ALGORITHMS, default="tompo", help="grpo is the sample level alone")
    group.add_argument("--sft-adapter", metavar="FOLDER", help="start from this SFT adapter instead of training one")
    group.add_argument("--steps", type=positive_int, default=16, help="optimizer steps (sampling rounds)")
    group.add_argument("--graph-prompts", type=number(int, 0), default=8, help="graph decisions per step")
    group.add_argument("--effort-prompts", type=number(int, 0), default=2, help="effort decisions per step")
    group.add_argument("--m", type=positive_int, default=8, help="replies per prompt: the group")
    group.add_argument("--lr", type=number(float, 0), default=2e-4, help="peak learning rate (warm-up, then cosine to 0)")
    group.add_argument("--inner-epochs", type=positive_int, default=1, help="optimizer steps on the same samples")
    group.add_argument("--temperature", type=number(float, 0), default=1.0, help="of sampling and of every log-probability")
    group.add_argument("--w-sample", type=number(float, 0), default=0.8, help="weight of A^S in graph decisions [source: 0.8]")
    group.add_argument("--w-graph", type=number(float, 0), default=0.2, help="weight of A^G [source: 0.2]")
    group.add_argument("--w-local", type=number(float, 0), default=0.5, help="bonus in R^G for the best graph of the group")
    group.add_argument("--w-global", type=number(float, 0), default=0.5, help="bonus in R^G for matching the memory's best")
    group.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="the memory term of R^G")
    group.add_argument("--graph-score", choices=GRAPH_SCORES, default="hamming", help="s: like the expert graph, or its welfare")
    group.add_argument("--w-belief", type=number(float, 0), default=0.0, help="weight of a reward for the Belief line")
    group.add_argument("--credit", choices=("immediate", "return"), default="immediate", help="see rewards.py")
    group.add_argument("--gamma", type=number(float, 0, 1), default=1.0, help="discount per round of --credit return")
    group.add_argument("--zeta", type=number(float, 0), default=0.0, help="weight of |C_G - C_E| in --credit return")
    group.add_argument("--clip-eps", type=number(float, 0), default=0.2, help="clip range of the ratio")
    group.add_argument("--clip-eps-high", type=number(float, 0), help="its upper end, if that is to be another")
    group.add_argument("--beta", type=number(float, 0), default=0.04, help="weight of KL(pi, pi_ref); 0 skips the reference")
    group.add_argument("--kl-target", type=number(float, 0), help="adapt beta so that KL per token stays about here")
    group.add_argument("--aggregation", choices=tompo.AGGREGATIONS, default="sequence", help="see tompo.token_weights")


def peak_memory_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="ToMPO: SFT, reinforcement fine-tuning and evaluation in one run.")
    add_training_arguments(parser)
    add_rft_arguments(parser)
    evaluation.add_eval_arguments(parser, "--eval-seat")
    parser.add_argument("--out", default="runs/tompo", help="the run folder")
    ranks.start()
    args = parse(parser, "train_rft.py", PAPER | dict(lr=1e-5), argv)  # the paper leaves its RFT rate open
    if args.graph_prompts + args.effort_prompts == 0:
        raise InputError("--graph-prompts and --effort-prompts are both 0: a step needs prompts")
    if args.train_on == "separate":
        raise InputError("--train-on separate makes two adapters, RFT trains one policy: use train_sft.py, or train on both")
    if args.temperature <= 0:
        raise InputError("--temperature must be above 0: a greedy policy has no group to compare")
    if args.kl_target == 0:
        raise InputError("--kl-target must be above 0; leave it out for a fixed --beta")
    if args.kl_target and not args.beta:
        raise InputError("--kl-target adapts --beta, which is 0: give it a value to start from")
    if args.w_belief and not args.belief:
        raise InputError("--w-belief rewards the Belief line, which --no-belief switches off")
    if args.credit == "return" and llm_experts.is_language(args.expert):
        raise InputError("--credit return plays every game to its end with the expert: choose an exact --expert for it")
    experts.expert_of(args)
    evaluation.held_out_instances(args)  # complains about its flags before anything is trained
    clock = Stopwatch()
    with clock("load"):
        records = load_records(args)
        policy = load_policy_of_rank(args)
        if args.sft_adapter:
            put_adapter(policy, args.sft_adapter)
    folder = run_folder(args)
    with StopSignal() as stop:
        finished = True
        if not args.sft_adapter:
            with clock("SFT"):
                if (folder / "sft" / "adapter" / adapter_files.CONFIG_FILE).exists():
                    put_adapter(policy, folder / "sft" / "adapter")
                else:
                    finished = sft(policy, args, records, folder / "sft", stop)
        if finished:
            lora.merge(policy.model)
            with clock("RFT"):
                finished = rft(policy, args, records, folder, stop)
    if not finished:
        print(f"stopped and saved; continue with: python train_rft.py --resume {folder}")
        raise SystemExit(130)
    with clock("evaluation"):
        results = evaluate_run(args, policy, folder)
    if not ranks.first():
        return
    plot_curves(folder, folder / "sft" / "metrics.jsonl")
    print("\n" + evaluation.report(results, args.rounds))
    print("\n" + diagnose.summary(folder))
    llm_experts.print_report()
    times = ", ".join(f"{stage} {seconds / 60:.1f} min" for stage, seconds in clock.seconds.items())
    write_json(folder / "timing.json", {"seconds": clock.seconds, "peak_memory_gib": peak_memory_gib()})
    print(f"\ntime: {times}; peak memory {peak_memory_gib():.1f} GiB")
    print(f"adapter (SFT and {args.algo} in one): {folder / 'adapter'}\ncurves: {folder / 'curves.png'}")
    print(f"every sampled reply with its rewards: {folder / 'samples.jsonl'}")


if __name__ == "__main__":
    main()

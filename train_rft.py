"""The main job: from a pretrained model to a ToMPO policy, its evaluation and its curves.

    python train_rft.py --out runs/tompo            # SFT, then ToMPO, then the table
    python train_rft.py --algo grpo --out runs/grpo --sft-adapter runs/tompo/sft/adapter
    python train_rft.py --resume runs/tompo         # after Ctrl-C or a crash: the same adapter, bit for bit

The algorithm (arXiv 2509.21134) is the loop in `rft`. pi_ref is the SFT policy: the SFT adapter is merged
into the base weights before a new adapter is added, so "adapter off" is pi_ref, and KL(pi, pi_ref) is 0 at
step 0. RUN/adapter holds both adapters as one, for the plain base model.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import lora
from eval import check_lengths, evaluate_run, instances
from models import adapters
from models.load import put_adapter
from play.dataset import Prompt, make_prompts, trained_seats
from play.report import report
from play.rft_log import RFTLog, diagnostics
from play.sampling import sample_replies
from play.self_play import SelfPlay
from policy import Policy
from prompts import parse_reply
from rewards import Memory, Sample
from run import ranks
from run.curves import plot_curves
from run.errors import memory_errors, reports_errors
from run.files import StopSignal, Stopwatch, print_times, run_folder
from run.seeds import Stream, torch_generator
from run.stage import Stage
from settings import RFT, Evaluation, Settings, parse_training, training_parser
from teachers.language import print_report
from tompo import two_levels
from tools import diagnose, view
from train_sft import (
    MAX_GRAD_NORM,
    clip_gradient,
    learning_rate,
    make_optimizer,
    make_probe,
    new_adapter,
    run_sft,
)

PROBE_EVERY = 5  # steps


def rft(policy: Policy, cfg: RFT, pool: list[list[Prompt]], limit: int, optimizer, stage: Stage) -> None:
    """The training loop; docs/one-step.md walks through one prompt in numbers. cfg: what the flags chose
    (settings.RFT). By default its reward is rewards.expert_rewards, its next_batch dataset.next_batch, and
    advantage, aggregation, ratio, loss and kl are the first of each table in variants/objective.py: the
    formulas of tompo.py, and rho of every token by itself. `--algo grpo` sets w_sample, w_graph to 1, 0.
    pool: all prompts, by conversation; limit: the longest reply in tokens; stage: counts, logs, saves and
    stops (run/stage.py); M: the replies of a group; T: the tokens of all replies of a pass."""
    memory = Memory(stage.state.setdefault("memory", {}))  # stage.state is saved, so a resumed run remembers
    log = RFTLog(stage)
    for step in stage.steps():
        # 1. Prompts q: decisions of one agent in expert games.
        prompts = cfg.next_batch(pool, cfg.counts, step, cfg.seed)
        targets = [q.target for q in prompts]
        # 2. m replies o_i to each from pi_theta (= pi_old until the optimizer steps), and their decisions.
        generator = torch_generator(cfg.seed, Stream.RFT_REPLIES, step)  # a resumed run draws the same
        groups = sample(policy, prompts, cfg.m, limit, cfg.temperature, generator)
        sample_s = stage.elapsed
        # 3. r^S of every reply, and R^G where links are chosen: all terms are in rewards.py.
        cfg.reward(targets, groups, memory)
        # 4. A = w_sample A^S + w_graph A^G, each normalised within its group (tompo.group_normalise). Both
        # are by the number of the group: every group has r_S, but R_G only those with a graph level.
        A_S, A_G = (advantages(groups, name, cfg.advantage) for name in ("r_S", "R_G"))
        A = [two_levels(A_S[k], A_G.get(k), cfg.w_sample, cfg.w_graph) for k in A_S]
        write_advantages(groups, A, A_S, A_G)
        # 5. [choice] A group with A = 0 throughout, as when all rewards are equal, has no policy gradient.
        # It is left out of E, its KL term too. w_i = 1 / (replies in all live groups * |o_i|), so that sum_i
        # sum_t w_i (...) over the step is E[ (1/m) sum_i (1/|o_i|) sum_t (...) ] (tompo.mean_of_replies).
        live = [(q, group) for q, group, A_M in zip(prompts, groups, A, strict=True) if A_M.any()]
        weigh([o for _, group in live for o in group], cfg.aggregation, limit)
        # 6. Maximise J = E[ (1/m) sum_i (1/|o_i|) sum_t ( min(rho A, clip(rho) A) - beta k3 ) ].
        parts = list(batches(policy, live, cfg))  # with log pi_ref, which no inner epoch changes
        for _ in range(cfg.inner_epochs):
            passes = []  # for the log
            for b in parts:
                logp_T = torch.cat(policy.token_logps(*b.texts, cfg.temperature))
                rho_T = cfg.ratio(logp_T - b.old_T, b.lengths).exp()  # pi_theta / pi_old
                J_T = cfg.loss(rho_T, logp_T, b.A_T, *cfg.clip)  # min(rho A, clip(rho, 1-eps, 1+eps) A)
                if cfg.beta:
                    J_T = J_T - cfg.beta * cfg.kl(logp_T, b.ref_T)  # k3
                loss = -(b.w_T * J_T).sum()
                loss.backward()
                measured = diagnostics(logp_T, b.old_T, b.ref_T, rho_T, b.A_T, *cfg.clip)
                passes.append({"loss": loss.item()} | measured)
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, cfg.steps, cfg.lr)
            norm = clip_gradient(optimizer, MAX_GRAD_NORM)  # of the sum over all processes
            optimizer.step()  # without live groups the gradient is 0, and Adam's momentum still moves
            optimizer.zero_grad()
        # 7. The memory learns of the step only now, so that all its groups were rewarded by the same memory.
        memory.update(targets, groups)
        log.end_step(step, prompts, groups, passes, lr=lr, grad_norm=norm, sample_s=sample_s)


# -------------------- what the loop calls


def sample(
    policy: Policy, prompts: list[Prompt], M: int, S: int, temperature: float, generator: torch.Generator
) -> list[list[Sample]]:
    """M replies of up to S tokens to every prompt, [P][M], and what the strict parser reads in them."""
    ids, keys = [q.ids for q in prompts], [q.conversation for q in prompts]
    # Drafts for the fast engine. A label is never copied: every token is drawn from pi_theta with its own
    # random number, and a draft that is right only saves time (fast/drafts.py).
    guesses = [policy.encode_reply(q.record.label) for q in prompts]
    replies = sample_replies(policy, ids, guesses, M, S, temperature, generator, keys)
    return [
        [Sample(reply, parse_reply(reply.text, q.target.state, q.target.seat)) for reply in group]
        for q, group in zip(prompts, replies, strict=True)
    ]


def advantages(groups: list[list[Sample]], name: str, advantage: Callable) -> dict[int, Tensor]:
    """One level of advantage, (M,) by the number of the group, for groups that have a reward of this name."""
    rewards = {k: reward_tensor(group, name) for k, group in enumerate(groups) if name in group[0].rewards}
    return dict(zip(rewards, advantage(list(rewards.values())), strict=True))


def reward_tensor(group: list[Sample], name: str) -> Tensor:
    """(M,), in double precision."""
    return torch.tensor([o.rewards[name] for o in group], dtype=torch.double)


def write_advantages(
    groups: list[list[Sample]], A: list[Tensor], A_S: dict[int, Tensor], A_G: dict[int, Tensor]
) -> None:
    """Writes A, (M,) for each group, into the samples, for `batches`; A^S and A^G too, for the log."""
    for k, group in enumerate(groups):
        A_G_M = A_G.get(k, torch.zeros(len(group)))
        for o, a, a_S, a_G in zip(group, A[k].tolist(), A_S[k].tolist(), A_G_M.tolist(), strict=True):
            o.advantage = a
            o.rewards |= {"A_S": a_S, "A_G": a_G}


def weigh(samples: list[Sample], aggregation: Callable, limit: int) -> None:
    """Writes w_i, the weight of each of a reply's tokens in J, into all replies that J sums over."""
    lengths = [len(o.reply.ids) for o in samples]
    for o, w in zip(samples, aggregation(lengths, limit) if samples else (), strict=True):
        o.weight = w


@dataclass
class Batch:
    """What one pass scores, a part of a step. texts: the token ids of its prompts, and those of all replies
    to each; lengths: of the replies; old_T, A_T, w_T, ref_T: log pi_old (as it was when the token was drawn),
    A, w, and log pi_ref (None with --beta 0), of every reply token, in the order of the replies."""

    texts: tuple[list[list[int]], list[list[list[int]]]]
    lengths: list[int]
    old_T: Tensor
    A_T: Tensor
    w_T: Tensor
    ref_T: Tensor | None


def batches(policy: Policy, live: list[tuple[Prompt, list[Sample]]], cfg: RFT) -> Iterator[Batch]:
    """The live groups, scored by pi_ref, pass by pass; several processes share them."""
    own = [live[k] for k in ranks.share([q.conversation for q, _ in live])]
    ids, replies = [q.ids for q, _ in own], [[o.reply.ids for o in group] for _, group in own]
    for indices in policy.batches(ids, replies, cfg.micro_batch):
        samples = [o for i in indices for o in own[i][1]]
        lengths = torch.tensor([len(o.reply.ids) for o in samples])
        old_T = torch.tensor([logp for o in samples for logp in o.reply.logps])
        A_T = torch.tensor([o.advantage for o in samples]).repeat_interleave(lengths)
        w_T = torch.tensor([o.weight for o in samples]).repeat_interleave(lengths)
        texts = [ids[i] for i in indices], [replies[i] for i in indices]
        old_T, A_T, w_T = (values.to(policy.device) for values in (old_T, A_T, w_T))
        ref_T = torch.cat(policy.reference_logps(*texts, cfg.temperature)) if cfg.beta else None
        yield Batch(texts, lengths.tolist(), old_T, A_T, w_T, ref_T)


# -------------------- the run


def run_rft(settings: Settings, policy: Policy, pool, folder: Path, stop: StopSignal) -> bool:
    """Trains a new adapter on the SFT policy; continues from a checkpoint in FOLDER if there is one.
    Returns False if it was stopped before the end, after saving a checkpoint."""
    cfg, data, style = settings.rft, settings.data, settings.players.style
    N = max(q.target.game.N for conversation in pool for q in conversation)
    if settings.players.self_play:
        fresh = SelfPlay(policy, style, cfg.temperature, settings.games.families, data.agents)
        cfg, N = replace(cfg, next_batch=fresh.next_batch), max(N, data.agents[1])
    adapter = new_adapter(policy, settings.lora, cfg.seed, Stream.RFT_ADAPTER)
    optimizer = make_optimizer(policy.model)
    parameters = adapters.named_parameters(policy.model)
    with Stage(folder, cfg.algo.upper(), cfg.steps, parameters, optimizer, stop, settings.flags) as stage:
        stage.probe = make_probe(settings, policy, stage, cfg.algo.upper(), PROBE_EVERY)
        if stage.steps_done == 0 and ranks.first():
            tqdm.write("RFT: advantages sum to 0 in a group, so the loss starts near 0: watch the reward")
        rft(policy, cfg, pool, style.reply_limit(N), optimizer, stage)
    if stage.finished and ranks.first():
        sft_adapter = cfg.sft_adapter or folder / "sft" / "adapter"
        adapters.save_both(policy.model, sft_adapter, folder / "adapter", adapter)
    return stage.finished


def prepare(settings: Settings) -> tuple[Policy, list, list[list[Prompt]]]:
    """The policy, the records of the expert games and the prompts of RFT. What can be wrong with them is
    found here, before anything is trained."""
    data, style = settings.data, settings.players.style
    instances(settings.games, settings.evaluation)  # complains about its flags
    records = settings.load_data()
    policy = settings.load_model()
    if settings.rft.sft_adapter:
        put_adapter(policy, settings.rft.sft_adapter)
        settings.keep("sft_adapter_sha256", adapters.checksum(settings.rft.sft_adapter), "--sft-adapter")
    trained = trained_seats(records, data.seat, data.seed)
    pool = make_prompts(policy, records, trained, settings.rft.counts, style)
    check_lengths(settings, policy)
    if not settings.rft.sft_adapter and not settings.run.resume:
        try_memory(settings, policy, pool)
    return policy, records, pool


def try_memory(settings: Settings, policy: Policy, pool: list[list[Prompt]]) -> None:
    """Computes one pass of RFT's update, of the longest prompts with replies as long as their labels, on an
    adapter that is taken off again. What is far too large for the memory is known now, and not after SFT."""
    cfg, P, V = settings.rft, sum(settings.rft.counts.values()), len(policy.tokenizer)
    label = lambda q: policy.encode_reply(q.record.label)
    tokens = lambda q: len(q.ids) + cfg.m * len(label(q))
    asked = ([q for q in conversation if cfg.counts.get(q.target.kind.letter)] for conversation in pool)
    longest = sorted((max(own, key=tokens) for own in asked if own), key=tokens, reverse=True)[:P]
    with memory_errors("RFT"):
        torch.empty(P, cfg.m, settings.players.style.reply_limit(settings.data.agents[1]))  # random numbers
        replies = [[[k % V] * len(label(q)) for k in range(cfg.m)] for q in longest]  # no two begin alike
        own = policy.batches([q.ids for q in longest], replies, cfg.micro_batch)[0]
        new_adapter(policy, settings.lora, cfg.seed, Stream.RFT_ADAPTER)
        logps = policy.token_logps([longest[i].ids for i in own], [replies[i] for i in own], cfg.temperature)
        torch.cat(logps).sum().backward()
        lora.remove(policy.model)


@reports_errors
def main(argv=None) -> None:
    ranks.start()
    text = "ToMPO: SFT, reinforcement and evaluation in one run."
    parser = training_parser(text, "runs/tompo", RFT, Evaluation)
    settings = parse_training(parser, "train_rft.py", argv)
    clock, algo = Stopwatch(), settings.rft.algo
    with clock("load"):
        policy, records, pool = prepare(settings)
    with run_folder(settings.run.out, None if settings.run.resume else settings.flags) as folder:
        with StopSignal() as stop:
            finished = True
            if not settings.rft.sft_adapter:
                with clock("SFT"):
                    if (folder / "sft" / "adapter" / adapters.CONFIG_FILE).exists():
                        put_adapter(policy, folder / "sft" / "adapter")
                    else:
                        finished = run_sft(settings, policy, records, folder / "sft", stop)
            if finished:
                lora.merge(policy.model)
                with clock("RFT"):
                    finished = run_rft(settings, policy, pool, folder, stop)
        if ranks.first():
            plot_curves(folder)
        if not finished:
            print(f"stopped and saved; continue with: python train_rft.py --resume {folder}")
            raise SystemExit(130)
        if settings.evaluation.games:
            with clock("evaluation"):
                results = evaluate_run(settings, policy, folder)
        if ranks.first():
            if settings.evaluation.games:
                print("\n" + report(results))
            print("\n" + diagnose.summary(folder))
            print_report()
            print_times(folder, clock)
            print(f"adapter (SFT and {algo} in one): {folder / 'adapter'}\ncurves: {folder / 'curves.png'}")
            print(f"every sampled reply with its rewards: {folder / 'samples.jsonl'}")
            print(view.of_run(folder))
            print("what the columns of the table mean: docs/settings.md, section Metrics")


if __name__ == "__main__":
    main()

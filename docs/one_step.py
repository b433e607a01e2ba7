"""Writes docs/one-step.md: one real step of RFT on one prompt, from the prompt to the gradient, in numbers.

    python -m docs.one_step --sft-adapter runs/tompo/sft/adapter --out docs/one-step.md

Every number comes from the functions that train_rft.py calls; tests/test_one_step.py recomputes the page from
its own tables.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
import textwrap

import torch

import lora
import settings as flags
import tompo
from games import form_links
from models.load import put_adapter
from play.dataset import make_prompts, next_batch, trained_seats
from prompts import last_line, tell_links
from rewards import Memory, accuracy, f1
from run.errors import reports_errors
from run.files import write_atomic
from run.seeds import Stream, torch_generator
from train_rft import advantages, batches, reward_tensor, sample, weigh, write_advantages
from train_sft import clip_gradient, make_optimizer, new_adapter


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float) -> str:
    return f"{value:.4f}"


def page(settings: flags.Settings) -> str:
    cfg, seed, style = settings.rft, settings.run.seed, settings.players.style
    policy = settings.model.load()
    put_adapter(policy, cfg.sft_adapter)
    lora.merge(policy.model)  # pi_ref; the new adapter begins with B = 0, so pi_theta = pi_old = pi_ref
    new_adapter(policy, settings.lora, seed, Stream.RFT_ADAPTER)
    optimizer = make_optimizer(policy.model)
    records = settings.data.load(settings.games, settings.players)
    trained = trained_seats(records, settings.data.seat, seed)
    pool = make_prompts(policy, records, trained, cfg.counts, style)

    # The first decision about links in which both levels say something and every reply is compliant.
    for step in range(100):
        (q,) = next_batch(pool, {"G": 1}, step, seed)
        N, limit = q.target.game.N, style.reply_limit(q.target.game.N)
        generator = torch_generator(seed, Stream.RFT_REPLIES, step)
        (group,) = groups = sample(policy, [q], cfg.m, limit, cfg.temperature, generator)
        cfg.reward([q.target], groups, Memory())
        r_S, R_G = reward_tensor(group, "r_S"), reward_tensor(group, "R_G")
        A_S, A_G = (advantages(groups, name, cfg.advantage) for name in ("r_S", "R_G"))
        A = tompo.two_levels(A_S[0], A_G[0], cfg.w_sample, cfg.w_graph)
        if A_S[0].any() and A_G[0].any() and all(o.decision for o in group):
            break
    write_advantages(groups, [A], A_S, A_G)
    weigh(group, cfg.aggregation, limit)
    (batch,) = batches(policy, [(q, group)], cfg)
    ref_T = torch.cat(policy.reference_logps(*batch.texts, cfg.temperature))  # also with --beta 0

    def objective():
        """J of every token, rho and k3, (T,) each."""
        logp_T = torch.cat(policy.token_logps(*batch.texts))
        rho_T = cfg.ratio(logp_T - batch.old_T, batch.lengths).exp()
        clipped_T, k3_T = cfg.loss(rho_T, logp_T, batch.A_T, *cfg.clip), tompo.k3(logp_T, ref_T)
        return clipped_T - cfg.beta * k3_T, rho_T, clipped_T, k3_T, logp_T

    def mean_of_replies(values_T):
        return [float(part.mean()) for part in values_T.split(batch.lengths)]

    J_T, _, _, _, logp_T = objective()
    before = [float(part.sum()) for part in logp_T.detach().split(batch.lengths)]
    loss = -(batch.w_T * J_T).sum()
    loss.backward()
    norm = clip_gradient(optimizer, 1.0)
    first_loss = loss.item()
    optimizer.param_groups[0]["lr"] = cfg.lr
    optimizer.step()
    with torch.no_grad():
        J_T, rho_T, clipped_T, k3_T, logp_T = objective()
        after = [float(part.sum()) for part in logp_T.split(batch.lengths)]
        second_loss = float(-(batch.w_T * J_T).sum())

    target, expert_N = q.target, q.target.actions[q.target.seat]
    replies = [
        [i, last_line(o.reply.text, "Belief:"), last_line(o.reply.text, "Decision:"), len(o.reply.ids)]
        for i, o in enumerate(group, 1)
    ]
    rewards = []
    for i, o in enumerate(group, 1):
        row_N = o.decision.action
        likeness = f1(row_N, expert_N, target.seat), accuracy(row_N, expert_N, target.seat)
        graph = tell_links(form_links(target.with_own(o.decision)))
        terms = [o.rewards[key] for key in ("s", "local", "global", "R_G")]
        rewards.append([i, o.rewards["compliance"], *map(number, likeness), number(o.rewards["r_S"]), graph])
        rewards[-1] += map(number, terms)
    levels_of = []
    for i, o in enumerate(group, 1):
        levels = [o.rewards[key] for key in ("r_S", "A_S", "R_G", "A_G")]
        levels_of.append([i, *map(number, levels), number(o.advantage), f"{o.weight:.6f}"])
    columns = map(mean_of_replies, (rho_T, clipped_T, k3_T, J_T))
    moved = [
        [i, number(A_i), number(b), number(a), *(f"{v:.5f}" for v in values)]
        for i, (A_i, b, a, *values) in enumerate(zip(A.tolist(), before, after, *columns, strict=True), 1)
    ]
    mean_S, std_S = float(r_S.mean()), float(r_S.std(unbiased=False))
    mean_G, std_G = float(R_G.mean()), float(R_G.std(unbiased=False))
    chat = "\n".join(f"    {m['role']}: {m['content']}".replace("\n", "\n    ") for m in q.record.prompt)
    experts = "; ".join(f"agent {i + 1}: {row.tolist()}" for i, row in enumerate(target.actions))
    g_expert = tell_links(form_links(target.actions))
    return f"""# One step of RFT in numbers

This page follows one prompt through one step: from the text that the model reads to the gradient and what
it changes. It was written by `python -m docs.one_step --sft-adapter runs/tompo/sft/adapter` (seed {seed});
every number comes from the functions that `train_rft.py` calls, and a test recomputes the page from its
tables. The prompt is the first one for which both levels differ between the replies and all replies are
compliant. The first step of the default run has ten prompts and, for the warm-up, a third of the learning
rate used here.

## 1. The prompt q

Agent {target.seat + 1} of {N} reads:

{chat}

The experts of all agents would propose these rows (P_expert): {experts}. A link forms if both ends propose
it, so G_expert has the links {g_expert}. The agent's own expert row is {expert_N.tolist()}.

## 2. m = {cfg.m} replies from pi_theta

At the beginning of the step pi_theta = pi_old. Here it is also pi_ref, because it is the first step. Each
reply o_i is drawn token by token at temperature {cfg.temperature:g}; |o_i| counts its tokens with the
end-of-turn token.

{table(["i", "Belief", "Decision", "tokens"], replies)}

## 3. Rewards

Sample level: r^S = compliance + F1 + accuracy of the row against the expert's row, over the {N - 1} other
agents. Graph level: the reply's row takes the place of the agent's own row in P_expert, and G_i forms. s_i
= 1 - Hamming(G_i, G_expert) / (N (N-1)). R^G_i = s_i + local + global, where local = 0.5 if s_i is the
largest of the group, and global = 0.5 if s_i reaches the best so far of this game instance. The memory is
empty here, so every compliant reply gets this bonus.

{table(["i", "compliance", "F1", "accuracy", "r^S", "links of G_i", "s", "local", "global", "R^G"], rewards)}

## 4. Advantages

Each level is normalised within the group: A^S_i = (r^S_i - {number(mean_S)}) / ({number(std_S)} + 0.0001),
where {number(mean_S)} is the mean and {number(std_S)} the standard deviation (with 1 / m, and not with
1 / (m - 1)) of the {cfg.m} values of r^S; for R^G they are {number(mean_G)} and {number(std_G)}. Then A_i =
{cfg.w_sample:g} A^S_i + {cfg.w_graph:g} A^G_i.

The last column is a token's weight in the objective J, which is a mean over replies of means over their
tokens: 1 / (m |o_i|), and with K live groups in a step 1 / (K m |o_i|).

{table(["i", "r^S", "A^S", "R^G", "A^G", "A", "weight"], levels_of)}

## 5. The gradient

Now rho = pi_theta / pi_old = 1 and k3 = 0 for every token, so J is the mean of the A_i, which is 0: the
loss is {abs(first_loss):.4f}. Its gradient is not 0. It is - sum_i A_i / (m |o_i|) sum_t grad log pi(o_it),
with norm {norm:.4f} over all LoRA matrices (above 1 it would be scaled down to 1); it raises the probability
of replies with A_i > 0 and lowers that of the others.

## 6. What the step changed

After one step of AdamW at the peak learning rate {cfg.lr:g}, the same replies are scored again. log pi is
the sum over a reply's tokens; the other columns are means over its tokens. "clipped" is the mean of min(rho
A, clip(rho, {cfg.clip[0]:g}, {cfg.clip[1]:g}) A), each token clipped by itself, and J_i = clipped -
{cfg.beta:g} k3. With `--inner-epochs 2` the second optimizer step would start here.

{table(["i", "A", "log pi before", "after", "rho", "clipped", "k3", "J_i"], moved)}

The loss is minus the mean of the J_i: {second_loss:.5f}.
"""


@reports_errors
def main(argv=None) -> None:
    text = "Write one step of RFT as a page of numbers."
    parser = flags.training_parser(text, "docs/one-step.md", flags.RFT)
    settings = flags.parse_training(parser, "docs.one_step", argv)
    blocks = page(settings).split("\n\n")
    prose = [block if block[:1] in "|# " else textwrap.fill(block, 110) for block in blocks]
    write_atomic(settings.run.out, ("\n\n".join(prose).rstrip() + "\n").encode())
    print(settings.run.out)


if __name__ == "__main__":
    main()

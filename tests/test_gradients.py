"""Gradients of SFT and RFT, as each engine adds them up pass by pass, against the objective written out reply
by reply on the plain engine."""

import argparse

import pytest
import torch
from reference import ENGINES, add_adapter, assert_close, engine, gradients, score
from whole_runs import lines_of, sft_flags

import lora
import train_rft
import train_sft
from policy import Rollout
from prompts import PromptStyle
from run import checkpoint, dataset, training
from world.draws import Family

# --- SFT


@pytest.mark.parametrize("train_on", ["both", "effort", "graph"])
def test_sft_gradient_is_that_of_the_mean_over_reply_tokens(monkeypatch, model_dir, tmp_path, train_on):
    """Of the first step, before clipping, whose batch is all six conversations; and the loss in the log."""
    found, losses = [], []

    def spy(optimizer, max_norm):
        found.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    monkeypatch.setattr(training, "new_adapter", lambda policy, args, purpose: add_adapter(policy))
    monkeypatch.setattr(training, "clip_gradient", spy)
    monkeypatch.setattr(train_sft, "HELD_OUT_GAMES", 1)
    settings = dict(games=2, sft_batch=6, noise=0.5, max_steps=1, rounds=2, train_on=train_on)
    for name, size in (("plain", 2), ("fast", 1), ("fast", 4), ("fast", 6)):
        out = tmp_path / f"{name}{size}"
        train_sft.main(sft_flags(model_dir, out, engine=name, micro_batch=size, **settings))
        losses.append(lines_of(out / "metrics.jsonl")[1]["loss"])

    games = dict(families=(Family("bcz", "GE", 2),), noise=0.5)
    records = dataset.simulate_many(2, "second-best", 3, PromptStyle(), (3, 3), **games)
    scored = [r for r in records if r.kind in {"both": "GE", "effort": "E", "graph": "G"}[train_on]]
    assert sum(r.label != r.reply for r in scored) >= 2  # what was played at random is not learned
    plain = engine("plain", model_dir)
    replies = [[plain.encode_reply(r.label)] for r in scored]
    assert train_on != "both" or len({len(reply) for (reply,) in replies}) > 1  # ragged
    loss = -torch.cat(score(plain, [plain.encode_prompt(r.prompt) for r in scored], replies)).mean()
    expected = gradients(plain, loss)
    assert len(found) == 4 and losses == pytest.approx([loss.item()] * 4, rel=1e-4)
    for gradient in found:
        assert_close(gradient, expected)


# --- RFT


GROUPS = [
    ([5, 60, 70], [[80, 81, 2], [90], [100, 101, 102, 103, 104]], (1.2, -0.4, -0.8)),
    ([9, 9, 200, 1, 30, 31, 77], [[120, 2], [121, 122, 123], [124]], (0.5, 0.7, -1.2)),
    ([40], [[50, 51, 52, 53, 54, 55], [2], [56, 57, 58, 2]], (-0.3, 1.1, -0.8)),
    ([41, 42], [[50, 2], [51, 2], [52, 2]], (0.0, 0.0, 0.0)),
    ([43, 44, 45, 46], [[60], [61, 62, 63, 64, 65, 66, 67, 2], [68, 2]], (2.0, -1.0, -1.0)),
]
LIMIT = 9


def rollouts(policy, temperature, spread):
    """Old log-probabilities that are off by up to `spread`, so that some ratios are clipped."""
    found = []
    for k, (prompt, replies, advantages) in enumerate(GROUPS):
        (logps,) = score(policy, [prompt], [replies], temperature)
        off = spread * (2 * torch.rand(len(logps), generator=checkpoint.seeded(5, k)) - 1)
        old = (logps.detach() + off).split([len(reply) for reply in replies])
        group = [Rollout(prompt, reply, o.tolist(), "", True) for reply, o in zip(replies, old)]
        for o, advantage in zip(group, advantages):
            o.advantage = advantage
        found.append(group)
    return found


def minus_J(policy, groups, args):
    """The loss, token by token; and how many tokens are clipped above, below, and are at all."""
    low, high = 1 - args.clip_eps[0], 1 + args.clip_eps[-1]
    each = [o for group in groups for o in group]
    tokens, total, above, below = sum(len(o.reply_ids) for o in each), 0.0, 0, 0
    for o in each:
        (logps,) = score(policy, [o.prompt_ids], [[o.reply_ids]], args.temperature)
        (reference,) = score(policy, [o.prompt_ids], [[o.reply_ids]], args.temperature, reference=True)
        weight = dict(sequence=1 / len(each) / len(logps), token=1 / tokens, constant=1 / len(each) / LIMIT)
        for logp, ref, old in zip(logps, reference, o.sampled_logps):
            rho, A, d = (logp - old).exp(), o.advantage, ref - logp
            over, under = A > 0 and rho > high, A < 0 and rho < low
            above, below = above + over, below + under
            term = high * A if over else low * A if under else rho * A
            total = total + weight[args.objective[0].removeprefix("aggregation=")] * (
                term - args.beta * (d.exp() - d - 1)
            )
    return -total, above, below, tokens


@pytest.mark.parametrize(
    ("aggregation", "temperature", "beta", "clip_eps"),
    [
        ("sequence", 1.0, 0.1, [0.2]),
        ("token", 0.7, 0.1, [0.2]),
        ("constant", 1.0, 0.0, [0.2]),
        ("sequence", 1.0, 0.1, [0.1, 0.4]),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_rft_gradient_is_that_of_J(model_dir, name, aggregation, temperature, beta, clip_eps):
    """For every cut of a step into passes, and for groups that are shared among processes."""
    flags = dict(
        objective=[f"aggregation={aggregation}"], temperature=temperature, beta=beta, clip_eps=clip_eps
    )
    args, policy, plain = argparse.Namespace(**flags), engine(name, model_dir), engine("plain", model_dir)
    groups = rollouts(plain, temperature, 0.5)
    before = [(list(o.prompt_ids), list(o.reply_ids), list(o.sampled_logps)) for g in groups for o in g]
    expected_loss, above, below, tokens = minus_J(plain, groups, args)
    expected = gradients(plain, expected_loss)
    assert above > 1 < below and 5 < above + below < tokens - 5
    every = range(len(groups))
    for size, parts in ((1, [every]), (2, [every]), (5, [every]), (2, [[3, 0], [1, 4, 2]])):
        args.micro_batch, loss, clipped = size, 0.0, 0
        for mine in parts:  # several processes have a share of the groups each
            part, sums = train_rft.gradient(args, policy, groups, mine, LIMIT)
            loss, clipped = loss + part, clipped + sums["clipped"]
        assert loss == pytest.approx(expected_loss.item(), abs=1e-5) and clipped == above + below
        assert (sums["kl"] or 0) > 0 if beta else sums["kl"] is None
        assert_close([p.grad for p in lora.lora_parameters(policy.model)], expected)
        policy.model.zero_grad(set_to_none=True)
    assert before == [(o.prompt_ids, o.reply_ids, o.sampled_logps) for g in groups for o in g]


def test_the_first_gradient_of_rft_is_that_of_reinforce(model_dir):
    policy, plain = engine("fast", model_dir), engine("plain", model_dir)
    groups = rollouts(plain, 1.0, 0.0)
    flags = dict(objective=None, temperature=1.0, beta=0.0, clip_eps=[0.2], micro_batch=2)
    loss, sums = train_rft.gradient(argparse.Namespace(**flags), policy, groups, range(len(groups)), LIMIT)
    assert abs(loss) < 1e-5 and sums["max_ratio_error"] < 1e-4 and sums["clipped"] == 0
    means = [o.advantage * score(plain, [o.prompt_ids], [[o.reply_ids]])[0].mean() for g in groups for o in g]
    expected = gradients(plain, -sum(means) / len(means))
    assert_close([p.grad for p in lora.lora_parameters(policy.model)], expected)

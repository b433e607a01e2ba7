"""Gradients of SFT and RFT against plain passes, for every micro-batch."""

import argparse
from pathlib import Path

import pytest
import torch

from run import checkpoint
import experts
import lora
import train_rft
import train_sft
from world.draws import Family
from policy import Rollout, load_policy
from prompts import PromptStyle
from reference import plain_logps, plain_model, take_gradients
from whole_runs import lines_of, sft_flags


def policy_with_adapter(model_dir, seed=1, size=0.05):
    policy = load_policy(model_dir)
    lora.inject(policy.model, lora.LoRAConfig(4, 8.0, lora.DEFAULT_TARGETS, policy.name), checkpoint.seeded(seed))
    with torch.no_grad():
        for k, layer in enumerate(lora.lora_layers(policy.model).values()):
            layer.B.copy_(size * torch.randn(layer.B.shape, generator=checkpoint.seeded(seed, k)))
    return policy


def assert_close_gradients(actual, expected, tolerance=1e-4):
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-5
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * largest


# --- SFT


def sft_gradient(monkeypatch, model_dir, out, **changes):
    """The gradient of SFT's first step, before clipping, and the loss that was logged for it."""
    found = []

    def spy(optimizer, lr, max_grad_norm):
        found.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    monkeypatch.setattr(train_sft, "optimizer_step", spy)
    changes = dict(games=2, sft_batch=6, noise=0.5, max_steps=1) | changes  # a batch is all six conversations
    train_sft.main(sft_flags(model_dir, out, **changes))
    return found[0], lines_of(Path(out) / "metrics.jsonl")[1]["loss"]


@pytest.mark.parametrize("train_on", ["both", "effort", "graph"])
def test_sft_gradient_for_every_micro_batch_and_by_plain_passes(monkeypatch, model_dir, tmp_path, train_on):
    real = train_sft.new_adapter

    def with_values(policy, args, purpose):  # B = 0 would leave no gradient in A
        config = real(policy, args, purpose)
        with torch.no_grad():
            for k, layer in enumerate(lora.lora_layers(policy.model).values()):
                layer.B.copy_(0.05 * torch.randn(layer.B.shape, generator=checkpoint.seeded(7, k)))
        kept.append(policy)
        return config

    kept = []
    monkeypatch.setattr(train_sft, "new_adapter", with_values)
    runs = [
        sft_gradient(monkeypatch, model_dir, tmp_path / str(size), micro_batch=size, train_on=train_on, rounds=2)
        for size in (1, 2, 6)
    ]
    policy = kept[0]
    style = PromptStyle("full", *(experts_default(name) for name in ("belief", "hints")))
    records = experts.simulate_many(2, "second-best", 3, style, (3, 3), families=(Family("bcz", "GE", 2),), noise=0.5)
    kinds = {"both": "GE", "effort": "E", "graph": "G"}[train_on]
    scored = [r for r in records if r.kind in kinds]
    assert sum(r.label != r.reply for r in scored) >= 2  # branches
    lengths = {len(policy.encode_reply(r.label)) for r in scored}
    assert len(lengths) > 1 or train_on != "both"  # ragged
    model = plain_model(model_dir, policy)
    pairs = [(policy.encode_prompt(r.prompt), policy.encode_reply(r.label)) for r in scored]
    loss = -torch.cat([plain_logps(model, *pair) for pair in pairs]).mean()
    policy.model.zero_grad(set_to_none=True)
    loss.backward()
    expected = take_gradients(policy)
    for gradient, logged in runs:
        assert_close_gradients(gradient, expected)
        assert logged == pytest.approx(loss.item(), rel=1e-4)


def experts_default(name):
    parser = argparse.ArgumentParser()
    experts.add_style_arguments(parser)
    return getattr(parser.parse_args([]), name)


# --- RFT


REPLIES = [
    ([5, 60, 70], [[80, 81, 2], [90], [100, 101, 102, 103, 104]], (1.2, -0.4, -0.8)),
    ([9, 9, 200, 1, 30, 31, 77], [[120, 2], [121, 122, 123], [124]], (0.5, 0.7, -1.2)),
    ([40], [[50, 51, 52, 53, 54, 55], [2], [56, 57, 58, 2]], (-0.3, 1.1, -0.8)),
    ([41, 42], [[50, 2], [51, 2], [52, 2]], (0.0, 0.0, 0.0)),
    ([43, 44, 45, 46], [[60], [61, 62, 63, 64, 65, 66, 67, 2], [68, 2]], (2.0, -1.0, -1.0)),
]


def hand_made_groups(model_dir, policy, temperature, spread):
    """Ragged groups whose old log-probabilities are off by up to `spread`, so that some tokens are clipped."""
    generator, groups = checkpoint.seeded(5), []
    with torch.no_grad():
        model = plain_model(model_dir, policy)
        for prompt, replies, advantages in REPLIES:
            group = []
            for reply, advantage in zip(replies, advantages):
                old = plain_logps(model, prompt, reply, temperature)
                old = old + spread * (2 * torch.rand(len(reply), generator=generator) - 1)
                group.append(Rollout(prompt, reply, old.tolist(), "", reply[-1] == 2, {}, advantage))
            groups.append(group)
    return groups


def objective_by_plain_passes(model_dir, policy, groups, args):
    """J written out rollout by rollout: per token, min(rho A, clip(rho) A) - beta k3. Returns -J, the tokens that were
    clipped at the lower and at the upper end, and all."""
    model, reference = plain_model(model_dir, policy), plain_model(model_dir)
    rollouts = [o for group in groups for o in group]
    tokens, total, below, above = sum(len(o.reply_ids) for o in rollouts), 0.0, 0, 0
    low, high = 1 - args.clip_eps, 1 + (args.clip_eps_high or args.clip_eps)
    for o in rollouts:
        logp = plain_logps(model, o.prompt_ids, o.reply_ids, args.temperature)
        with torch.no_grad():
            ref = plain_logps(reference, o.prompt_ids, o.reply_ids, args.temperature)
        for t in range(len(o.reply_ids)):
            rho = (logp[t] - o.sampled_logps[t]).exp()
            A = o.advantage
            over, under = A > 0 and rho > high, A < 0 and rho < low
            above, below = above + over, below + under
            term = high * A if over else low * A if under else rho * A
            term = term - args.beta * ((ref[t] - logp[t]).exp() - (ref[t] - logp[t]) - 1)
            weight = {
                "sequence": 1 / (len(rollouts) * len(o.reply_ids)),
                "token": 1 / tokens,
                "constant": 1 / (len(rollouts) * args.max_new_tokens),
            }[args.aggregation]
            total = total + weight * term
    return -total, below, above, tokens


@pytest.mark.parametrize(
    ("aggregation", "temperature", "beta", "clip_eps", "high"),
    [("sequence", 1.0, 0.1, 0.2, None), ("token", 0.7, 0.1, 0.2, None), ("constant", 1.0, 0.0, 0.2, None)]
    + [("sequence", 1.0, 0.1, 0.1, 0.4)],
)
def test_update_adds_the_same_gradient_for_every_micro_batch(model_dir, aggregation, temperature, beta, clip_eps, high):
    policy = policy_with_adapter(model_dir)
    groups = hand_made_groups(model_dir, policy, temperature, 0.5)
    args = argparse.Namespace(
        max_new_tokens=9, aggregation=aggregation, temperature=temperature, beta=beta, clip_eps=clip_eps, clip_eps_high=high,
        micro_batch=1,
    )  # fmt: skip
    before = [(list(o.prompt_ids), list(o.reply_ids), list(o.sampled_logps)) for g in groups for o in g]
    expected_loss, below, above, tokens = objective_by_plain_passes(model_dir, policy, groups, args)
    expected_loss.backward()
    expected = take_gradients(policy)
    assert below > 1 < above and 5 < below + above < tokens - 5
    for size in (1, 2, 5):
        args.micro_batch = size
        loss, sums = train_rft.update(args, policy, groups, range(len(groups)), args.beta)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
        assert_close_gradients(take_gradients(policy), expected)
        assert (sums.clipped, sums.tokens) == (below + above, tokens)
        assert (sums.kl > 0) == (beta > 0)
    assert before == [(o.prompt_ids, o.reply_ids, o.sampled_logps) for g in groups for o in g]


def test_first_update_has_loss_zero_and_the_gradient_of_reinforce(model_dir):
    policy = policy_with_adapter(model_dir)
    groups = hand_made_groups(model_dir, policy, 1.0, 0.0)
    args = argparse.Namespace(
        max_new_tokens=9, aggregation="sequence", temperature=1.0, beta=0.0, clip_eps=0.2, clip_eps_high=None, micro_batch=2
    )
    loss, sums = train_rft.update(args, policy, groups, range(len(groups)), args.beta)
    actual = take_gradients(policy)
    assert abs(loss) < 1e-5 and sums.max_ratio_error < 1e-4 and sums.clipped == 0
    model = plain_model(model_dir, policy)
    reinforce = sum(
        o.advantage * plain_logps(model, o.prompt_ids, o.reply_ids).mean() for group in groups for o in group
    )
    (-reinforce / 15).backward()
    assert_close_gradients(actual, take_gradients(policy))

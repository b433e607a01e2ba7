"""Advantages and the clipped objective by hand; the first step of train_rft.rft, on a policy of 4 tokens."""

import math
from dataclasses import replace

import pytest
import torch
from tables import normalised
from whole_runs import lines_of, parsed

import train_rft
from play.cast import make_expert
from play.dataset import Prompt, simulate_many, targets
from play.rft_log import add_sums, diagnostics, update_metrics
from prompts import PromptStyle, Reply
from run.files import StopSignal
from run.stage import Stage
from tompo import group_normalise
from variants import objective


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values):
    return tensor(*values).requires_grad_()


def close(actual, expected, tolerance=1e-12):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance, (actual, expected)


def test_group_normalise_by_hand():
    """Mean 2, population variance (1 + 1 + 4 + 4) / 4; a std as small as eps is halved, not blown up."""
    close(group_normalise(tensor(1, 3, 4, 0)), tensor(-1, 1, 2, -2) / (math.sqrt(2.5) + 1e-4))
    close(group_normalise(tensor(0, 2e-4)), tensor(-0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.5, 0.1 + 0.2, 1 / 3, 2.5, 1e-8, 1e8])
@pytest.mark.parametrize("name", objective.ADVANTAGES)
def test_a_group_of_one_or_of_equal_rewards_gets_exactly_zero(name, value, dtype):
    groups = [torch.full((m,), value, dtype=dtype) for m in (1, 2, 3, 7, 10)]
    for rewards, advantages in zip(groups, objective.ADVANTAGES[name](groups), strict=True):
        assert advantages.shape == rewards.shape and (advantages == 0).all()  # NaN == 0 is false


class Softmax:
    """A policy over four tokens that is a softmax of theta, (4,), whatever the prompt is. Its replies are the
    given tokens, one each. It has no reference, which without beta is not needed."""

    device, batches = torch.device("cpu"), train_rft.Policy.batches

    def __init__(self, *replies):
        self.replies, self.theta = replies, leaf(0.3, -0.2, 0.5, 0.1)

    def encode_reply(self, text):
        return [0]

    def sample(self, prompts, uniforms_PMS, temperature, guesses):
        logps = self.theta.log_softmax(-1).tolist()
        return [[Reply("", [token], [logps[token]], True) for token in self.replies] for _ in prompts]

    def token_logps(self, prompts, replies, temperature):
        return [self.theta.log_softmax(-1)[token] for group in replies for token in group]


@pytest.fixture
def first_step(tmp_path):
    """The first step of RFT with these flags -> the lines of samples.jsonl. rewards: of each prompt r^S, or
    r^S and R^G, of every reply."""
    records = simulate_many(1, make_expert("second-best"), 0, PromptStyle(), (3, 3))
    prompts = [Prompt(r, [1], target) for r, target in targets(records, records)]

    def run(policy, rewards, *flags):
        def reward(targets, groups, memory):
            for group, levels in zip(groups, rewards, strict=True):
                for o, *values in zip(group, *levels, strict=True):
                    o.rewards |= zip(("r_S", "R_G"), values, strict=False)

        m = len(policy.replies)
        cfg = parsed(["--steps", "1", "--m", str(m), "--beta", "0", *flags])[1].rft
        cfg = replace(cfg, reward=reward, next_batch=lambda *_: prompts[: len(rewards)])
        optimizer = torch.optim.SGD([policy.theta], lr=0.0)
        with StopSignal() as stop, Stage(tmp_path, "RFT", 1, {}, optimizer, stop, {"out": ""}) as stage:
            train_rft.rft(policy, cfg, [], 8, optimizer, stage)
        samples = lines_of(tmp_path / "samples.jsonl")
        assert len(samples) == m * len(rewards)
        return samples

    return run


R_S, R_G, SAME = [2.5, 0.5, 0.5, 0.5], [1.0, 2.0, 3.0, 2.0], [0.3] * 4
A_S, A_G = normalised(R_S), normalised(R_G)
LEVELS = [  # flags, r^S and R^G, A^S, A^G, A
    ("", (R_S, R_G), A_S, A_G, 0.8 * A_S + 0.2 * A_G),  # the paper's weights are the defaults
    ("--weights A_S=0.25 A_G=3", (R_S, R_G), A_S, A_G, 0.25 * A_S + 3 * A_G),
    ("--algo grpo", (R_S, R_G), A_S, A_G, A_S),  # which differs by the graph level alone
    # Each level only where it says something: a constant one leaves the weighted other.
    ("", (R_S, SAME), A_S, 0 * A_G, 0.8 * A_S),
    ("", (SAME, R_G), 0 * A_S, A_G, 0.2 * A_G),
    ("", (R_S,), A_S, 0 * A_G, A_S),  # efforts have the sample level alone
    ("--algo grpo", (R_S,), A_S, 0 * A_G, A_S),
    ("--objective advantage=mean", (R_S, R_G), [1.5, -0.5, -0.5, -0.5], [-1, 0, 1, 0], [1, -0.4, -0.2, -0.4]),
]


@pytest.mark.parametrize("flags, rewards, A_S, A_G, A", LEVELS)
def test_two_levels_by_hand(first_step, flags, rewards, A_S, A_G, A):
    other_group = ([0.0, 1.0, 0.0, 0.0],)  # each is normalised within itself
    samples = first_step(Softmax(0, 1, 2, 3), [rewards, other_group], *flags.split())
    for name, expected in (("A_S", A_S), ("A_G", A_G), ("advantage", A)):
        close([s[name] for s in samples[:4]], expected, 1e-6)


def test_aggregations_are_the_means_they_stand_for():
    lengths, values = [3, 1, 4], [tensor(1, 2, 6), tensor(5), tensor(0, 2, 2, 8)]  # sums 9, 5, 12
    means = {"sequence": (3 + 5 + 3) / 3, "token": 26 / 8, "constant": 26 / (3 * 13)}
    assert set(objective.AGGREGATIONS) == set(means)
    for name, aggregation in objective.AGGREGATIONS.items():
        weights = aggregation(lengths, 13)
        close(sum(w * v.sum() for w, v in zip(weights, values, strict=True)), means[name])


def test_diagnostics_by_hand():
    ratios = tensor(1.5, 0.5, 1.5, 0.5, 1.0, 1.3)
    advantages = tensor(1, 1, -1, -1, 1, 0)  # clipped: the first and the fourth; A = 0 clips nothing
    ref = tensor(3.0, 0.5, 1.5, 0.5, 1.0, 1.3).log()  # differs in the first by d = ln 2
    inputs = ratios.log().requires_grad_(), torch.zeros(6).double(), ref, ratios, advantages
    sums = diagnostics(*inputs, 0.8, 1.2)
    kl, approx_kl = 1 - math.log(2), sum(r - 1 - math.log(r) for r in ratios.tolist())
    expected = dict(tokens=6, kl=kl, approx_kl=approx_kl, clipped=2, max_ratio_error=0.5)
    assert sums == pytest.approx(expected, abs=1e-12)
    expected = dict(kl=kl / 6, approx_kl=approx_kl / 6, clip_fraction=2 / 6, max_ratio_error=0.5)
    assert update_metrics(sums) == pytest.approx(expected, abs=1e-12)
    pieces = zip(*(x.split([1, 3, 2]) for x in inputs), strict=True)
    assert add_sums([diagnostics(*piece, 0.8, 1.2) for piece in pieces]) == pytest.approx(sums, abs=1e-12)


def test_sums_of_several_passes_and_processes():
    """Some may have nothing to do; the ratio's error is seen on both sides, and the largest counts."""
    one = tensor(1)
    passes = [diagnostics(tensor(math.log(r)), 0 * one, None, tensor(r), one, 0, 9) for r in (1.1, 0.3, 1.2)]
    total = add_sums([{}, *passes, {}])
    assert total["max_ratio_error"] == pytest.approx(0.7, abs=1e-12)
    assert (total["tokens"], total["clipped"], total["kl"]) == (3, 0, None)
    assert update_metrics(total)["kl"] is None
    assert add_sums([]) == add_sums([{}, {}]) == {}
    assert passes[0] == add_sums(passes[:1]) and passes[0] is not add_sums(passes[:1])

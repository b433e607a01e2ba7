"""Gradients of SFT and RFT, as each engine adds them up pass by pass, against the objective written out reply
by reply on the plain engine."""

import math
from dataclasses import replace

import pytest
import torch
from reference import ENGINES, add_adapter, assert_close, engine, gradients, score, uniforms
from whole_runs import lines_of, parsed, sft_flags

import train_rft
import train_sft
from play import dataset
from play.cast import make_expert
from prompts import PromptStyle, Reply
from rewards import Sample
from run import ranks
from run.files import StopSignal
from run.stage import Stage
from variants import objective
from world.draws import Family


@pytest.mark.parametrize("train_on", ["both", "effort", "graph"])
def test_sft_gradient_is_that_of_the_mean_over_reply_tokens(monkeypatch, model_dir, tmp_path, train_on):
    """Of the first step, before clipping, whose batch is all six conversations; and the loss in the log."""
    all_gradients, losses = [], []

    def spy(optimizer, max_norm):
        all_gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return 0.0

    monkeypatch.setattr(train_sft, "new_adapter", lambda policy, *_: add_adapter(policy))
    monkeypatch.setattr(train_sft, "clip_gradient", spy)
    monkeypatch.setattr(train_sft, "HELD_OUT_GAMES", 1)
    monkeypatch.setattr(train_sft, "make_probe", lambda *_: None)
    changes = dict(games=2, sft_batch=6, noise=0.5, sft_steps=1, rounds=2, train_on=train_on)
    for name, size in (("plain", 2), ("fast", 1), ("fast", 4), ("fast", 6)):
        out = tmp_path / f"{name}{size}"
        train_sft.main(sft_flags(model_dir, out, engine=name, micro_batch=size, **changes))
        losses.append(lines_of(out / "metrics.jsonl")[1]["loss"])

    how = dict(families=(Family("bcz", "GE", 2),), noise=0.5)
    records = dataset.simulate_many(2, make_expert("second-best"), 3, PromptStyle(), (3, 3), **how)
    trained = [r for r in records if r.kind in {"both": "GE", "effort": "E", "graph": "G"}[train_on]]
    assert sum(r.label != r.reply for r in trained) >= 2  # what was played at random is not learned
    plain = engine("plain", model_dir)
    replies = [[plain.encode_reply(r.label)] for r in trained]
    assert train_on != "both" or len({len(reply) for (reply,) in replies}) > 1  # ragged
    loss = -torch.cat(score(plain, [plain.encode_prompt(r.prompt) for r in trained], replies)).mean()
    expected = gradients(plain, loss)
    assert len(all_gradients) == 4 and losses == pytest.approx([loss.item()] * 4, rel=1e-4)
    for gradient in all_gradients:
        assert_close(gradient, expected)


# A prompt, its replies, and their advantages.
GROUPS = [
    ([5, 60, 70], [[80, 81, 2], [90], [100, 101, 102, 103, 104]], (1.2, -0.4, -0.8)),
    ([9, 9, 200, 1, 30, 31, 77], [[120, 2], [121, 122, 123], [124]], (0.5, 0.7, -1.2)),
    ([40], [[50, 51, 52, 53, 54, 55], [2], [56, 57, 58, 2]], (-0.3, 1.1, -0.8)),
    ([41, 42], [[50, 2], [51, 2], [52, 2]], (0.0, 0.0, 0.0)),
    ([43, 44, 45, 46], [[60], [61, 62, 63, 64, 65, 66, 67, 2], [68, 2]], (2.0, -1.0, -1.0)),
]
LIVE = [0, 1, 2, 4]  # the fourth group is idle: nothing of it may be in the gradient, not even its KL
LIMIT = 9


def sampled(policy, temperature, spread):
    """The replies. Their log-probabilities are off by up to `spread`, so that some ratios are clipped."""
    groups = []
    for k, (prompt, replies, _) in enumerate(GROUPS):
        (logps,) = score(policy, [prompt], [replies], temperature)
        old = logps.detach() + spread * (2 * uniforms(k, len(logps)) - 1)
        parts = old.split([len(reply) for reply in replies])
        groups.append([Reply("", ids, part.tolist(), True) for ids, part in zip(replies, parts, strict=True)])
    return groups


def minus_J(policy, groups, cfg):
    """The loss, token by token; the sum of k3; how many tokens are clipped above and below; of how many."""
    low, high = cfg.clip
    each = [(GROUPS[k][0], *pair) for k in LIVE for pair in zip(groups[k], GROUPS[k][2], strict=True)]
    tokens, total, k3, above, below = sum(len(reply.ids) for _, reply, _ in each), 0.0, 0.0, 0, 0
    (name,) = (name for name, f in objective.AGGREGATIONS.items() if f is cfg.aggregation)
    for prompt, reply, A in each:
        (logps,) = score(policy, [prompt], [[reply.ids]], cfg.temperature)
        (reference,) = score(policy, [prompt], [[reply.ids]], cfg.temperature, reference=True)
        weights = dict(sequence=1 / len(each) / len(logps), token=1 / tokens)
        weights["constant"] = 1 / len(each) / LIMIT
        for logp, ref, old in zip(logps, reference, reply.logps, strict=True):
            rho, d = (logp - old).exp(), ref - logp
            over, under = A > 0 and rho > high, A < 0 and rho < low
            above, below, k3 = above + over, below + under, k3 + d.exp() - d - 1
            term = high * A if over else low * A if under else rho * A
            term = term - cfg.beta * (d.exp() - d - 1)
            total = total + weights[name] * term
    return -total, k3.item(), above, below, tokens


@pytest.fixture(scope="module")
def prompts(model_dir):
    """A decision for each group, of different conversations."""
    policy, style = engine("plain", model_dir), PromptStyle()
    records = dataset.simulate_many(2, make_expert("second-best"), 0, style, (3, 3))
    pool = dataset.make_prompts(policy, records, records, {"G": 1}, style)
    return [replace(p, ids=ids) for (p, _), (ids, _, _) in zip(pool, GROUPS, strict=False)]


ADVANTAGES = [torch.tensor(advantages) for _, _, advantages in GROUPS]


@pytest.fixture
def one_step(monkeypatch, prompts, tmp_path):
    """One step of RFT -> its gradients, before clipping, and its line of metrics.jsonl. own: which of the
    live groups this process has, of several."""
    gradients = []

    def no_rewards(targets, groups, memory):
        for o in (o for group in groups for o in group):
            o.rewards["r_S"] = 0.0

    def spy(optimizer, max_norm, clip=train_rft.clip_gradient):
        norm = clip(optimizer, math.inf)
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return norm

    def run(policy, cfg, groups, size, own=None, advantages=ADVANTAGES):
        monkeypatch.setattr(train_rft, "sample", lambda *_: [[Sample(o, None) for o in g] for g in groups])
        monkeypatch.setattr(train_rft, "clip_gradient", spy)
        monkeypatch.setattr(ranks, "share", lambda keys: list(range(len(keys))) if own is None else own)
        given = dict(next_batch=lambda *_: prompts, reward=no_rewards)
        given |= dict(advantage=lambda r_S: advantages if r_S else [], lr=0.0, steps=1)
        given |= dict(micro_batch=size)
        folder, optimizer = tmp_path / str(len(gradients)), train_sft.make_optimizer(policy.model)
        with StopSignal() as stop, Stage(folder, "RFT", 1, {}, optimizer, stop, {"out": ""}) as stage:
            train_rft.rft(policy, replace(cfg, **given), [], LIMIT, optimizer, stage)
        return gradients[-1], lines_of(folder / "metrics.jsonl")[0]

    return run


FLAGS = ["--objective aggregation=sequence --beta 0.1", "--clip-eps 0.1 0.4 --beta 0.1"]
FLAGS += ["--objective aggregation=token --temperature 0.7 --beta 0.1"]
FLAGS += ["--objective aggregation=constant --beta 0"]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ENGINES)
def test_rft_gradient_is_that_of_J(model_dir, one_step, name, flags):
    """For every division of a step into passes, and for groups that are shared among processes."""
    policy, plain, cfg = engine(name, model_dir), engine("plain", model_dir), parsed(flags.split())[1].rft
    groups = sampled(plain, cfg.temperature, 0.5)
    expected_loss, k3, above, below, tokens = minus_J(plain, groups, cfg)
    expected = gradients(plain, expected_loss)
    assert above > 1 < below and 5 < above + below < tokens - 5
    for size in (1, 2, 5):
        gradient, line = one_step(policy, cfg, groups, size)
        assert_close(gradient, expected)
        assert line["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
        assert line["clip_fraction"] == pytest.approx((above + below) / tokens)
        assert line["kl"] == (pytest.approx(k3 / tokens, abs=1e-5) if cfg.beta else None)
    parts = [one_step(policy, cfg, groups, 2, own) for own in ([3, 0], [1, 2], [])]
    assert_close([sum(terms) for terms in zip(*(gradient for gradient, _ in parts), strict=True)], expected)
    assert sum(line["loss"] for _, line in parts) == pytest.approx(expected_loss.item(), abs=1e-5)


@pytest.mark.parametrize("aggregation", objective.AGGREGATIONS)
def test_without_live_groups_there_is_no_gradient(model_dir, one_step, aggregation):
    policy, cfg = engine("fast", model_dir), parsed(["--objective", f"aggregation={aggregation}"])[1].rft
    groups, nothing = sampled(policy, 1.0, 0.5), [torch.zeros(3)] * len(GROUPS)
    gradient, line = one_step(policy, cfg, groups, 2, advantages=nothing)
    assert not any(g.any() for g in gradient) and line["zero_variance_groups"] == 1
    assert (line["loss"], line["grad_norm"], line["kl"], line["max_ratio_error"]) == (0, 0, None, None)

"""Advantages and the clipped objective against values by hand, and against exact sums over small laws."""

import inspect
import math

import pytest
import torch

import tompo
import variants.objective  # noqa: F401
from run.rft_log import add_sums, diagnostics
from tompo import dual_level_advantages, group_normalise, k3, objective_loss


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, expected, tolerance=1e-12):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance, (actual, expected)


def normalised(values):
    """(r - mean) / std, with the small eps in the denominator that group_normalise has."""
    eps = inspect.signature(group_normalise).parameters["eps"].default
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return tensor(*((v - mean) / (std + eps) for v in values))


# --- advantages


def test_group_normalise_by_hand():
    # mean 2, deviations -1, 1, 2, -2, population variance (1 + 1 + 4 + 4) / 4 = 2.5
    std = math.sqrt(2.5)
    close(group_normalise(tensor(1, 3, 4, 0), eps=0.0), tensor(-1, 1, 2, -2) / std)
    close(group_normalise(tensor(1, 3, 4, 0), eps=0.5), tensor(-1, 1, 2, -2) / (std + 0.5))
    eps = inspect.signature(group_normalise).parameters["eps"].default
    assert 0 < eps <= 1e-2
    close(group_normalise(tensor(0, 2)), tensor(-1, 1) / (1 + eps))
    close(group_normalise(tensor(0, 2 * eps)), tensor(-0.5, 0.5))  # std = eps: halved, not blown up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.5, 0.1 + 0.2, 1 / 3, 2.5, 1e-8, 1e8])
def test_a_group_of_one_or_of_equal_rewards_gets_exactly_zero(value, dtype):
    for advantage in tompo.ADVANTAGES.values():
        for m in (1, 2, 3, 7, 10):
            advantages = advantage(torch.full((m,), value, dtype=dtype))
            assert advantages.shape == (m,) and (advantages == 0).all()  # NaN == 0 is false


def test_some_equal_rewards_really_have_an_inexact_mean():
    """The case above is worth its test: a mean of equal floats need not be that float."""
    groups = [torch.full((m,), v) for v in (0.1 + 0.2, 1 / 3, 0.7, 2.2) for m in (3, 7, 10)]
    assert any(x.mean() != x[0] for x in groups)


def test_normalising_is_within_the_group_and_not_over_the_batch():
    low, high = tensor(0, 1), tensor(100, 101)
    for group in (low, high):
        close(dual_level_advantages(group, None)[0], normalised([0, 1]))
    batch = group_normalise(torch.cat([low, high]))
    assert (batch[:2] < 0).all() and (batch[2:] > 0).all()  # what normalising over the batch would have given


def test_two_levels_by_hand():
    r_S, R_G = [2.5, 0.5, 0.5, 0.5], [1, 2, 3, 2]
    A_S_hand, A_G_hand = normalised(r_S), normalised(R_G)
    # variances (2.25 + 0.75) / 4 = 0.75 and (1 + 0 + 1 + 0) / 4 = 0.5
    close(A_S_hand, tensor(1.5, -0.5, -0.5, -0.5) / math.sqrt(0.75), 1e-3)
    close(A_G_hand, tensor(-1, 0, 1, 0) / math.sqrt(0.5), 1e-3)
    A, A_S, A_G = dual_level_advantages(tensor(*r_S), tensor(*R_G))
    close(A_S, A_S_hand)
    close(A_G, A_G_hand)
    close(A, 0.8 * A_S_hand + 0.2 * A_G_hand)  # the paper's weights are the defaults
    A, _, _ = dual_level_advantages(tensor(*r_S), tensor(*R_G), weights=(0.25, 3.0))
    close(A, 0.25 * A_S_hand + 3 * A_G_hand)


def test_grpo_differs_by_the_graph_level_alone():
    r_S, R_G = tensor(2, 0, 1, 1), tensor(0, 1, 0, 1)
    A, A_S, A_G = dual_level_advantages(r_S, R_G, algo="grpo")
    A_t, A_S_t, A_G_t = dual_level_advantages(r_S, R_G, algo="tompo")
    close(A_S, normalised([2, 0, 1, 1]))
    close(A_G, normalised([0, 1, 0, 1]))
    assert torch.equal(A, A_S) and torch.equal(A_S, A_S_t) and torch.equal(A_G, A_G_t)
    close(A_t - 0.8 * A, 0.2 * A_G)
    # Each level only where it says something: a constant one leaves the weighted other.
    close(dual_level_advantages(r_S, torch.ones(4).double())[0], 0.8 * A_S)
    close(dual_level_advantages(torch.full((4,), 0.3).double(), R_G)[0], 0.2 * A_G)


@pytest.mark.parametrize("algo", tompo.ALGORITHMS)
def test_effort_decisions_have_the_sample_level_alone(algo):
    A, A_S, A_G = dual_level_advantages(tensor(1, 3), None, algo=algo)
    close(A, normalised([1, 3]))
    close(A_S, normalised([1, 3]))
    close(A_G, tensor(0, 0))


# --- aggregation


def test_aggregations_are_the_means_they_stand_for():
    hand = {"sequence": (1 / 6, 1 / 15, 1 / 3), "token": (1 / 8,) * 3, "constant": (1 / 30,) * 3}
    lengths, values = [3, 1, 4], [tensor(1, 2, 6), tensor(5), tensor(0, 2, 2, 8)]  # sums 9, 5, 12
    means = {"sequence": (3 + 5 + 3) / 3, "token": 26 / 8, "constant": 26 / (3 * 13)}
    assert set(tompo.AGGREGATIONS) == set(hand)
    for name, aggregation in tompo.AGGREGATIONS.items():
        close(tensor(*aggregation([2, 5, 1], 10)), tensor(*hand[name]))
        close(sum(w * v.sum() for w, v in zip(aggregation(lengths, 13), values)), means[name])


# --- the clip


QUADRANTS = [  # A, rho, min(rho A, clip(rho, 0.8, 1.2) A), its slope in log pi: rho A where not clipped
    (2.0, 1.5, 2.4, 0.0),  # A > 0 and already more likely: clipped
    (2.0, 0.5, 1.0, 1.0),  # A > 0 but less likely: pulled back in full
    (-2.0, 1.5, -3.0, -3.0),  # A < 0 but more likely: pushed down in full
    (-2.0, 0.5, -1.6, 0.0),  # A < 0 and already less likely: clipped
    (2.0, 1.1, 2.2, 2.2),  # inside the range nothing is clipped
    (-2.0, 0.9, -1.8, -1.8),
    (0.0, 1.5, 0.0, 0.0),
]


@pytest.mark.parametrize("A, ratio, objective, slope", QUADRANTS)
def test_clip_in_the_four_quadrants(A, ratio, objective, slope):
    old = tensor(-1.3)
    logp = (old + math.log(ratio)).requires_grad_()
    loss, _ = objective_loss(logp, old, None, tensor(A), tensor(0.5))
    loss.backward()
    close(loss.detach(), -0.5 * objective)
    close(logp.grad, tensor(-0.5 * slope))


RANGES = [  # rho, A, lower and upper end, loss
    *((1.5, 1, (0.2, 0.4), -1.4), (1.5, 1, (0.2, 0.6), -1.5)),
    *((1.25, 1, (0.2, 0.2), -1.2), (1.25, 1, (0.2, 0.3), -1.25), (1.4, 1, (0.2, 0.3), -1.3)),
    *((0.7, -1, (0.2, 0.3), 0.8), (0.7, -1, (0.25, 0.3), 0.75)),  # the lower end is a number of its own
]


@pytest.mark.parametrize("rho, A, clip_eps, loss", RANGES)
def test_the_two_ends_of_the_clip_range(rho, A, clip_eps, loss):
    found, _ = objective_loss(tensor(math.log(rho)), tensor(0), None, tensor(A), tensor(1), clip_eps=clip_eps)
    close(found, loss)


# --- the penalty


def test_k3_by_hand():
    # d = l_ref - l = ln 2, 0, -ln 4: 2 - ln 2 - 1, 0, 1/4 + ln 4 - 1
    logp, ref = tensor(-2, -1, -0.5), tensor(-2 + math.log(2), -1, -0.5 - math.log(4))
    close(k3(logp, ref), tensor(1 - math.log(2), 0, math.log(4) - 0.75))
    d = torch.linspace(-6, 6, 241, dtype=torch.float64)
    values = k3(torch.zeros_like(d), d)
    assert values[120] == 0 and (values[d.abs() > 1e-9] > 0).all()  # 0 only where they are equal
    assert (k3(torch.randn(100), torch.zeros(100)) >= -1e-6).all()


def test_k3_is_unbiased_against_the_exact_kl():
    """Expectation under pi summed exactly over five outcomes: E k3 = sum p ln(p / q)."""
    p, q = tensor(0.5, 0.2, 0.15, 0.1, 0.05), tensor(0.1, 0.3, 0.2, 0.25, 0.15)
    exact, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    close((p * k3(p.log(), q.log())).sum(), exact)
    assert abs(exact - reverse) > 0.02  # the direction could be told apart
    assert (p * k3(p.log(), p.log())).sum() == 0


def test_beta_adds_the_penalty_and_its_gradient():
    # l = -1, l_ref = -1 + ln 2, ratio 1: objective A - beta (1 - ln 2); d k3 / d l = 1 - exp(d) = -1
    logp, old, ref = leaf(-1), tensor(-1), tensor(-1 + math.log(2))
    loss, _ = objective_loss(logp, old, ref, tensor(3), tensor(0.25), beta=0.4)
    loss.backward()
    close(loss.detach(), -0.25 * (3 - 0.4 * (1 - math.log(2))))
    close(logp.grad, tensor(-0.25 * (3 + 0.4)))
    # Where the ratio is clipped the penalty is not, nor is it times A. Here d = -1.
    logp, old, ref = leaf(math.log(2)), tensor(0), tensor(math.log(2) - 1)
    loss, _ = objective_loss(logp, old, ref, tensor(5), tensor(1), beta=1.0)
    loss.backward()
    close(loss.detach(), -(1.2 * 5 - (math.exp(-1) + 1 - 1)))
    close(logp.grad, tensor(1 - math.exp(-1)))  # only of the penalty


def test_without_beta_no_reference_is_needed_nor_used():
    arguments = (leaf(-1, -2), tensor(-1.1, -1.9)), (tensor(1, -1), tensor(0.5, 0.5))
    (without, sums), (unused, _) = (
        objective_loss(*arguments[0], ref, *arguments[1]) for ref in (None, tensor(3, 4))
    )
    assert torch.equal(without, unused) and sums["kl"] is None


# --- the first step


def test_first_step_has_loss_zero_and_the_gradient_of_reinforce():
    """rho = 1, advantages of mean 0: the loss is 0, its gradient is -sum_i A_i w_i grad log pi, and not 0."""
    theta = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 2, 3, 1])  # four replies of one token each
    old, p = theta.detach().log_softmax(-1)[tokens], theta.detach().softmax(-1)
    weights = tensor(*tompo.AGGREGATIONS["sequence"]([1, 1, 1, 1], 8))
    advantages = group_normalise(tensor(2.5, 0.5, 1.0, -0.5))
    loss, sums = objective_loss(theta.log_softmax(-1)[tokens], old, None, advantages, weights)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    # by hand: d log p_k / d theta = onehot(k) - p
    reinforce = sum(a / 4 * (torch.eye(4).double()[k] - p) for a, k in zip(advantages, tokens))
    close(theta.grad, -reinforce)
    assert theta.grad.abs().max() > 0.1
    assert sums["max_ratio_error"] == 0 and sums["clipped"] == 0


# --- micro-batches and diagnostics


def ragged():
    """Three replies of 2, 4 and 1 tokens, some of them clipped: logp, old, ref, advantages, and the
    lengths."""
    generator = torch.Generator().manual_seed(3)
    logp = (-2 + 0.3 * torch.randn(7, generator=generator)).double()
    old, ref = (logp + 0.3 * torch.randn(7, generator=generator).double() for _ in range(2))
    return logp, old, ref, tensor(1.5, 1.5, -0.7, -0.7, -0.7, -0.7, 0.9), [2, 4, 1]


@pytest.mark.parametrize("aggregation", tompo.AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[2, 4, 1], [6, 1], [2, 5]])
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step(aggregation, cuts):
    logp, *inputs, lengths = ragged()
    weights = tompo.AGGREGATIONS[aggregation](lengths, 6)
    inputs.append(tensor(*(w for w, n in zip(weights, lengths) for _ in range(n))))
    copies = [x.clone() for x in inputs]
    whole_logp, part_logp, total, parts = (
        logp.clone().requires_grad_(),
        logp.clone().requires_grad_(),
        0.0,
        [],
    )
    loss, whole = objective_loss(whole_logp, *inputs, beta=0.3)
    loss.backward()
    for piece in zip(*(x.split(cuts) for x in (part_logp, *inputs))):
        part, sums = objective_loss(*piece, beta=0.3)
        part.backward(retain_graph=True)
        total, parts = total + part.item(), [*parts, sums]
    assert total == pytest.approx(loss.item(), abs=1e-12)
    close(part_logp.grad, whole_logp.grad)
    assert whole_logp.grad.abs().max() > 0.01 and whole["tokens"] == 7 and whole["clipped"] > 0
    assert add_sums(parts) == pytest.approx(whole, abs=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))  # the objective changes none of its inputs


def test_diagnostics_by_hand():
    ratios = (1.5, 0.5, 1.5, 0.5, 1.0, 1.3)
    advantages = tensor(1, 1, -1, -1, 1, 0)  # clipped: the first and the fourth; A = 0 clips nothing
    ref = tensor(*map(math.log, (3.0, 0.5, 1.5, 0.5, 1.0, 1.3)))  # differs in the first by d = ln 2
    logp, ones = tensor(*map(math.log, ratios)).requires_grad_(), torch.ones(6).double()
    _, sums = objective_loss(logp, 0 * ones, ref, advantages, ones, beta=0.1)
    kl, approx_kl = 1 - math.log(2), sum(r - 1 - math.log(r) for r in ratios)
    expected = dict(tokens=6, kl=kl, approx_kl=approx_kl, clipped=2, max_ratio_error=0.5)
    assert sums == pytest.approx(expected, abs=1e-12)
    expected = dict(kl=kl / 6, approx_kl=approx_kl / 6, clip_fraction=2 / 6, max_ratio_error=0.5)
    assert diagnostics(sums) == pytest.approx(expected, abs=1e-12)


def test_sums_of_several_passes_and_processes():
    """Some processes may have nothing to do; the ratio's error is seen on both sides, and the largest
    kept."""
    passes = [
        objective_loss(tensor(math.log(ratio)), tensor(0), None, tensor(1), tensor(1))[1]
        for ratio in (1.1, 0.3, 1.2)
    ]
    total = add_sums([{}, *passes, {}])
    assert total["max_ratio_error"] == pytest.approx(0.7, abs=1e-12)
    assert (total["tokens"], total["clipped"], total["kl"]) == (3, 0, None) and diagnostics(total)[
        "kl"
    ] is None
    assert add_sums([]) == add_sums([{}, {}]) == {}
    assert passes[0] == add_sums(passes[:1]) and passes[0] is not add_sums(passes[:1])

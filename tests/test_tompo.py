"""Advantages and the clipped objective against values worked out by hand, and against exact sums over small laws."""

import inspect
import math

import pytest
import torch

import tompo
from tompo import Sums, adapted_beta, dual_level_advantages, group_normalise, k3, objective_loss, token_weights

SQRT2 = math.sqrt(2)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, expected, tolerance=1e-12):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance, (actual, expected)


# --- advantages


def test_group_normalise_by_hand():
    # mean 2, deviations -1, 1, 2, -2, population variance (1 + 1 + 4 + 4) / 4 = 2.5
    std = math.sqrt(2.5)
    close(group_normalise(tensor(1, 3, 4, 0), eps=0.0), tensor(-1, 1, 2, -2) / std)
    close(group_normalise(tensor(1, 3, 4, 0), eps=0.5), tensor(-1, 1, 2, -2) / (std + 0.5))


def test_group_normalise_uses_its_default_eps_beside_the_std():
    eps = inspect.signature(group_normalise).parameters["eps"].default
    assert 0 < eps <= 1e-2
    close(group_normalise(tensor(0, 2)), tensor(-1, 1) / (1 + eps))
    tiny = group_normalise(tensor(0, 2 * eps))  # std = eps: the result is halved, not blown up
    close(tiny, tensor(-0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.5, 0.1 + 0.2, 1 / 3, 2.5, 1e-8, 1e8])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 10])
def test_a_group_of_one_or_of_equal_rewards_gets_exactly_zero(value, m, dtype):
    advantages = group_normalise(torch.full((m,), value, dtype=dtype))
    assert advantages.shape == (m,)
    assert (advantages == 0).all()  # NaN == 0 is false


def test_some_equal_rewards_really_have_an_inexact_mean():
    """The case above is worth its test: a mean of equal floats need not be that float."""
    inexact = [v for v in (0.1 + 0.2, 1 / 3, 0.7, 2.2) for m in (3, 7, 10) if (x := torch.full((m,), v)).mean() != x[0]]
    assert inexact


def test_normalising_is_within_the_group_and_not_over_the_batch():
    low, high = tensor(0, 1), tensor(100, 101)
    close(dual_level_advantages(low, None, eps=0.0)[0], tensor(-1, 1))
    close(dual_level_advantages(high, None, eps=0.0)[0], tensor(-1, 1))
    batch = group_normalise(torch.cat([low, high]), eps=0.0)
    assert (batch[:2] < 0).all() and (batch[2:] > 0).all()  # what normalising over the batch would have given


def test_two_levels_by_hand():
    r_S = tensor(2.5, 0.5, 0.5, 0.5)  # mean 1, deviations 1.5, -0.5 x 3, variance (2.25 + 0.75) / 4 = 0.75
    R_G = tensor(1, 2, 3, 2)  # mean 2, deviations -1, 0, 1, 0, variance 0.5
    A_S_hand = tensor(1.5, -0.5, -0.5, -0.5) / math.sqrt(0.75)
    A_G_hand = tensor(-SQRT2, 0, SQRT2, 0)
    A, A_S, A_G = dual_level_advantages(r_S, R_G, "tompo", 0.8, 0.2, eps=0.0)
    close(A_S, A_S_hand)
    close(A_G, A_G_hand)
    close(A, 0.8 * A_S_hand + 0.2 * A_G_hand)
    A, _, _ = dual_level_advantages(r_S, R_G, "tompo", w_sample=0.25, w_graph=3.0, eps=0.0)
    close(A, 0.25 * A_S_hand + 3 * A_G_hand)


def test_weights_of_the_paper_are_the_defaults():
    parameters = inspect.signature(dual_level_advantages).parameters
    assert (parameters["w_sample"].default, parameters["w_graph"].default) == (0.8, 0.2)  # the paper's equation


def test_grpo_differs_by_the_graph_level_alone():
    r_S, R_G = tensor(2, 0, 1, 1), tensor(0, 1, 0, 1)
    A, A_S, A_G = dual_level_advantages(r_S, R_G, "grpo", 0.8, 0.2, eps=0.0)
    A_t, A_S_t, A_G_t = dual_level_advantages(r_S, R_G, "tompo", 0.8, 0.2, eps=0.0)
    close(A_S, tensor(SQRT2, -SQRT2, 0, 0))
    close(A_G, tensor(-1, 1, -1, 1))
    assert torch.equal(A, A_S) and torch.equal(A_S, A_S_t) and torch.equal(A_G, A_G_t)
    close(A_t - 0.8 * A, 0.2 * A_G)
    # graph level only where it says something else: a constant R^G leaves w_sample A^S
    close(dual_level_advantages(r_S, torch.ones(4).double(), "tompo", 0.8, 0.2, eps=0.0)[0], 0.8 * A_S)


@pytest.mark.parametrize("algo", tompo.ALGORITHMS)
def test_effort_decisions_have_the_sample_level_alone(algo):
    A, A_S, A_G = dual_level_advantages(tensor(1, 3), None, algo, w_sample=0.8, w_graph=0.2, eps=0.0)
    close(A, tensor(-1, 1))
    close(A_S, tensor(-1, 1))
    close(A_G, tensor(0, 0))


def test_a_constant_sample_level_leaves_the_graph_level_its_say():
    A, A_S, A_G = dual_level_advantages(tensor(0.3, 0.3), tensor(0, 1), "tompo", 0.8, 0.2, eps=0.0)
    assert (A_S == 0).all()
    close(A, tensor(-0.2, 0.2))


# --- aggregation


def test_token_weights_by_hand():
    close(tensor(*token_weights([2, 5, 1], "sequence", 10)), tensor(1 / 6, 1 / 15, 1 / 3))
    close(tensor(*token_weights([2, 5, 1], "token", 10)), tensor(1 / 8, 1 / 8, 1 / 8))
    close(tensor(*token_weights([2, 5, 1], "constant", 10)), tensor(1 / 30, 1 / 30, 1 / 30))
    close(tensor(*token_weights([4], "constant", 16)), tensor(1 / 16))


def test_token_weights_are_the_means_they_stand_for():
    lengths = [3, 1, 4]
    values = [tensor(1, 2, 6), tensor(5), tensor(0, 2, 2, 8)]  # sums 9, 5, 12
    mean_of_means, mean_of_tokens = (3 + 5 + 3) / 3, 26 / 8

    def weighted(aggregation):
        weights = token_weights(lengths, aggregation, 13)
        return sum(w * v.sum() for w, v in zip(weights, values))

    close(weighted("sequence"), mean_of_means)
    close(weighted("token"), mean_of_tokens)
    close(weighted("constant"), 26 / (3 * 13))
    assert set(tompo.AGGREGATIONS) == {"sequence", "token", "constant"}


# --- the clip


@pytest.mark.parametrize(
    ("A", "ratio", "objective", "slope"),
    [
        # min(rho A, clip(rho, 0.8, 1.2) A); slope: its derivative in log pi, rho A where it is not clipped
        (2.0, 1.5, 2.4, 0.0),  # A > 0 and already more likely: clipped
        (2.0, 0.5, 1.0, 1.0),  # A > 0 but less likely: pulled back in full
        (-2.0, 1.5, -3.0, -3.0),  # A < 0 but more likely: pushed down in full
        (-2.0, 0.5, -1.6, 0.0),  # A < 0 and already less likely: clipped
        (2.0, 1.1, 2.2, 2.2),  # inside the range nothing is clipped
        (-2.0, 0.9, -1.8, -1.8),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clip_in_the_four_quadrants(A, ratio, objective, slope):
    old = tensor(-1.3)
    logp = (old + math.log(ratio)).requires_grad_()
    loss = objective_loss(logp, old, None, tensor(A), tensor(0.5), clip_eps=0.2)
    loss.backward()
    close(loss.detach(), -0.5 * objective)
    close(logp.grad, tensor(-0.5 * slope))


def test_clip_range_is_an_argument():
    logp = leaf(math.log(1.5))
    close(objective_loss(logp, tensor(0), None, tensor(1), tensor(1), clip_eps=0.4).detach(), -1.4)
    close(objective_loss(logp, tensor(0), None, tensor(1), tensor(1), clip_eps=0.6).detach(), -1.5)


# --- the penalty


def test_k3_by_hand():
    # d = l_ref - l = ln 2, 0, -ln 4: 2 - ln 2 - 1, 0, 1/4 + ln 4 - 1
    logp, ref = tensor(-2, -1, -0.5), tensor(-2 + math.log(2), -1, -0.5 - math.log(4))
    close(k3(logp, ref), tensor(1 - math.log(2), 0, math.log(4) - 0.75))
    assert k3(logp, ref)[1] == 0


def test_k3_is_never_negative_and_zero_only_where_equal():
    d = torch.linspace(-6, 6, 241, dtype=torch.float64)
    values = k3(torch.zeros_like(d), d)
    assert values[120] == 0 and (values[d.abs() > 1e-9] > 0).all()
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
    loss = objective_loss(logp, old, ref, tensor(3), tensor(0.25), beta=0.4)
    loss.backward()
    close(loss.detach(), -0.25 * (3 - 0.4 * (1 - math.log(2))))
    close(logp.grad, tensor(-0.25 * (3 + 0.4)))


def test_the_penalty_is_not_clipped_and_not_times_the_advantage():
    logp, old, ref = leaf(math.log(2)), tensor(0), tensor(math.log(2) - 1)
    loss = objective_loss(logp, old, ref, tensor(5), tensor(1), clip_eps=0.2, beta=1.0)
    loss.backward()
    penalty = math.exp(-1) + 1 - 1  # d = -1
    close(loss.detach(), -(1.2 * 5 - penalty))
    close(logp.grad, tensor(1 - math.exp(-1)))  # only of the penalty


def test_without_beta_no_reference_is_needed_nor_used():
    args = leaf(-1, -2), tensor(-1.1, -1.9)
    rest = tensor(1, -1), tensor(0.5, 0.5)
    without = objective_loss(*args, None, *rest, beta=0.0).detach()
    assert torch.equal(without, objective_loss(*args, tensor(3, 4), *rest, beta=0.0).detach())


# --- the first step


def test_first_step_has_loss_zero_and_the_gradient_of_reinforce():
    """rho = 1 and advantages of mean 0: the loss is 0, its gradient is -sum_i A_i w_i grad log pi, and not 0."""
    theta = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 2, 3, 1])  # four replies of one token each
    advantages = group_normalise(tensor(2.5, 0.5, 1.0, -0.5), eps=0.0)
    old = theta.detach().log_softmax(-1)[tokens]
    weights = tensor(*token_weights([1, 1, 1, 1], "sequence", 8))
    sums = Sums()
    loss = objective_loss(theta.log_softmax(-1)[tokens], old, None, advantages, weights, sums=sums)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    p = theta.detach().softmax(-1)
    # by hand: d log p_k / d theta = onehot(k) - p
    reinforce = sum(a / 4 * (torch.eye(4).double()[k] - p) for a, k in zip(advantages, tokens))
    close(theta.grad, -reinforce)
    assert theta.grad.abs().max() > 0.1
    assert sums.max_ratio_error == 0 and sums.clipped == 0


# --- micro-batches and diagnostics


def ragged():
    """Three replies of 2, 4 and 1 tokens, some of them clipped."""
    generator = torch.Generator().manual_seed(3)
    logp = (-2 + 0.3 * torch.randn(7, generator=generator)).double()
    old = logp + 0.3 * torch.randn(7, generator=generator).double()
    ref = logp + 0.3 * torch.randn(7, generator=generator).double()
    lengths = [2, 4, 1]
    advantages = tensor(1.5, 1.5, -0.7, -0.7, -0.7, -0.7, 0.9)
    return logp, old, ref, advantages, lengths


@pytest.mark.parametrize("aggregation", tompo.AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[2, 4, 1], [6, 1], [2, 5]])
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step(aggregation, cuts):
    logp, old, ref, advantages, lengths = ragged()
    weights = token_weights(lengths, aggregation, 6)
    weight_T = tensor(*(w for w, n in zip(weights, lengths) for _ in range(n)))
    whole_logp, whole = logp.clone().requires_grad_(), Sums()
    loss = objective_loss(whole_logp, old, ref, advantages, weight_T, 0.2, 0.3, whole)
    loss.backward()

    part_logp, parts, total = logp.clone().requires_grad_(), Sums(), 0.0
    for piece in zip(*(x.split(cuts) for x in (part_logp, old, ref, advantages, weight_T))):
        part = objective_loss(*piece, 0.2, 0.3, parts)
        part.backward(retain_graph=True)
        total += part.item()
    assert total == pytest.approx(loss.item(), abs=1e-12)
    close(part_logp.grad, whole_logp.grad)
    assert whole_logp.grad.abs().max() > 0.01
    assert parts.tokens == whole.tokens == 7
    assert parts.clipped == whole.clipped
    assert parts.max_ratio_error == whole.max_ratio_error
    assert parts.kl == pytest.approx(whole.kl, abs=1e-12)
    assert parts.approx_kl == pytest.approx(whole.approx_kl, abs=1e-12)


def test_diagnostics_by_hand():
    ratios = (1.5, 0.5, 1.5, 0.5, 1.0, 1.3)
    advantages = tensor(1, 1, -1, -1, 1, 0)  # clipped: the first and the fourth; with A = 0 there is nothing to clip
    old = torch.zeros(6, dtype=torch.float64)
    ref = tensor(*map(math.log, (3.0, 0.5, 1.5, 0.5, 1.0, 1.3)))  # differs in the first by d = ln 2
    sums = Sums()
    logp = tensor(*map(math.log, ratios)).requires_grad_()
    objective_loss(logp, old, ref, advantages, torch.ones(6).double(), 0.2, 0.1, sums)
    assert sums.tokens == 6 and sums.clipped == 2
    assert sums.max_ratio_error == pytest.approx(0.5, abs=1e-12)
    assert sums.kl == pytest.approx(1 - math.log(2), abs=1e-12)
    assert sums.approx_kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratios), abs=1e-12)


def test_max_ratio_error_sees_both_sides_and_keeps_the_largest():
    sums = Sums()
    for ratio in (1.1, 0.3, 1.2):
        objective_loss(tensor(math.log(ratio)), tensor(0), None, tensor(1), tensor(1), sums=sums)
    assert sums.max_ratio_error == pytest.approx(0.7, abs=1e-12)


def test_the_objective_changes_none_of_its_inputs():
    inputs = ragged()[:4]
    copies = [x.clone() for x in inputs]
    objective_loss(*inputs, torch.ones(7).double(), 0.2, 0.3, Sums())
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


def test_the_upper_end_of_the_clip_range_may_be_another():
    """rho 1.25 with A > 0: clipped at 1.2, not at 1.3. The lower end stays where it was."""
    def loss(rho, A, **clip):
        return objective_loss(tensor(math.log(rho)), tensor(0), None, tensor(A), tensor(1), 0.2, **clip)

    close(loss(1.25, 1), -1.2)
    close(loss(1.25, 1, clip_eps_high=0.3), -1.25)
    close(loss(1.4, 1, clip_eps_high=0.3), -1.3)
    close(loss(0.7, -1, clip_eps_high=0.3), 0.8)


def test_beta_follows_the_kl_that_is_wanted():
    assert adapted_beta(0.1, 0.02, 0.02) == pytest.approx(0.1)
    assert adapted_beta(0.1, 0.022, 0.02) == pytest.approx(0.101)  # 10 % above: 1 % more
    assert adapted_beta(0.1, 5.0, 0.02) == pytest.approx(0.102) and adapted_beta(0.1, 0.0, 0.02) == pytest.approx(0.098)
    beta, kl = 0.01, 0.05  # a policy whose KL is 0.001 / beta settles where KL is as wanted
    for _ in range(500):
        beta = adapted_beta(beta, kl, 0.02)
        kl = 0.001 / beta
    assert kl == pytest.approx(0.02, rel=0.05)

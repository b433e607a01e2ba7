"""variants/objective.py by hand; with one inner epoch every ratio and loss has the gradient of GRPO."""

import math

import pytest
import torch

import tompo
import variants.objective as variants


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-6)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    close(variants.centred(rewards), [-2.0, -1.0, 3.0])
    close(variants.leave_one_out(rewards), [1 - 4.0, 2 - 3.5, 6 - 1.5])  # minus the mean of the other two


@pytest.mark.parametrize("advantage", tompo.ADVANTAGES)
def test_equal_rewards_and_groups_of_one_get_exactly_0(advantage):
    for rewards in ([0.1] * 7, [2.5]):
        assert tompo.ADVANTAGES[advantage](torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


def test_the_dual_level_takes_the_chosen_advantage():
    r_S, R_G = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0])
    A, A_S, A_G = tompo.dual_level_advantages(r_S, R_G, advantage="loo")
    close(A_S, [-1.0, 1.0])
    close(A_G, [2.0, -2.0])
    close(A, 0.8 * A_S + 0.2 * A_G)


def test_cispo_by_hand():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    ratio = torch.tensor([0.5, 1.1, 2.0])
    value = variants.cispo(ratio, logp, torch.tensor([1.0, -1.0, 2.0]), 0.8, 1.2)
    close(value, [0.8 * -1.0, 1.1 * 2.0, 1.2 * 2 * -0.5])
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    close(gradient, [0.8, -1.1, 2.4])  # a clipped token still has a gradient, unlike PPO's


def test_the_sequence_ratio_is_the_geometric_mean_with_its_gradient():
    log_ratio = torch.tensor([0.1, 0.3, -0.2, 0.0, 0.5], requires_grad=True)
    rho = variants.sequence_mean(log_ratio, [2, 3]).exp()
    first, second = math.exp(0.2), math.exp(0.1)
    close(rho, [first, first, second, second, second])
    (gradient,) = torch.autograd.grad(rho.sum(), log_ratio)
    close(gradient, [first, first, second, second, second])  # each token of a reply has the same share


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    close(tompo.KL_ESTIMATORS["k1"](logp, ref), [0.5])
    close(tompo.KL_ESTIMATORS["k2"](logp, ref), [0.125])
    close(tompo.KL_ESTIMATORS["k3"](logp, ref), [math.exp(-0.5) + 0.5 - 1])


@pytest.mark.parametrize("estimator", tompo.KL_ESTIMATORS)
def test_kl_estimators_agree_with_the_kl_where_it_is_small(estimator):
    """Their means under pi, summed exactly over a law of three tokens; k1 and k3 are unbiased, k2 nearly."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.48, 0.33, 0.19])
    exact = (pi * (pi / ref).log()).sum()
    estimate = (pi * tompo.KL_ESTIMATORS[estimator](pi.log(), ref.log())).sum()
    torch.testing.assert_close(estimate, exact, rtol=0.02 if estimator == "k2" else 1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", tompo.LOSSES)
@pytest.mark.parametrize("ratio", tompo.RATIOS)
@pytest.mark.parametrize("aggregation", tompo.AGGREGATIONS)
def test_with_one_inner_epoch_every_ratio_and_loss_has_the_gradient_of_grpo(loss, ratio, aggregation):
    generator, lengths = torch.Generator().manual_seed(0), [3, 1, 5]
    logp = -torch.rand(9, generator=generator)
    per_reply = tompo.AGGREGATIONS[aggregation](lengths, 8)
    weight = torch.tensor([w for w, n in zip(per_reply, lengths) for _ in range(n)])
    advantage = torch.tensor([a for a, n in zip([1.3, -0.4, 0.7], lengths) for _ in range(n)])

    def gradient(**how):
        own = logp.clone().requires_grad_()
        value, _ = tompo.objective_loss(own, logp, None, advantage, weight, lengths=lengths, **how)
        return torch.autograd.grad(value, own)[0]

    close(gradient(loss=loss, ratio=ratio), -advantage * weight)
    close(gradient(loss=loss, ratio=ratio), gradient())


def test_the_constant_aggregation_knows_no_lengths():
    close(tompo.AGGREGATIONS["constant"]([1, 7], 20), [1 / 40, 1 / 40])
    close(tompo.AGGREGATIONS["constant"]([20, 3], 20), [1 / 40, 1 / 40])

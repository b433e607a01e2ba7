"""variants/objective.py by hand; with one inner epoch every ratio and loss has the gradient of GRPO."""

import math

import pytest
import torch

from variants import objective


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-6)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    close(objective.centred(rewards), [-2.0, -1.0, 3.0])
    close(objective.leave_one_out(rewards), [1 - 4.0, 2 - 3.5, 6 - 1.5])  # minus the mean of the other two
    for name, function in (("mean", objective.centred), ("loo", objective.leave_one_out)):
        first, second = objective.ADVANTAGES[name]([rewards, rewards[:2]])  # each group by itself
        assert torch.equal(first, function(rewards)) and torch.equal(second, function(rewards[:2]))


def test_cispo_by_hand():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    ratio = torch.tensor([0.5, 1.1, 2.0])
    value = objective.cispo(ratio, logp, torch.tensor([1.0, -1.0, 2.0]), 0.8, 1.2)
    close(value, [0.8 * -1.0, 1.1 * 2.0, 1.2 * 2 * -0.5])
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    close(gradient, [0.8, -1.1, 2.4])  # a clipped token still has a gradient, unlike PPO's


def test_the_sequence_ratio_is_the_geometric_mean_with_its_gradient():
    log_ratio = torch.tensor([0.1, 0.3, -0.2, 0.0, 0.5], requires_grad=True)
    rho = objective.sequence_mean(log_ratio, [2, 3]).exp()
    first, second = math.exp(0.2), math.exp(0.1)
    close(rho, [first, first, second, second, second])
    (gradient,) = torch.autograd.grad(rho.sum(), log_ratio)
    close(gradient, [first, first, second, second, second])  # each token of a reply has the same share


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    close(objective.KL_ESTIMATORS["k2"](logp, ref), [0.125])
    close(objective.KL_ESTIMATORS["k3"](logp, ref), [math.exp(-0.5) + 0.5 - 1])


@pytest.mark.parametrize("loss", objective.LOSSES)
@pytest.mark.parametrize("ratio", objective.RATIOS)
@pytest.mark.parametrize("aggregation", objective.AGGREGATIONS)
def test_with_one_inner_epoch_every_ratio_and_loss_has_the_gradient_of_grpo(loss, ratio, aggregation):
    generator, lengths = torch.Generator().manual_seed(0), [3, 1, 5]
    logp, repeats = -torch.rand(9, generator=generator), torch.tensor(lengths)
    weight = torch.tensor(objective.AGGREGATIONS[aggregation](lengths, 8)).repeat_interleave(repeats)
    advantage = torch.tensor([1.3, -0.4, 0.7]).repeat_interleave(repeats)
    own = logp.clone().requires_grad_()
    rho = objective.RATIOS[ratio](own - logp, lengths).exp()
    J = (weight * objective.LOSSES[loss](rho, own, advantage, 0.8, 1.2)).sum()
    close(torch.autograd.grad(J, own)[0], advantage * weight)

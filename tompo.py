"""ToMPO (arXiv 2509.21134): the parts of the advantage on two levels and of the clipped objective.

Pure functions in the paper's symbols; train_rft.rft puts them together. Dimensions: M replies to a prompt (a
group), T the tokens of all replies of a pass.

    A^S_i = (r^S_i - mean) / (std + 1e-4)  within the group: sample level; this alone is GRPO
    A^G_i = the same for R^G                               : graph level, where there is an R^G: for links
                                                             (with --reward-from game for efforts, too)
    A_i   = w_sample A^S_i + w_graph A^G_i                   where there is an R^G, 0.8 / 0.2 [source]
    A_i   = A^S_i                                            elsewhere

    J = E[ (1/m) sum_i (1/|o_i|) sum_t ( min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta k3 ) ]
    E: the mean over the prompts of a step whose replies do not all have A = 0 [choice]
    rho = pi_theta / pi_old,  k3 = exp(l_ref - l) - (l_ref - l) - 1,  l = log pi_theta, l_ref = log pi_ref

variants/objective.py has other forms of each part, and the tables that `--objective` chooses from.
"""

import torch
from torch import Tensor


def group_normalise(rewards_M: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within one group, (M,). A group of one, or with equal rewards, gets exactly 0,
    and train_rft.rft leaves it out."""
    if (rewards_M == rewards_M[0]).all():
        return torch.zeros_like(rewards_M)
    return (rewards_M - rewards_M.mean()) / (rewards_M.std(unbiased=False) + eps)


def two_levels(A_S: Tensor, A_G: Tensor | None, w_sample: float, w_graph: float) -> Tensor:
    """A of one group, (M,), from its advantages on both levels. A_G: None where a decision has no R^G."""
    return A_S if A_G is None else w_sample * A_S + w_graph * A_G


def mean_of_replies(lengths: list[int]) -> list[float]:
    """The weight of every token of each reply in J: the mean over replies of the mean over their tokens.
    lengths: the tokens of each reply of an optimizer step. All of them are counted, so the gradient depends
    neither on --micro-batch nor on the number of processes."""
    return [1 / (len(lengths) * n) for n in lengths]


def clipped(rho_T: Tensor, A_T: Tensor, low: float, high: float) -> Tensor:
    """PPO's min(rho A, clip(rho, low, high) A), (T,), to be maximised."""
    return torch.minimum(rho_T * A_T, rho_T.clamp(low, high) * A_T)


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi, pi_ref) per token: never negative, 0 iff equal, and unbiased
    for tokens drawn from pi. (Its gradient at rho = 1 is, in expectation, that of KL(pi_ref, pi).)"""
    d = ref_logp_T - logp_T
    return d.exp() - d - 1

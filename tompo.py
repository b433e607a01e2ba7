"""ToMPO (arXiv 2509.21134): advantages on two levels, and the parts of the clipped objective with a KL
penalty.

Pure functions in the paper's symbols; train_rft.rft puts them together. Dimensions: M replies to a prompt (a
group), T reply tokens.

    A^S_i = (r^S_i - mean) / (std + 1e-4)  within the group: sample level; this alone is GRPO
    A^G_i = the same for R^G                               : graph level, decisions about links only
    A_i   = w_sample A^S_i + w_graph A^G_i                   links, 0.8 / 0.2 [source]
    A_i   = A^S_i                                            efforts

    J = E[ (1/m) sum_i (1/|o_i|) sum_t ( min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta k3 ) ]
    E: the mean over the prompts of a step whose replies do not all have A = 0 [choice]
    rho = pi_theta / pi_old,  k3 = exp(l_ref - l) - (l_ref - l) - 1,  l = log pi_theta, l_ref = log pi_ref

A variant is one function and one line in a table (ADVANTAGES, ...), here or in variants/objective.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ALGORITHMS = ("tompo", "grpo")  # grpo: the weights of A^S and A^G are 1 and 0 (settings.resolve_rft)

# -------------------- advantages


def group_normalise(rewards_M: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within one group, (M,). A group of one, or with equal rewards, gets exactly 0:
    otherwise the division would magnify the rounding error of the mean, 1e-8."""
    if (rewards_M == rewards_M[0]).all():
        return torch.zeros_like(rewards_M)
    return (rewards_M - rewards_M.mean()) / (rewards_M.std(unbiased=False) + eps)


def per_group(advantage: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """From the advantage within one group, (M,) -> (M,), to that of all groups of a step."""
    return lambda rewards: [advantage(rewards_M) for rewards_M in rewards]


# The rewards of all groups of a step, (M,) each -> their advantages. A function that is not `per_group` may
# look at the whole step.
ADVANTAGES = {"std": per_group(group_normalise)}

# -------------------- the objective


def mean_of_replies(lengths: list[int], limit: int) -> list[float]:
    """The weight of every token of each reply in J: the mean over replies of the mean over their tokens."""
    return [1 / (len(lengths) * n) for n in lengths]


def mean_of_tokens(lengths: list[int], limit: int) -> list[float]:
    """The mean over all tokens of the step."""
    return [1 / sum(lengths)] * len(lengths)


# (lengths of all replies of an optimizer step, the longest reply allowed) -> the weight of each reply's
# tokens. The weights are normalised over the whole step, so the gradient does not depend on --micro-batch
# or on the number of processes.
AGGREGATIONS = {"sequence": mean_of_replies, "token": mean_of_tokens}


def clipped(ratio_T: Tensor, logp_T: Tensor, advantage_T: Tensor, low: float, high: float) -> Tensor:
    """PPO's min(rho A, clip(rho, low, high) A), (T,)."""
    return torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T)


def token_ratio(log_ratio_T: Tensor, lengths: list[int]) -> Tensor:
    """log rho of every token by itself, (T,)."""
    return log_ratio_T


# All functions of a table take the same arguments, also where only some of them use all.
LOSSES = {"clip": clipped}  # (rho, log pi, A, ends of the clip range) -> what J sums, to be maximised, (T,)
RATIOS = {"token": token_ratio}  # (log pi_theta - log pi_old, reply lengths) -> log rho, (T,)


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi, pi_ref) per token: never negative, 0 iff equal, and its value is
    unbiased under pi. (Its gradient at rho = 1 is, in expectation, that of KL(pi_ref, pi).)"""
    d = ref_logp_T - logp_T
    return d.exp() - d - 1


KL_ESTIMATORS = {"k3": k3}  # (log pi, log pi_ref) -> (T,)

# What --objective chooses from; the first of each is the default. variants/objective.py adds to them.
TABLES: dict[str, dict[str, Callable]] = {
    "advantage": ADVANTAGES,
    "aggregation": AGGREGATIONS,
    "loss": LOSSES,
    "ratio": RATIOS,
    "kl": KL_ESTIMATORS,
}


@torch.no_grad()
def diagnostics(
    logp_T: Tensor, old_T: Tensor, ref_T: Tensor | None, ratio_T: Tensor, A_T: Tensor, low: float, high: float
) -> dict[str, float | None]:
    """Sums over the tokens of a pass, for the log (play/rft_log.py). `kl` is k3 whatever estimator is
    trained."""
    return {
        "tokens": logp_T.numel(),
        "kl": None if ref_T is None else float(k3(logp_T, ref_T).sum()),
        "approx_kl": float(k3(old_T, logp_T).sum()),
        "clipped": int((ratio_T.clamp(low, high) * A_T < ratio_T * A_T).sum()),
        "max_ratio_error": float((ratio_T - 1).abs().max()),
    }

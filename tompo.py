"""ToMPO (arXiv 2509.21134): advantages on two levels, and the clipped objective with a KL penalty.

Pure functions in the paper's symbols. Dimensions: M rollouts of a prompt (a group), T reply tokens.

    A^S_i = (r^S_i - mean) / (std + 1e-4)  within the group: sample level; this alone is GRPO
    A^G_i = the same of R^G                                : graph level, graph decisions only
    A_i   = w_sample A^S_i + w_graph A^G_i                   graph decisions, 0.8 / 0.2 [source]
    A_i   = A^S_i                                            effort decisions

    J = E[ (1/m) sum_i (1/|o_i|) sum_t ( min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta k3 ) ]
    rho = pi_theta / pi_old,  k3 = exp(l_ref - l) - (l_ref - l) - 1,  l = log pi_theta, l_ref = log pi_ref

A variant is one function and one line in a table (ADVANTAGES, ...), here or in variants/objective.py.
"""

import torch
from torch import Tensor

ALGORITHMS = ("tompo", "grpo")

# -------------------- advantages


def group_normalise(rewards_M: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within one group, (M,). A group of one, or of equal rewards, gets exactly 0:
    else the mean's rounding, 1e-8, would be blown up by the division."""
    if (rewards_M == rewards_M[0]).all():
        return torch.zeros_like(rewards_M)
    return (rewards_M - rewards_M.mean()) / (rewards_M.std(unbiased=False) + eps)


ADVANTAGES = {"std": group_normalise}  # rewards of a group (M,) -> advantages (M,)


def dual_level_advantages(
    r_S_M: Tensor,
    R_G_M: Tensor | None,
    *,
    algo: str = "tompo",
    weights: tuple[float, float] = (0.8, 0.2),
    advantage: str = "std",
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, A^S, A^G) of one group, each (M,). R_G_M is None for effort decisions. `grpo`: A = A^S."""
    A_S = ADVANTAGES[advantage](r_S_M)
    A_G = torch.zeros_like(A_S) if R_G_M is None else ADVANTAGES[advantage](R_G_M)
    if algo == "grpo" or R_G_M is None:
        return A_S, A_S, A_G
    w_sample, w_graph = weights
    return w_sample * A_S + w_graph * A_G, A_S, A_G


# -------------------- the objective

# The weight of every token of each rollout, from the lengths of all rollouts of an optimizer step and the
# longest reply allowed. The denominator is that of the whole step, so gradients do not depend on how a step
# is cut.
AGGREGATIONS = {  # sequence: the mean over replies of the mean over tokens, as in J; token: over all tokens
    "sequence": lambda lengths, limit: [1 / (len(lengths) * n) for n in lengths],
    "token": lambda lengths, limit: [1 / sum(lengths)] * len(lengths),
}


def clipped(ratio_T: Tensor, logp_T: Tensor, advantage_T: Tensor, low: float, high: float) -> Tensor:
    """PPO's min(rho A, clip(rho, low, high) A), (T,)."""
    return torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T)


LOSSES = {"clip": clipped}  # (rho, log pi, A, ends of the clip range) -> what J sums, (T,)
RATIOS = {"token": lambda log_ratio_T, lengths: log_ratio_T}  # (log rho, reply lengths) -> log rho, (T,)


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi, pi_ref) per token: unbiased under pi, never negative, 0 iff equal."""
    d = ref_logp_T - logp_T
    return d.exp() - d - 1


KL_ESTIMATORS = {"k3": k3}  # (log pi, log pi_ref) -> (T,)

# What --objective chooses from; the first of each is the default. variants/objective.py adds to them.
TABLES = dict(advantage=ADVANTAGES, aggregation=AGGREGATIONS, loss=LOSSES, ratio=RATIOS, kl=KL_ESTIMATORS)


def objective_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    ref_logp_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    clip_eps: tuple[float, float] = (0.2, 0.2),
    beta: float = 0.0,
    loss: str = "clip",
    ratio: str = "token",
    kl: str = "k3",
    lengths: list[int] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """-J of the given tokens, and sums over them for the log (run/rft_log.py).

    Each token's A_i and weight stand beside it, rollouts are simply concatenated. Added up over the passes of
    a step it is the loss of the step. clip_eps: how far rho may go below and above 1. ref_logp_T may be None
    if beta is 0; lengths: of the replies, for ratios that need them."""
    low, high = 1 - clip_eps[0], 1 + clip_eps[1]
    ratio_T = RATIOS[ratio](logp_T - old_logp_T, lengths).exp()  # rho
    objective_T = LOSSES[loss](ratio_T, logp_T, advantage_T, low, high)
    if beta:
        objective_T = objective_T - beta * KL_ESTIMATORS[kl](logp_T, ref_logp_T)
    with torch.no_grad():
        sums = {
            "tokens": logp_T.numel(),
            "kl": float(k3(logp_T, ref_logp_T).sum()) if beta else None,
            "approx_kl": float(k3(old_logp_T, logp_T).sum()),
            "clipped": int((ratio_T.clamp(low, high) * advantage_T < ratio_T * advantage_T).sum()),
            "max_ratio_error": float((ratio_T - 1).abs().max()),
        }
    return -(objective_T * weight_T).sum(), sums

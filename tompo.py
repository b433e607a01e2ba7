"""ToMPO (arXiv 2509.21134): advantages on two levels, and the clipped objective with a KL penalty. Pure functions.

Symbols are the paper's. Dimensions: m rollouts of a prompt (a group), T reply tokens.

    A^S_i = (r^S_i - mean) / (std + eps)   within the group: sample level; this alone is GRPO
    A^G_i = the same of R^G                                : graph level, graph decisions only
    A_i   = w_sample A^S_i + w_graph A^G_i                   graph decisions, 0.8 / 0.2 [source]
    A_i   = A^S_i                                            effort decisions

    J = E[ (1/m) sum_i (1/|o_i|) sum_t ( min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta k3 ) ]
    (`clip_eps_high` widens the upper end of the clip range alone)
    rho = pi_theta / pi_old per token,   k3 = exp(l_ref - l) - (l_ref - l) - 1,   l = log pi_theta, l_ref = log pi_ref
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

ALGORITHMS = ("tompo", "grpo")
AGGREGATIONS = ("sequence", "token", "constant")


def group_normalise(rewards_M: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within one group, (m,). A group of one, or of equal rewards, gets exactly 0."""
    if (rewards_M == rewards_M[0]).all():  # r - mean of equal floats can be 1e-8, which the division would blow up
        return torch.zeros_like(rewards_M)
    return (rewards_M - rewards_M.mean()) / (rewards_M.std(unbiased=False) + eps)


def dual_level_advantages(
    r_S_M: Tensor,
    R_G_M: Tensor | None,
    algo: str = "tompo",
    w_sample: float = 0.8,
    w_graph: float = 0.2,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, A^S, A^G) of one group, each (m,). R_G_M is None for effort decisions. `grpo` is the sample level alone."""
    A_S = group_normalise(r_S_M, eps)
    A_G = torch.zeros_like(A_S) if R_G_M is None else group_normalise(R_G_M, eps)
    if algo == "grpo" or R_G_M is None:
        return A_S, A_S, A_G
    return w_sample * A_S + w_graph * A_G, A_S, A_G


def token_weights(lengths: list[int], aggregation: str, max_new_tokens: int) -> list[float]:
    """The weight of every token of each rollout of a whole optimizer step.

    `sequence`: the mean over rollouts of the mean over tokens, as in J; `token`: the mean over all tokens;
    `constant`: the sum over tokens / max_new_tokens. The denominator is that of the whole step, so gradients do not
    depend on how the step is cut into micro-batches.
    """
    if aggregation == "sequence":
        return [1 / (len(lengths) * n) for n in lengths]
    if aggregation == "token":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * max_new_tokens)] * len(lengths)


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi, pi_ref) per token: unbiased under pi, never negative, 0 iff equal."""
    d = ref_logp_T - logp_T
    return d.exp() - d - 1


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """The next step's KL coefficient (Ziegler et al. 2019, section 2.2): up where KL is above its target, down where it
    is below, by a tenth of the relative error, at most 2 % a step."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + 0.1 * error)


@dataclass
class Sums:
    """Sums over tokens, from which a step's diagnostics are made."""

    tokens: int = 0
    kl: float = 0.0  # k3 against pi_ref
    approx_kl: float = 0.0  # k3 of pi_old against pi_theta: how far this step has moved
    clipped: int = 0
    max_ratio_error: float = 0.0  # max |rho - 1|
    has_reference: bool = False  # else kl was not measured

    @classmethod
    def of_all(cls, parts: Iterable["Sums"]) -> "Sums":
        total = cls()
        for part in parts:
            for f in fields(cls):
                combine = {"max_ratio_error": max, "has_reference": operator.or_}.get(f.name, operator.add)
                setattr(total, f.name, combine(getattr(total, f.name), getattr(part, f.name)))
        return total

    def add(self, logp, old_logp, ref_logp, ratio, clipped) -> None:
        with torch.no_grad():
            self.tokens += logp.numel()
            if ref_logp is not None:
                self.kl += float(k3(logp, ref_logp).sum())
                self.has_reference = True
            self.approx_kl += float(k3(old_logp, logp).sum())
            self.clipped += int(clipped.sum())
            self.max_ratio_error = max(self.max_ratio_error, float((ratio - 1).abs().max()))


def objective_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    ref_logp_T: Tensor | None,
    advantage_T: Tensor,
    weight_T: Tensor,
    clip_eps: float = 0.2,
    beta: float = 0.0,
    sums: Sums | None = None,
    clip_eps_high: float | None = None,
) -> Tensor:
    """-J of the given tokens: each token's A_i and weight stand beside it, rollouts are simply concatenated.

    Added up over the micro-batches of a step it is the loss of the step. ref_logp_T may be None if beta is 0.
    """
    ratio_T = (logp_T - old_logp_T).exp()  # rho
    unclipped_T = ratio_T * advantage_T
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped_T = ratio_T.clamp(1 - clip_eps, 1 + high) * advantage_T
    objective_T = torch.minimum(unclipped_T, clipped_T)
    if beta:
        objective_T = objective_T - beta * k3(logp_T, ref_logp_T)
    if sums is not None:
        sums.add(logp_T, old_logp_T, ref_logp_T, ratio_T.detach(), clipped_T < unclipped_T)
    return -(objective_T * weight_T).sum()

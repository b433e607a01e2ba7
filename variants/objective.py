"""What `--objective` chooses from: the parts of A and J as tompo.py defines them, and other forms of them.

`--objective advantage=loo loss=cispo` chooses two; the first of each table is the default. A variant is one
function and one line of a table. With one inner epoch rho is 1, and then all ratios and losses have the same
gradient."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from run.errors import InputError
from tompo import clipped, group_normalise, k3, mean_of_replies


def per_group(advantage: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """From the advantage within one group, (M,) -> (M,), to that of all groups of a step."""
    return lambda rewards: [advantage(rewards_M) for rewards_M in rewards]


def centred(rewards_M: Tensor) -> Tensor:
    """r - mean within one group, (M,): Dr. GRPO (arXiv 2503.20783), with aggregation=constant. Equal rewards
    get 0."""
    return torch.zeros_like(rewards_M) if (rewards_M == rewards_M[0]).all() else rewards_M - rewards_M.mean()


def leave_one_out(rewards_M: Tensor) -> Tensor:
    """r minus the mean of the others in the group, (M,): RLOO (arXiv 2402.14740). A group of one gets 0."""
    return centred(rewards_M) * (len(rewards_M) / max(1, len(rewards_M) - 1))


def mean_of_tokens(lengths: list[int]) -> list[float]:
    """The mean over all tokens of the step."""
    return [1 / sum(lengths)] * len(lengths)


def constant(lengths: list[int], limit: int) -> list[float]:
    """The sum over tokens divided by the longest reply allowed, a denominator that does not depend on the
    replies (Dr. GRPO)."""
    return [1 / (len(lengths) * limit)] * len(lengths)


def cispo(rho_T: Tensor, logp_T: Tensor, A_T: Tensor, low: float, high: float) -> Tensor:
    """log pi weighted by the clipped ratio, through which no gradient flows, (T,): CISPO (arXiv
    2506.13585)."""
    return rho_T.clamp(low, high).detach() * A_T * logp_T


def sequence_mean(log_ratio_T: Tensor, lengths: list[int]) -> Tensor:
    """Every token of a reply gets the mean of the reply's log ratios, (T,): GSPO (arXiv 2507.18071)."""
    return torch.cat([part.mean().expand(len(part)) for part in log_ratio_T.split(lengths)])


# The rewards of all groups of a step, (M,) each -> their advantages. A function that is not `per_group` may
# look at the whole step.
ADVANTAGES = {
    "std": per_group(group_normalise),
    "mean": per_group(centred),
    "loo": per_group(leave_one_out),
}
# (lengths of all replies of an optimizer step, the longest reply allowed) -> the weight of each one's tokens.
AGGREGATIONS = {
    "sequence": lambda lengths, limit: mean_of_replies(lengths),
    "token": lambda lengths, limit: mean_of_tokens(lengths),
    "constant": constant,
}
# (rho, log pi, A, ends of the clip range) -> what J sums, (T,).
LOSSES = {"clip": lambda rho_T, logp_T, A_T, low, high: clipped(rho_T, A_T, low, high), "cispo": cispo}
# (log pi_theta - log pi_old, lengths of the replies) -> log rho, (T,).
RATIOS = {"token": lambda log_ratio_T, lengths: log_ratio_T, "sequence": sequence_mean}
# (log pi, log pi_ref) -> (T,). Schulman, "Approximating KL divergence" (2020). At rho = 1 the gradient of k2
# is in expectation that of KL(pi, pi_ref). His k1, log pi - log pi_ref, is left out: the expectation of its
# gradient is 0, so it would not keep pi near pi_ref.
KL_ESTIMATORS = {"k3": k3, "k2": lambda logp_T, ref_logp_T: (logp_T - ref_logp_T) ** 2 / 2}
TABLES: dict[str, dict[str, Callable]] = {
    "advantage": ADVANTAGES,
    "aggregation": AGGREGATIONS,
    "loss": LOSSES,
    "ratio": RATIOS,
    "kl": KL_ESTIMATORS,
}


def choose(given: Iterable[str] | None) -> dict[str, Callable]:
    """["loss=cispo", ...] -> a function of every table, by its name: the first one where nothing is
    given. Raises InputError."""
    chosen = {name: next(iter(table.values())) for name, table in TABLES.items()}
    for text in given or ():
        name, _, choice = text.partition("=")
        if choice not in TABLES.get(name, ()):
            known = "; ".join(f"{name}={'|'.join(table)}" for name, table in TABLES.items())
            raise InputError(f"--objective {text}: write NAME=CHOICE, of {known}")
        chosen[name] = TABLES[name][choice]
    return chosen

"""Other advantages, aggregations, losses, ratios and KL estimators: one function and one line each.

`--objective advantage=loo loss=cispo` chooses among them. With one inner epoch rho is 1, and then all
ratios and losses have the gradient of GRPO with the same aggregation."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from run.errors import InputError
from tompo import ADVANTAGES, AGGREGATIONS, KL_ESTIMATORS, LOSSES, RATIOS, TABLES, per_group


def centred(rewards_M: Tensor) -> Tensor:
    """r - mean within one group, (M,): Dr. GRPO (arXiv 2503.20783), with aggregation=constant. Equal rewards
    get 0."""
    return torch.zeros_like(rewards_M) if (rewards_M == rewards_M[0]).all() else rewards_M - rewards_M.mean()


def leave_one_out(rewards_M: Tensor) -> Tensor:
    """r minus the mean of the others in the group, (M,): RLOO (arXiv 2402.14740). A group of one gets 0."""
    return centred(rewards_M) * (len(rewards_M) / max(1, len(rewards_M) - 1))


def constant(lengths: list[int], limit: int) -> list[float]:
    """The sum over tokens divided by the longest reply allowed, a denominator that does not depend on the
    replies (Dr. GRPO)."""
    return [1 / (len(lengths) * limit)] * len(lengths)


def cispo(ratio_T: Tensor, logp_T: Tensor, advantage_T: Tensor, low: float, high: float) -> Tensor:
    """log pi weighted by the clipped ratio, through which no gradient flows, (T,): CISPO (arXiv
    2506.13585)."""
    return ratio_T.clamp(low, high).detach() * advantage_T * logp_T


def sequence_mean(log_ratio_T: Tensor, lengths: list[int]) -> Tensor:
    """Every token of a reply gets the mean of the reply's log ratios, (T,): GSPO (arXiv 2507.18071)."""
    return torch.cat([part.mean().expand(len(part)) for part in log_ratio_T.split(lengths)])


ADVANTAGES |= {"mean": per_group(centred), "loo": per_group(leave_one_out)}
AGGREGATIONS |= {"constant": constant}
LOSSES |= {"cispo": cispo}
RATIOS |= {"sequence": sequence_mean}
KL_ESTIMATORS |= {  # Schulman, "Approximating KL divergence" (2020)
    "k1": lambda logp_T, ref_logp_T: logp_T - ref_logp_T,
    "k2": lambda logp_T, ref_logp_T: (logp_T - ref_logp_T) ** 2 / 2,
}


def choose(given: Iterable[str] | None) -> dict[str, Callable]:
    """["loss=cispo", ...] -> a function of every table of tompo.py, by the table's name: the first one where
    nothing is given. Raises InputError."""
    chosen = {name: next(iter(table.values())) for name, table in TABLES.items()}
    for text in given or ():
        name, _, choice = text.partition("=")
        if choice not in TABLES.get(name, ()):
            known = "; ".join(f"{name}={'|'.join(table)}" for name, table in TABLES.items())
            raise InputError(f"--objective {text}: write NAME=CHOICE, of {known}")
        chosen[name] = TABLES[name][choice]
    return chosen

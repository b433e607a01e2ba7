"""Means with 95 % intervals. Values that are None or nan do not exist, and are left out."""

import math
from collections.abc import Iterable

import numpy as np

UNKNOWN = {"mean": None, "low": None, "high": None, "n": 0}
Z95 = 1.959964  # the 0.975 quantile of the normal distribution
# Those of Student's t with 1, 2, ... degrees of freedom
T95 = 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622


def _t95(df: int) -> float:
    """From the table, then by the Cornish-Fisher expansion."""
    if df <= len(T95):
        return T95[df - 1]
    z, second = Z95, (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * df**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    return z + (z**3 + z) / (4 * df) + second + third


def mean_interval(values: Iterable[float | None]) -> dict:
    """Mean and 95 % t interval over instances; nan and None are left out."""
    x = np.array([v for v in values if v is not None and not math.isnan(v)], float)
    if len(x) == 0:
        return dict(UNKNOWN)
    interval = {"mean": float(x.mean()), "low": None, "high": None, "n": len(x)}
    if len(x) > 1:
        half = _t95(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        interval |= {"low": float(x.mean() - half), "high": float(x.mean() + half)}
    return interval


def wilson_interval(successes: float, n: float) -> dict:
    """Share and 95 % Wilson interval."""
    z, share = Z95, successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"mean": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}

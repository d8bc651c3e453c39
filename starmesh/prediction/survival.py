"""Quantiles of quantities of which some are known only to exceed a bound.

Owns the weighted product-limit estimate (Kaplan and Meier, JASA 1958). A cut request says only that its length exceeds
what it had; dropping such requests would bias every quantile downwards, taking the cut for the end as well. The
estimate supposes that what cuts a request does not depend on how long it would still have become: true of a cap, and
about true of a client that goes away.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

_ROUNDING = 1e-9


def survival(values: Numbers, observed: npt.NDArray[np.bool_], weights: Numbers) -> tuple[Numbers, Numbers]:
    """The distinct values [k], ascending, and the part that exceeds each of them [k]. ``observed`` is False for a
    value that is only exceeded: it counts as there up to itself, and beyond it like the rest that is left there."""
    points, where = np.unique(values, return_inverse=True)
    ends = np.bincount(where, weights=np.where(observed, weights, 0.0), minlength=len(points))
    leaves = np.bincount(where, weights=weights, minlength=len(points))
    at_risk = np.cumsum(leaves[::-1])[::-1]
    return points, np.asarray(np.cumprod(1.0 - np.minimum(1.0, ends / at_risk)))


def quantile(values: Numbers, observed: npt.NDArray[np.bool_], weights: Numbers, level: float) -> float:
    """The smallest value that at most ``1 - level`` exceeds; infinite where too many are cut to tell. Weights are above
    0. Raises ValueError for no values."""
    if not len(values):
        raise ValueError("nothing has no quantiles")
    points, exceeding = survival(values, observed, weights)
    index = int(np.searchsorted(-exceeding, level - 1.0 - _ROUNDING))
    return float(points[index]) if index < len(points) else float("inf")

"""Confidence intervals over seeds, by Student's t. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_T: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 0.975 quantiles of Student's t for 1 to 30 degrees of freedom, from its tables."""

_NORMAL: Final = 1.959964


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``count`` values, and where the true one lies with 95 % confidence; without an interval (``low`` and
    ``high`` NaN) for a single value, and all NaN for none."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    count: int = 1

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the values differ from 0 beyond chance; False for a single value, which says nothing of chance."""
        return self.low > 0 or self.high < 0


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    # Cornish and Fisher's expansion to the second order, right to 0.0002 from 31 on.
    first, second = (_NORMAL**3 + _NORMAL) / 4, (5 * _NORMAL**5 + 16 * _NORMAL**3 + 3 * _NORMAL) / 96
    return _NORMAL + first / degrees + second / degrees**2


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of ``values``; NaN among them are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Interval(math.nan, count=0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Interval(mean)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    half = student_t(len(known) - 1) * math.sqrt(variance / len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval:
    """How many times the first of each pair the second is: the geometric mean of the ratios and its interval. Pairs
    with a value that is not above 0 are left out."""
    logs = [math.log(after / before) for before, after in pairs if before > 0 and after > 0]
    found = interval(logs)
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count)

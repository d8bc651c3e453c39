"""How values are distributed, in memory that does not grow with their number.

Owns the bins and what is kept of them. Knows nothing of what the values are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

QUANTILES: Final = (*(percent / 100 for percent in range(100)), 0.995, 0.999, 0.9999, 1.0)
"""The quantiles that a Distribution keeps."""

_PENDING = 32_768
"""Values that are binned together at most."""
_SUM_UNITS = 1e9
_LARGEST_SUM = 2.0**62


@cache
def _edges(least: float, most: float, width: float) -> list[float]:
    bins = math.ceil(math.log(most / least) / math.log1p(width))
    return [least * (1.0 + width) ** place for place in range(bins + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What is kept of a histogram. ``count``, ``mean`` (to 1e-9 for each value), ``least`` and ``most`` are exact;
    ``quantiles``, in the order of QUANTILES, as near as a bin is wide. All are NaN, and ``quantiles`` empty, where
    nothing was counted."""

    count: int = 0
    total: float = 0.0
    quantiles: tuple[float, ...] = ()

    def quantile(self, quantile: float) -> float:
        """One of QUANTILES. Raises ValueError for another."""
        place = QUANTILES.index(quantile)
        return self.quantiles[place] if self.quantiles else math.nan

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return self.total / self.count if self.count else math.nan

    @property
    def least(self) -> float:
        """The smallest value."""
        return self.quantile(0.0)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p99(self) -> float:
        """The 0.99 quantile."""
        return self.quantile(0.99)

    @property
    def most(self) -> float:
        """The largest value."""
        return self.quantile(1.0)


class LogHistogram:
    """Counts finite values of at least 0 in bins from ``least`` to ``most``, each by ``width`` (a ratio) wider than the
    one before; below and above are bins of their own.

    What it says depends on the values alone, not on their order nor on how they were grouped: sums are of integers.
    """

    def __init__(self, *, least: float = 1e-5, most: float = 1e5, width: float = 0.002) -> None:
        self._edges = _edges(least, most, width)
        self.edges = np.array(self._edges)
        """[bins + 1]; bin i of ``counts`` lies between edges i - 1 and i."""
        self.count = 0
        self._counts = np.zeros(len(self._edges) + 1, np.int64)
        self._cumulative: npt.NDArray[np.int64] | None = None
        self._total_units = 0
        self._least, self._most = math.inf, -math.inf
        # Values that come in small arrays are binned many at a time.
        self._values = np.empty(_PENDING, np.float64)
        self._weights = np.empty(_PENDING, np.int64)
        self._pending = 0

    def add(self, value: float) -> None:
        """Count ``value`` once. Raises ValueError for a negative or infinite one."""
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{value} is no finite value of at least 0")
        self._counts[bisect_right(self._edges, value)] += 1
        self._cumulative = None
        self.count += 1
        self._total_units += round(value * _SUM_UNITS)
        self._least, self._most = min(self._least, value), max(self._most, value)

    def add_all(self, values: npt.NDArray[np.float64], each: int = 1) -> None:
        """Count each of ``values`` [n] ``each`` times. Raises ValueError as ``add`` does, at the latest when next read
        from."""
        start = 0
        while start < len(values):
            part = values[start : start + _PENDING - self._pending]
            end = self._pending + len(part)
            self._values[self._pending : end] = part
            self._weights[self._pending : end] = each
            self._pending = end
            start += len(part)
            if end == _PENDING:
                self._settle()
        self.count += len(values) * each

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[bins + 2], the first for values below all edges, the last for those above; a copy."""
        self._settle()
        return self._counts.copy()

    @property
    def total(self) -> float:
        """The sum of all values, each rounded to 1e-9."""
        self._settle()
        return self._total_units / _SUM_UNITS

    def quantile(self, quantile: float) -> float:
        """Interpolated linearly between the closest ranks, as numpy's default does; values of one bin are taken to lie
        evenly in it. NaN when nothing was counted."""
        self._settle()
        if self.count == 0:
            return math.nan
        rank = (self.count - 1) * quantile
        below = math.floor(rank)
        value = self._at_rank(below)
        if rank > below:
            value += (self._at_rank(below + 1) - value) * (rank - below)
        return value

    def distribution(self) -> Distribution:
        """What is kept of it."""
        if self.count == 0:
            return Distribution()
        return Distribution(count=self.count, total=self.total, quantiles=tuple(map(self.quantile, QUANTILES)))

    def _at_rank(self, rank: int) -> float:
        """About the value that ``rank`` values are not above."""
        if rank == 0:
            return self._least
        if rank == self.count - 1:
            return self._most
        if self._cumulative is None:
            self._cumulative = np.cumsum(self._counts)
        cumulative = self._cumulative
        place = int(np.searchsorted(cumulative, rank, side="right"))
        before = int(cumulative[place - 1]) if place else 0
        low = max(self._least, self._edges[place - 1] if place else 0.0)
        high = min(self._most, self._edges[place] if place < len(self._edges) else math.inf)
        return low + (high - low) * (rank - before + 0.5) / (int(cumulative[place]) - before)

    def _settle(self) -> None:
        """Bin the values that are pending."""
        if self._pending == 0:
            return
        values, weights = self._values[: self._pending], self._weights[: self._pending]
        self._pending = 0
        least, most = float(values.min()), float(values.max())
        if not (least >= 0.0 and most < math.inf):
            raise ValueError(f"from {least} to {most} are no finite values of at least 0")
        places = np.searchsorted(self.edges, values, side="right")
        np.add.at(self._counts, places, weights)
        self._cumulative = None
        units = np.rint(values * _SUM_UNITS)
        if most * _SUM_UNITS * float(weights.sum()) < _LARGEST_SUM:
            self._total_units += int((units.astype(np.int64) * weights).sum())
        else:
            self._total_units += sum(int(unit) * int(weight) for unit, weight in zip(units, weights, strict=True))
        self._least, self._most = min(self._least, least), max(self._most, most)

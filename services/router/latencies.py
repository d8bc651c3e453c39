"""How long things took lately: quantiles over the last minutes, in memory that does not grow with their number. Pure.

Owns the bins, the ring of time slices, and what is forgotten when. Knows nothing of what the times are of; time comes
in with each call.

Bins are log-spaced, so that a quantile is as exact, relatively, at 2 ms as at 20 minutes. Each slice of time has counts
of its own: the window moves on by whole slices, and a slice's own quantile is a point of a history.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Final

SLICE_S: Final = 10.0
SLICES: Final = 30
WINDOW_S: Final = SLICE_S * SLICES

LEAST_S: Final = 1e-5
MOST_S: Final = 1e5
"""What lies beyond these counts as they do."""
MAX_ERROR: Final = 0.02
"""How far a quantile may be off, as a part of its value."""

_RATIO: Final = (1 + MAX_ERROR) ** 2  # of one bin's edge to the next; a bin stands for its geometric middle
_LOG_RATIO: Final = math.log(_RATIO)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Quantiles in seconds, by nearest rank, over the ``count`` times of the window; all 0 where that is 0.

    ``p99_history`` has one for each slice of the window, the oldest first, the slice in progress last.
    """

    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    p99_history_s: tuple[float, ...]


class RecentLatencies:
    """The times of the last ``slices`` slices of ``slice_s`` each. ``now_s`` is any clock that does not go back."""

    def __init__(self, *, slice_s: float = SLICE_S, slices: int = SLICES) -> None:
        self._slice_s = slice_s
        self._slices = slices
        self._bins: dict[int, Counter[int]] = {}
        """By number of slice, in order."""

    def add(self, seconds: float, *, now_s: float) -> None:
        """Count one time."""
        number = self._forget(now_s)
        self._bins.setdefault(number, Counter())[_bin(seconds)] += 1

    def summary(self, *, now_s: float) -> Latencies:
        """What the window holds now."""
        last = self._forget(now_s)
        together: Counter[int] = Counter()
        for bins in self._bins.values():
            together.update(bins)
        p50_s, p90_s, p99_s = (_quantile(together, part) for part in (0.5, 0.9, 0.99))
        numbers = range(last - self._slices + 1, last + 1)
        history = tuple(_quantile(self._bins.get(number, Counter()), 0.99) for number in numbers)
        return Latencies(together.total(), p50_s, p90_s, p99_s, history)

    def _forget(self, now_s: float) -> int:
        """Drop the slices that have left the window. Returns the number of the present one."""
        number = math.floor(now_s / self._slice_s)
        while self._bins and (oldest := next(iter(self._bins))) <= number - self._slices:
            del self._bins[oldest]
        return number


def _bin(seconds: float) -> int:
    return math.floor(math.log(min(max(seconds, LEAST_S), MOST_S)) / _LOG_RATIO)


def _quantile(bins: Counter[int], part: float) -> float:
    """The middle of the bin that the value of this rank is in."""
    rank = math.ceil(part * bins.total())
    for place in sorted(bins):
        rank -= bins[place]
        if rank <= 0:
            return math.exp((place + 0.5) * _LOG_RATIO)
    return 0.0

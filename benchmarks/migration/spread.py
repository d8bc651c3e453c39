"""How many values are told as four."""

from __future__ import annotations

import statistics

NAMES = ("median", "min", "p90", "max")


def spread(values: list[float]) -> list[float]:
    """Median, minimum, 90th percentile and maximum; empty without values."""
    if not values:
        return []
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)]
    return [round(value, 4) for value in (statistics.median(ordered), ordered[0], p90, ordered[-1])]

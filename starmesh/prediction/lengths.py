"""Remaining lengths as a distribution over bins: what the ``starmesh`` network predicts.

Owns the bins and how a median and a quantile come out of their probabilities. A distribution gives both from one
output, never crossed, and a sequence that was cut says what it knows: that it would have got beyond its cut. (Bins
after TRAIL, arXiv 2410.01035, and TetriInfer, arXiv 2401.11181; geometric instead of equal is our choice, so that the
error of a bin is relative to what is predicted.)
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from starmesh.prediction.batch import Floats, Integers

_WHOLE_TOKENS: Final = 12  # bins of one token up to here, of 1.15 times the one before beyond
_RATIO: Final = 1.15


def bin_edges(longest_tokens: int) -> Integers:
    """[bins + 1]: bin i holds lengths from edge i to just below edge i + 1; the last holds ``longest_tokens``."""
    edges = [*range(_WHOLE_TOKENS + 1)]
    while edges[-1] <= longest_tokens:
        edges.append(max(edges[-1] + 1, round(edges[-1] * _RATIO)))
    return np.array(edges, dtype=np.int64)


def bin_of(tokens: Integers, edges: Integers) -> Integers:
    """The bin of each length; what is longer than the longest is in the last."""
    return np.minimum(np.searchsorted(edges, tokens, side="right") - 1, len(edges) - 2)


def quantiles(probabilities: npt.NDArray[np.floating], edges: Integers, levels: tuple[float, ...]) -> Floats:
    """[n, levels]: quantiles of n distributions [n, bins], linear within a bin, at least 0."""
    cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
    cumulative /= cumulative[:, -1:]
    rows = np.arange(len(cumulative))
    columns = []
    for level in levels:
        reached = np.argmax(cumulative >= level, axis=1)
        below = np.where(reached > 0, cumulative[rows, np.maximum(reached - 1, 0)], 0.0)
        within = (level - below) / np.maximum(cumulative[rows, reached] - below, 1e-12)
        # A bin of whole numbers covers from half a token below its first to half a token below the next bin's.
        columns.append(edges[reached] + within * (edges[reached + 1] - edges[reached]) - 0.5)
    result: Floats = np.maximum(np.stack(columns, axis=1), 0.0).astype(np.float32)
    return result

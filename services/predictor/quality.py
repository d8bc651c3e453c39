"""How well recent estimates did, by how far their sequences were.

Owns the rolling averages. Pure. Counts requests that the model itself ended: of one that was cut nobody knows what it
still had to generate. Within a part of their lives each estimate weighs the same, as in the recalibration.

A part of a life is known only afterwards, so the quantile is not meant to hold within each: requests that became long
are over-represented among those sampled early and far from their end, and their upper quantile is exceeded more often
in their first quarter than in their last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.predictor.outcomes import Outcome

PARTS: Final = 4
WINDOW_REQUESTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Quality:
    """Of estimates made from ``progress_from`` to ``progress_to`` of their sequences' output: how many, the mean
    absolute error of the median in tokens, and the part whose 0.9 quantile was not exceeded."""

    progress_from: float
    progress_to: float
    estimates: int
    mae_tokens: float
    coverage: float


class RollingQuality:
    """Over the last ``window`` requests that were scored."""

    def __init__(self, *, window: int = WINDOW_REQUESTS) -> None:
        # A row for each request: for each part how many estimates, the sum of their errors, how many were not exceeded.
        self._rows: deque[npt.NDArray[np.float64]] = deque()
        self._sums = np.zeros((PARTS, 3))
        self._window = window
        self.qualities: tuple[Quality, ...] = ()
        """One for each part in which there is an estimate, in order; replaced as a whole, so any thread may read it."""

    def __len__(self) -> int:
        return len(self._rows)

    def observe(self, outcome: Outcome) -> None:
        """Score a request; one without estimates, or cut, or that ended with nothing, is left out."""
        if not outcome.finished or not len(outcome.positions) or not outcome.output_tokens:
            return
        remaining = outcome.output_tokens - outcome.positions
        parts = np.minimum(outcome.positions * PARTS // outcome.output_tokens, PARTS - 1)
        errors = np.abs(outcome.answered[:, 0] - remaining)
        covered = outcome.answered[:, 1] >= remaining
        columns = (np.bincount(parts, weights=each, minlength=PARTS) for each in (np.ones(len(parts)), errors, covered))
        row = np.stack(list(columns), axis=1).astype(np.float64)
        self._rows.append(row)
        self._sums += row
        if len(self._rows) > self._window:
            self._sums -= self._rows.popleft()
        self.qualities = tuple(
            Quality(part / PARTS, (part + 1) / PARTS, round(estimates), error / estimates, inside / estimates)
            for part, (estimates, error, inside) in enumerate(self._sums.tolist())
            if estimates > 0
        )

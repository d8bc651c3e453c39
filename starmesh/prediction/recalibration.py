"""Corrects predicted quantiles online, so that they hold for the traffic that there is.

Owns the correction of the median and of the 0.9 quantile, learned from requests that have ended. Owns no prediction: it
is given what a predictor said, before any correction, and what came of it.

The method is split conformal prediction of quantiles (Romano, Patterson and Candes, NeurIPS 2019) with two changes.
The score is a ratio, (remaining + 1) / (predicted + 1), and not a difference: what is wrong with a predicted length is
wrong in proportion to it. And a request gives as many scores as it had samples, which are not exchangeable with
another's, so each request's scores weigh one together (Dunn, Wasserman and Ramdas, JASA 118, 2023: pooled CDFs). The
0.9 quantile of the scores of n requests, taken at level 0.9 (n + 1) / n, is the factor for the 0.9 quantile; their
median that for the median. That promises coverage over requests like those of the window, in each bucket of tokens
generated (below); it follows a change of traffic as the window does.

Of a cut request a score is only known to be exceeded; it counts by the product-limit estimate (``survival``).

Factors differ by how many tokens were generated, where enough requests got that far; elsewhere all samples' factors
serve, and before there are enough of any, nothing is changed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from starmesh.prediction.batch import UPPER_QUANTILE, Floats, Integers
from starmesh.prediction.survival import quantile

WINDOW_REQUESTS: Final = 500
"""Knows a 0.9 quantile to 1.3 points, and follows the traffic."""
MIN_REQUESTS: Final = 100
"""With fewer the 0.9 quantile would be known to no better than 3 points."""
BUCKET_EDGES: Final = (1, 64, 256, 1024)
"""The first bucket is the prompt alone; later ones are wider as requests that get so far are rarer."""

_REQUEST_SAMPLES: Final = 16
_REFIT_REQUESTS: Final = 10
_UNCHANGED: Final = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class _Scored:
    """One request's scores, [n, 2], and the buckets of their samples, [n]."""

    buckets: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    finished: bool


class Recalibration:
    """Corrects one predictor, by the last ``window`` requests once ``min_requests`` have ended. Not for several threads
    at a time."""

    def __init__(self, *, window: int = WINDOW_REQUESTS, min_requests: int = MIN_REQUESTS) -> None:
        """Raises ValueError for a window that can never hold enough."""
        if not 1 <= min_requests <= window:
            raise ValueError(f"a window of {window} requests never holds {min_requests}")
        self._window: deque[_Scored] = deque(maxlen=window)
        self._min_requests = min_requests
        self._observed = 0
        self._fitted_at = 0
        self._factors = np.tile(np.array(_UNCHANGED), (len(BUCKET_EDGES) + 1, 1))

    def observe(self, output_tokens: Integers, predicted: Floats, *, total_output_tokens: int, finished: bool) -> None:
        """Learn of a request that has ended: what was predicted, [n, 2], when it had ``output_tokens``, [n], ascending.
        Of many samples some, evenly spread, are kept."""
        if not len(output_tokens):
            return
        kept = np.unique(np.linspace(0, len(output_tokens) - 1, _REQUEST_SAMPLES).round().astype(np.int64))
        remaining = np.maximum(total_output_tokens - output_tokens[kept], 0).astype(np.float64)
        scores = (remaining[:, None] + 1.0) / (predicted[kept].astype(np.float64) + 1.0)
        self._window.append(_Scored(_buckets(output_tokens[kept]), scores, finished))
        self._observed += 1

    def correct(self, output_tokens: Integers, predicted: Floats) -> Floats:
        """What a predictor said, [n, 2], of samples with ``output_tokens``, [n], corrected: at least 0, the second not
        below the first."""
        enough = self._observed >= self._min_requests
        if enough and (not self._fitted_at or self._observed - self._fitted_at >= _REFIT_REQUESTS):
            self._fit()
        factors = self._factors[_buckets(output_tokens)]
        corrected = np.maximum((predicted + 1.0) * factors - 1.0, 0.0)
        return np.maximum.accumulate(corrected, axis=1).astype(np.float32)

    def _fit(self) -> None:
        counts = [len(scored.scores) for scored in self._window]
        request = np.repeat(np.arange(len(counts)), counts)
        buckets = np.concatenate([scored.buckets for scored in self._window])
        scores = np.concatenate([scored.scores for scored in self._window])
        finished = np.repeat([scored.finished for scored in self._window], counts)
        # Cut requests alone tell no quantile.
        overall = _factors(request, scores, finished) if finished.any() else _UNCHANGED
        for bucket in range(len(self._factors)):
            rows = buckets == bucket
            enough = len(np.unique(request[rows & finished])) >= self._min_requests
            self._factors[bucket] = _factors(request[rows], scores[rows], finished[rows]) if enough else overall
        self._fitted_at = self._observed


def _factors(
    request: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], finished: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    _, which, counts = np.unique(request, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[which]
    upper_level = min(1.0, UPPER_QUANTILE * (len(counts) + 1) / len(counts))
    return quantile(scores[:, 0], finished, weights, 0.5), quantile(scores[:, 1], finished, weights, upper_level)


def _buckets(output_tokens: Integers) -> npt.NDArray[np.int64]:
    return np.searchsorted(np.array(BUCKET_EDGES), output_tokens, side="right")

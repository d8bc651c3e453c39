"""Corrects predicted quantiles online, so that they hold for the traffic that there is.

Owns the correction of the median and of the 0.9 quantile, learned from requests that have ended. Owns no prediction: it
is given what a predictor said, before any correction, and what came of it.

The method is split conformal prediction of quantiles (Romano, Patterson and Candes, NeurIPS 2019) with two changes.
The score is a ratio, (remaining + 1) / (predicted + 1), and not a difference: what is wrong with a predicted length is
wrong in proportion to it. And a request gives as many scores as it had samples. Every sample weighs the same, since
what is to hold is the part of the sequences running at a moment that stay within their quantiles, and a long request
runs at more moments. (Were it each request that weighs the same, those that end soon after they reach a bucket would
outweigh those that stay, and quantiles that are right at every position would be lowered.) The 0.9 quantile of the
scores of n requests, taken at level 0.9 (n + 1) / n, is the factor for the 0.9 quantile; their median that for the
median. Samples of one request resemble each other, so the coverage is about right in each bucket of tokens generated
(below), and no promise; it follows a change of traffic as the window does.

Of a cut request a score is only known to be exceeded; it counts by the product-limit estimate (``survival``). Where so
many are cut that a quantile is not known, nothing is changed.

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

_BUCKET_SAMPLES: Final = 8
"""Kept of one request's in each bucket; enough, as they resemble each other."""
_REFIT_REQUESTS: Final = 10


@dataclass(frozen=True, slots=True)
class _Scored:
    """One request's scores, [n, 2], the buckets of their samples, [n], and how many samples each stands for, [n]."""

    buckets: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
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
        self._factors = np.ones((len(BUCKET_EDGES) + 1, 2))

    def observe(self, output_tokens: Integers, predicted: Floats, *, total_output_tokens: int, finished: bool) -> None:
        """Learn of a request that has ended: what was predicted, [n, 2], when it had ``output_tokens``, [n], ascending.
        Of many samples in a bucket some, evenly spread, are kept."""
        if not len(output_tokens):
            return
        buckets = _buckets(output_tokens)
        kept, weights = _spread(buckets)
        remaining = np.maximum(total_output_tokens - output_tokens[kept], 0).astype(np.float64)
        scores = (remaining[:, None] + 1.0) / (predicted[kept].astype(np.float64) + 1.0)
        self._window.append(_Scored(buckets[kept], scores, weights, finished))
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
        weights = np.concatenate([scored.weights for scored in self._window])
        finished = np.repeat([scored.finished for scored in self._window], counts)
        overall = _factors(scores, finished, weights, len(counts))
        for bucket in range(len(self._factors)):
            rows = buckets == bucket
            enough = len(np.unique(request[rows & finished])) >= self._min_requests
            requests = len(np.unique(request[rows]))
            self._factors[bucket] = (
                _factors(scores[rows], finished[rows], weights[rows], requests) if enough else overall
            )
        self._fitted_at = self._observed


def _factors(
    scores: npt.NDArray[np.float64], finished: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64], requests: int
) -> tuple[float, float]:
    upper_level = min(1.0, UPPER_QUANTILE * (requests + 1) / requests)
    return _factor(scores[:, 0], finished, weights, 0.5), _factor(scores[:, 1], finished, weights, upper_level)


def _factor(
    scores: npt.NDArray[np.float64], finished: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64], level: float
) -> float:
    found = quantile(scores, finished, weights, level)
    return found if np.isfinite(found) else 1.0


def _spread(buckets: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows, evenly spread within each bucket, and how many each stands for."""
    rows, weights = [], []
    for bucket in np.unique(buckets):
        there = np.flatnonzero(buckets == bucket)
        some = np.unique(np.linspace(0, len(there) - 1, _BUCKET_SAMPLES).round().astype(np.int64))
        rows.append(there[some])
        weights.append(np.full(len(some), len(there) / len(some)))
    return np.concatenate(rows), np.concatenate(weights)


def _buckets(output_tokens: Integers) -> npt.NDArray[np.int64]:
    return np.searchsorted(np.array(BUCKET_EDGES), output_tokens, side="right")

"""How good predictions are: errors and coverage on held-out samples, with confidence intervals over requests.

Owns the measures. A request's samples resemble each other, so intervals come from resampling whole requests (the
cluster bootstrap), and models are compared on the same resamples. Owns no model and no plot.

What is scored is what a cluster goes by: a prediction is bounded by what the request may still generate, and counts
against the tokens that it went on to generate. So a request that was cut counts like any other: there the truth is the
cut. ``finished_only`` leaves those out; it favours models that never learned of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from starmesh.prediction.batch import Floats, Integers
from starmesh.prediction.dataset import Dataset

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
PROGRESS_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
REMAINING_EDGES = (0, 20, 50, 100, 200, 400, 1 << 31)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % confidence interval over requests; NaN where no sample is."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True)
class Scores:
    """One model on the held-out samples. ``by_remaining`` follows ``REMAINING_EDGES`` of what really remained,
    ``by_progress`` ``PROGRESS_EDGES`` of the request's output; ``coverage`` is the part of samples whose 0.9 quantile
    was not exceeded, ``below_median`` the part at or below the median."""

    samples: int
    mae: Estimate
    mae_finished: Estimate
    coverage: Estimate
    below_median: Estimate
    by_remaining: tuple[Estimate, ...]
    by_progress: tuple[Estimate, ...]
    coverage_by_progress: tuple[Estimate, ...]


class HeldOut:
    """Held-out samples ``rows`` of a dataset; scores any number of models on the same resamples.

    ``limit_tokens`` is what each request might generate at most: the cap of the collection.
    """

    def __init__(self, dataset: Dataset, rows: Integers, *, limit_tokens: int, seed: int = 0) -> None:
        self.truth = dataset.remaining_tokens[rows]
        self.finished = dataset.finished[rows]
        self._room = (limit_tokens - dataset.output_tokens[rows]).clip(min=0)
        self.progress = dataset.output_tokens[rows] / np.maximum(dataset.output_tokens[rows] + self.truth, 1)
        names, self._request = np.unique(dataset.sequence[rows], return_inverse=True)
        draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
        # How often each request is drawn: [resamples, requests].
        self._weights = np.stack([np.bincount(draw, minlength=len(names)) for draw in draws]).astype(np.float64)

    def bounded(self, predictions: Floats) -> Floats:
        """Predictions [n, 2] within what each request may still generate."""
        bounded: Floats = np.minimum(predictions, self._room[:, None]).astype(np.float32)
        return bounded

    def errors(self, predictions: Floats) -> npt.NDArray[np.float64]:
        """Absolute error of the median of each sample."""
        return np.abs(self.bounded(predictions)[:, 0].astype(np.float64) - self.truth)

    def mean(self, values: npt.NDArray[np.floating], where: npt.NDArray[np.bool_] | None = None) -> Estimate:
        """The mean of a figure over the samples, or some of them."""
        sums, counts = self._by_request(values, where)
        if not counts.sum():
            return Estimate(np.nan, np.nan, np.nan)
        resampled = self._resampled(sums, counts)
        return Estimate(float(sums.sum() / counts.sum()), *map(float, np.nanpercentile(resampled, INTERVAL)))

    def ratio(self, predictions: Floats, reference: Floats, where: npt.NDArray[np.bool_] | None = None) -> Estimate:
        """MAE over a reference's MAE, on the same resamples: below 1 is better than the reference."""
        ours, counts = self._by_request(self.errors(predictions), where)
        theirs, _ = self._by_request(self.errors(reference), where)
        resampled = self._resampled(ours, counts) / self._resampled(theirs, counts)
        return Estimate(float(ours.sum() / theirs.sum()), *map(float, np.nanpercentile(resampled, INTERVAL)))

    def scores(self, predictions: Floats) -> Scores:
        """Everything about one model's predictions [n, 2]."""
        errors = self.errors(predictions)
        bounded = self.bounded(predictions)
        # Tokens are whole: a quantile of 10.2 promises 11 at most.
        covered = (self.truth <= np.ceil(bounded[:, 1])).astype(np.float64)
        quarters = [(self.progress >= low) & (self.progress < high) for low, high in itertools.pairwise(PROGRESS_EDGES)]
        return Scores(
            samples=len(errors),
            mae=self.mean(errors),
            mae_finished=self.mean(errors, self.finished),
            coverage=self.mean(covered),
            below_median=self.mean((self.truth <= bounded[:, 0]).astype(np.float64)),
            by_remaining=tuple(
                self.mean(errors, (self.truth >= low) & (self.truth < high))
                for low, high in itertools.pairwise(REMAINING_EDGES)
            ),
            by_progress=tuple(self.mean(errors, quarter) for quarter in quarters),
            coverage_by_progress=tuple(self.mean(covered, quarter) for quarter in quarters),
        )

    def _by_request(
        self, values: npt.NDArray[np.floating], where: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        chosen = np.ones(len(values)) if where is None else where.astype(np.float64)
        requests = self._weights.shape[1]
        sums = np.bincount(self._request, weights=values * chosen, minlength=requests).astype(np.float64)
        return sums, np.bincount(self._request, weights=chosen, minlength=requests).astype(np.float64)

    def _resampled(self, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            result: npt.NDArray[np.float64] = (self._weights @ sums) / (self._weights @ counts)
        return result

"""The reference predictor: what requests that got as far as this one still had to generate. Learns online.

Owns the estimate of the distribution of output lengths and its conditional quantiles. Looks at no hidden state, so it
takes samples of any model. Serves where no predictor is trained for the model, and is the reference that a trained one
has to beat.

A request that stopped says its length; one that was cut says that it would have exceeded it. Both count, by the
estimate of Susarla and Van Ryzin (JASA 71, 1976): the part of requests longer than t is

    S(t) = (a S0(t) + N(t)) / (a + n)  *  product over cut lengths c <= t of 1 + cut(c) / (a S0(c) + N(c))

with n requests, of which N(t) got beyond t and cut(c) were cut at c. S0 is a prior that weighs as much as ``a``
requests. Without it this is the product-limit estimate of Kaplan and Meier; with it the first request is
predicted too, and one that has outgrown all that are known.

The prior is log-logistic, S0(t) = 1 / (1 + (t / m)^b): of a heavy tail, and both it and its inverse are closed forms.
m = 200 and b = 1.6 are our choice: they give quantiles 51, 101, 200, 397 and 789 at 0.1, 0.25, 0.5, 0.75 and 0.9, near
the 29, 87, 194, 362 and 512 (the cap) of 328 mixed prompts to the default model. It weighs as much as 8 requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from starmesh.prediction.batch import UPPER_QUANTILE, Floats, SampleBatch
from starmesh.prediction.survival import Numbers
from starmesh.types import HiddenLayout

PRIOR_MEDIAN_TOKENS: Final = 200.0
PRIOR_SHAPE: Final = 1.6
PRIOR_REQUESTS: Final = 8.0
WINDOW_REQUESTS: Final = 2000
"""Enough that the 0.9 quantile is known to a few per cent, few enough to follow the traffic of the last hours."""

_LEVELS: Final = np.array([0.5, UPPER_QUANTILE])
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class _Lengths:
    """S between the known lengths. Interval i goes from ``points[i - 1]`` to just before ``points[i]``; there S(t) is
    (prior S0(t) + exceeding[i]) * scale[i]. ``survival[i]`` is S at ``points[i]``."""

    points: Numbers
    exceeding: Numbers
    scale: Numbers
    survival: Numbers
    prior: float

    @classmethod
    def of(cls, lengths: Numbers, finished: Numbers, prior: float) -> _Lengths:
        points, where = np.unique(lengths, return_inverse=True)
        here = np.bincount(where, minlength=len(points)).astype(np.float64)
        cut = np.bincount(where, weights=1.0 - finished, minlength=len(points))
        exceeding = len(lengths) - np.append(0.0, np.cumsum(here))
        prior_part = prior * _prior_survival(points)
        # What was cut at c is handed on to all that got beyond it.
        corrections = np.cumprod(1.0 + cut / (prior_part + exceeding[1:]))
        scale = np.append(1.0, corrections) / (prior + len(lengths))
        survival = (prior_part + exceeding[1:]) * scale[1:]
        return cls(points, exceeding, scale, survival, prior)

    def at(self, tokens: Numbers) -> Numbers:
        """S(t)."""
        interval = np.searchsorted(self.points, tokens, side="right")
        return (self.prior * _prior_survival(tokens) + self.exceeding[interval]) * self.scale[interval]

    def inverse(self, targets: Numbers) -> Numbers:
        """The smallest whole t with S(t) <= target, for targets above 0."""
        reached = np.searchsorted(-self.survival, -targets * (1.0 + _ROUNDING))
        # S falls to the target at a known length, or already in the interval before it, where only the prior falls.
        prior_part = (targets / self.scale[reached] - self.exceeding[reached]) / self.prior
        with np.errstate(divide="ignore"):
            between = _prior_inverse(np.maximum(prior_part, 0.0))
        lengths = np.minimum(np.ceil(between - _ROUNDING), np.append(self.points, np.inf)[reached])
        return np.asarray(lengths, dtype=np.float64)


class ConditionalMedian:
    """Predicts the median and the 0.9 quantile of the tokens to come, given that a request goes on after as many as it
    has. Learns from the last ``window`` requests. Not for several threads at a time."""

    def __init__(self, *, window: int = WINDOW_REQUESTS, prior_requests: float = PRIOR_REQUESTS) -> None:
        """Raises ValueError for a window or prior that holds nothing."""
        if window < 1 or not prior_requests > 0:
            raise ValueError(f"a window of {window} requests and a prior of {prior_requests} leave nothing to go by")
        self._window: deque[tuple[int, bool]] = deque(maxlen=window)
        self._prior_requests = prior_requests
        self._lengths: _Lengths | None = None

    @property
    def kind(self) -> str:
        """Its name in the registry."""
        return "conditional_median"

    @property
    def layout(self) -> HiddenLayout | None:
        """None: it takes any samples."""
        return None

    @property
    def parameters(self) -> int:
        """The lengths it goes by."""
        return len(self._window)

    def observe(self, output_tokens: int, *, finished: bool) -> None:
        """Learn of a request that has ended with ``output_tokens``; not ``finished``: it was cut there. Raises
        ValueError for a negative count."""
        if output_tokens < 0:
            raise ValueError(f"a request cannot have {output_tokens} tokens")
        self._window.append((output_tokens, finished))
        self._lengths = None

    def fit(self, lengths: Iterable[int], finished: Iterable[bool]) -> None:
        """Learn of many requests at once, oldest first: what the reference of a report is made by."""
        for output_tokens, whole in zip(lengths, finished, strict=True):
            self.observe(output_tokens, finished=whole)

    def predict(self, batch: SampleBatch) -> Floats:
        """[n, 2], whole numbers, at least 1: a request that is sampled goes on."""
        return self.remaining(batch.output_tokens.astype(np.float64))

    def remaining(self, output_tokens: Numbers) -> Floats:
        """The same for counts of tokens generated so far, [n]."""
        if self._lengths is None:
            lengths = np.array([length for length, _ in self._window], dtype=np.float64)
            finished = np.array([whole for _, whole in self._window], dtype=np.float64)
            self._lengths = _Lengths.of(lengths, finished, self._prior_requests)
        left = self._lengths.at(output_tokens)
        quantiles = [self._lengths.inverse(left * (1.0 - level)) - output_tokens for level in _LEVELS]
        return np.maximum(np.stack(quantiles, axis=1), 1.0).astype(np.float32)


def _prior_survival(tokens: Numbers) -> Numbers:
    return np.asarray(1.0 / (1.0 + (tokens / PRIOR_MEDIAN_TOKENS) ** PRIOR_SHAPE))


def _prior_inverse(survival: Numbers) -> Numbers:
    """Infinite for 0."""
    return np.asarray(PRIOR_MEDIAN_TOKENS * (1.0 / survival - 1.0) ** (1.0 / PRIOR_SHAPE))

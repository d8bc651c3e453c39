"""What the service does with a call: predicts, remembers, learns from ends, collects.

Owns the order of these. Owns no wire (``servicer``), no forward (``batcher``) and no choice of version (``registry``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.predictor.batcher import Batcher
from services.predictor.collector import Collector
from services.predictor.intake import End, Samples
from services.predictor.metrics import PredictorMetrics
from services.predictor.outcomes import Outcome, Outcomes
from services.predictor.quality import Quality, RollingQuality
from services.predictor.registry import Registry, Version
from starmesh.types import RemainingEstimate

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 10.0
"""How long a call waits whose own deadline is later, or that has none."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The estimates of a call's samples, by row, ascending; rows that were dropped are missing. ``traceparent`` is the
    trace context of the forward that made the last of them."""

    estimates: dict[int, RemainingEstimate]
    version: str
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """What ``GetPredictor`` tells."""

    version: Version
    versions: list[str]
    predictions: int
    dropped_samples: int
    latency_s: float
    ended_sequences: int
    qualities: tuple[Quality, ...]
    collected_samples: int
    collected_bytes: int


class PredictorService:
    """Made in a running event loop. ``collector`` is None where nothing is collected."""

    def __init__(
        self, registry: Registry, metrics: PredictorMetrics, *, queue_samples: int, collector: Collector | None = None
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._collector = collector
        self._outcomes = Outcomes()
        self._quality = RollingQuality()
        self._batcher = Batcher(capacity=queue_samples, metrics=metrics, learn=self._learn)
        metrics.watch(
            queue=lambda: len(self._batcher),
            version=lambda: (registry.active.name, registry.active.predictor.kind),
            qualities=lambda: self._quality.qualities,
            collected=lambda: self._collected,
        )

    async def predict(
        self, samples: Samples | None, ends: Sequence[End], *, timeout_s: float = MAX_WAIT_S
    ) -> Prediction:
        """Predict, and take note of ends, also when predicting fails or the caller has gone meanwhile. Raises
        StatusError when the samples do not fit the predictor, or it fails."""
        try:
            if samples is None:
                return Prediction({}, self._registry.active.name)
            version = await self._registry.settle(samples.layout)
            if self._collector is not None:
                self._collector.take(samples)
            answers = await self._batcher.predict(version, samples, timeout_s=min(timeout_s, MAX_WAIT_S))
            estimates = {}
            prompts, positions = samples.prompt_tokens.tolist(), samples.output_tokens.tolist()
            rows = zip(answers.rows.tolist(), answers.predicted.tolist(), answers.answered.tolist(), strict=True)
            for row, predicted, answered in rows:
                self._outcomes.note(
                    samples.request_ids[row],
                    version,
                    prompt_tokens=prompts[row],
                    position=positions[row],
                    predicted=predicted,
                    answered=answered,
                )
                estimates[row] = RemainingEstimate(positions[row], int(answered[0]), int(answered[1]))
            return Prediction(estimates, version.name, answers.traceparent)
        finally:
            # After the samples: they may be of the same sequences.
            for end in ends:
                self._end(end)

    async def promote(self, version: str) -> None:
        """Have another version answer. Raises StatusError when it cannot."""
        await self._registry.promote(version)
        # How well one did that no longer answers is of no interest.
        self._quality = RollingQuality()

    async def status(self) -> Status:
        """As of now."""
        samples, size = self._collected
        return Status(
            version=self._registry.active,
            versions=await self._registry.versions(),
            predictions=self._metrics.predictions,
            dropped_samples=self._metrics.dropped_samples,
            latency_s=self._metrics.latency_s,
            ended_sequences=len(self._quality),
            qualities=self._quality.qualities,
            collected_samples=samples,
            collected_bytes=size,
        )

    async def close(self) -> None:
        """End the forwards, and store what was collected."""
        await self._batcher.close()
        if self._collector is not None:
            await self._collector.close()

    @property
    def _collected(self) -> tuple[int, int]:
        return (self._collector.samples, self._collector.bytes) if self._collector is not None else (0, 0)

    def _end(self, end: End) -> None:
        if self._collector is not None:
            self._collector.end(end)
        outcome = self._outcomes.end(end)
        if outcome is None:
            return
        self._metrics.ended(finished=end.finished)
        if outcome.version is self._registry.active:
            self._quality.observe(outcome)
        self._batcher.learn(outcome)

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        """On the forward thread."""
        for outcome in outcomes:
            self._registry.median.observe(outcome.output_tokens, finished=outcome.finished)
            if outcome.version is not None and outcome.version.recalibration is not None:
                outcome.version.recalibration.observe(
                    outcome.positions,
                    outcome.predicted,
                    total_output_tokens=outcome.output_tokens,
                    finished=outcome.finished,
                )

"""What the service counts and measures, as metrics and for ``GetPredictor``.

Owns the instruments and the running totals. Owns neither what they are called (``starmesh.telemetry.registry``) nor
export (``starmesh.telemetry.metrics``). Gauges are read by the thread that answers a scrape: what they read is replaced
as a whole, never changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from opentelemetry.metrics import Meter

from services.predictor.quality import Quality
from starmesh.telemetry import instruments, names
from starmesh.telemetry.registry import predictor

_RECENT_CALLS: Final = 512


class PredictorMetrics:
    """Counts what happens; all methods on the event loop."""

    def __init__(self, meter: Meter) -> None:
        self.predictions = 0
        self.dropped_samples = 0
        self._latencies_s: deque[float] = deque(maxlen=_RECENT_CALLS)
        self._meter = meter
        self._predictions = instruments.counter(meter, predictor.PREDICTIONS)
        self._dropped = instruments.counter(meter, predictor.DROPPED_SAMPLES)
        self._ended = instruments.counter(meter, predictor.ENDED_REQUESTS)
        self._batch = instruments.histogram(meter, predictor.BATCH_SAMPLES)
        self._latency = instruments.histogram(meter, predictor.LATENCY)
        self._age = instruments.histogram(meter, predictor.SAMPLE_AGE)

    @property
    def latency_s(self) -> float:
        """The mean of recent calls, 0 before the first."""
        return sum(self._latencies_s) / len(self._latencies_s) if self._latencies_s else 0.0

    def answered(self, samples: int, latency_s: float) -> None:
        """A call was answered."""
        self.predictions += samples
        self._latencies_s.append(latency_s)
        self._predictions.add(samples)
        self._latency.record(latency_s)

    def dropped(self, samples: int, reason: str) -> None:
        """Samples were left out: "queue_full", "timeout", "caller_gone", "failed" or "not_a_number"."""
        if not samples:
            return
        self.dropped_samples += samples
        self._dropped.add(samples, {names.REASON: reason})

    def batch(self, samples: int, ages_s: Iterable[float]) -> None:
        """A forward begins, with samples of calls of these ages."""
        self._batch.record(samples)
        for age_s in ages_s:
            self._age.record(age_s)

    def ended(self, *, finished: bool) -> None:
        """A request has ended; ``finished``: by the model itself."""
        self._ended.add(1, {names.FINISHED: finished})

    def watch(
        self,
        *,
        queue: Callable[[], int],
        version: Callable[[], tuple[str, str]],
        qualities: Callable[[], tuple[Quality, ...]],
        collected: Callable[[], tuple[int, int]],
    ) -> None:
        """Show as gauges: the queue's length, name and kind of the version that answers, how well it does, and the
        samples and bytes collected."""
        meter = self._meter
        instruments.gauge(meter, predictor.QUEUED_SAMPLES, lambda: [(queue(), {})])
        instruments.gauge(
            meter, predictor.MAE, lambda: [(quality.mae_tokens, _progress(quality)) for quality in qualities()]
        )
        instruments.gauge(
            meter, predictor.COVERAGE, lambda: [(quality.coverage, _progress(quality)) for quality in qualities()]
        )
        instruments.gauge(
            meter,
            predictor.ACTIVE_VERSION,
            lambda: [(1, dict(zip((names.VERSION, names.KIND), version(), strict=True)))],
        )
        instruments.gauge(meter, predictor.COLLECTED_SAMPLES, lambda: [(collected()[0], {})])
        instruments.gauge(meter, predictor.COLLECTED_BYTES, lambda: [(collected()[1], {})])


def _progress(quality: Quality) -> dict[str, str]:
    return {names.PROGRESS: f"{quality.progress_from:g}-{quality.progress_to:g}"}

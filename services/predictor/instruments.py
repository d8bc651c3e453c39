"""What the service counts and measures, as metrics and for ``GetPredictor``.

Owns the instruments and the running totals. Owns neither names (``starmesh.telemetry.names``) nor export
(``starmesh.telemetry.metrics``). Gauges are read by the thread that answers a scrape: what they read is replaced as a
whole, never changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from services.predictor.quality import Quality
from starmesh.telemetry import names

_RECENT_CALLS: Final = 512
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Gauge = Callable[[], Iterable[Observation]]


class Instruments:
    """Counts what happens; all methods on the event loop."""

    def __init__(self, meter: Meter) -> None:
        self.predictions = 0
        self.dropped_samples = 0
        self._latencies_s: deque[float] = deque(maxlen=_RECENT_CALLS)
        self._meter = meter
        self._predictions = meter.create_counter(names.METRIC_PREDICTIONS, "{sample}", "Samples answered.")
        self._dropped = meter.create_counter(names.METRIC_DROPPED_SAMPLES, "{sample}", "Samples left unanswered.")
        self._ended = meter.create_counter(names.METRIC_ENDED_REQUESTS, "{request}", "Requests whose end was told.")
        self._batch = meter.create_histogram(
            names.METRIC_BATCH_SAMPLES, "{sample}", "Samples in a forward.", explicit_bucket_boundaries_advisory=_ROWS
        )
        self._latency = meter.create_histogram(
            names.METRIC_PREDICTION_LATENCY,
            "s",
            "From the arrival of a call to its answer.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._age = meter.create_histogram(
            names.METRIC_SAMPLE_AGE,
            "s",
            "From the arrival of a call to a forward with samples of it.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )

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
        self._gauge(names.METRIC_QUEUED_SAMPLES, "{sample}", "Samples that wait.", lambda: [Observation(queue())])
        self._gauge(
            names.METRIC_PREDICTION_MAE,
            "{token}",
            "Mean absolute error of the median, by the part of its output that a request had.",
            lambda: [Observation(quality.mae_tokens, _progress(quality)) for quality in qualities()],
        )
        self._gauge(
            names.METRIC_PREDICTION_COVERAGE,
            "1",
            "Part of the estimates whose 0.9 quantile was not exceeded, by the part of its output that a request had.",
            lambda: [Observation(quality.coverage, _progress(quality)) for quality in qualities()],
        )
        self._gauge(
            names.METRIC_ACTIVE_PREDICTOR,
            "",
            "1 for the version that answers.",
            lambda: [Observation(1, dict(zip((names.VERSION, names.KIND), version(), strict=True)))],
        )
        self._gauge(
            names.METRIC_COLLECTED_SAMPLES, "{sample}", "Samples stored.", lambda: [Observation(collected()[0])]
        )
        self._gauge(names.METRIC_COLLECTED_BYTES, "By", "Bytes stored.", lambda: [Observation(collected()[1])])

    def _gauge(self, name: str, unit: str, description: str, read: Gauge) -> None:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            return read()

        self._meter.create_observable_gauge(name, [observe], unit, description)


def _progress(quality: Quality) -> dict[str, str]:
    return {names.PROGRESS: f"{quality.progress_from:g}-{quality.progress_to:g}"}

"""What prefill and decode instances both measure: their load, and each step.

Owns the instruments. The load is read by the thread that answers a scrape, so ``load`` gives the last one whole; steps
are counted on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from starmesh.telemetry import instruments, names
from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.metrics import Metrics
from starmesh.telemetry.registry import instance
from starmesh.types import InstanceLoad, InstanceState


def watch_load(
    metrics: Metrics, *, load: Callable[[], InstanceLoad | None], state: Callable[[], InstanceState]
) -> None:
    """Show the last load, None before the first, and the state that the instance is in. Both are asked from any
    thread."""

    def of_load(read: Callable[[InstanceLoad], float]) -> instruments.Read:
        def read_last() -> Iterable[tuple[float, instruments.Attributes]]:
            last = load()
            return [] if last is None else [(read(last), {})]

        return read_last

    def sequences() -> Iterable[tuple[float, instruments.Attributes]]:
        last = load()
        if last is not None:
            yield last.running_sequences, {names.STATE: "running"}
            yield last.waiting_sequences, {names.STATE: "waiting"}

    meter = metrics.meter
    instruments.gauge(meter, instance.KV_TOTAL_BLOCKS, of_load(lambda last: last.total_blocks))
    instruments.gauge(meter, instance.KV_USED_BLOCKS, of_load(lambda last: last.total_blocks - last.free_blocks))
    instruments.gauge(meter, instance.SEQUENCES, sequences)
    instruments.gauge(meter, instance.RESIDENT_TOKENS, of_load(lambda last: last.resident_tokens))
    instruments.gauge(meter, instance.OUTPUT_TOKENS, of_load(lambda last: last.output_tokens))
    instruments.gauge(meter, instance.PREEMPTIONS, of_load(lambda last: last.preemptions))
    instruments.gauge(meter, instance.INSTANCE_STATE, lambda: [(1, {names.STATE: state().value})])


class StepMetrics:
    """Called after each step, on the engine's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._durations = BucketCounts(instance.STEP_DURATION.buckets)
        self._sequences = BucketCounts(instance.STEP_SEQUENCES.buckets)
        metrics.show(instance.STEP_DURATION, self._durations)
        metrics.show(instance.STEP_SEQUENCES, self._sequences)

    def __call__(self, duration_s: float, sequences: int) -> None:
        self._durations.add(duration_s)
        self._sequences.add(sequences)

"""Instruments made of rows of the registry, so that no name, unit or description is written twice.

A gauge, and a counter that is kept anyway, is read when the page is asked for, by one of the page's threads: what it
reads must be one value, or replaced as a whole and never changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation, UpDownCounter

from starmesh.telemetry.registry.metric import Kind, Metric

Attributes = Mapping[str, str | bool]
Read = Callable[[], Iterable[tuple[float, Attributes]]]
"""Values and the attributes of each; none where there is nothing to show yet."""


def counter(meter: Meter, row: Metric) -> Counter:
    """A counter; without attributes it is shown from the start, as 0, so that its first increase is one."""
    _check(row, Kind.COUNTER)
    made = meter.create_counter(row.name, row.unit, row.description)
    if not row.attributes:
        made.add(0)
    return made


def up_down_counter(meter: Meter, row: Metric) -> UpDownCounter:
    """A count of what is under way, shown from the start."""
    _check(row, Kind.UP_DOWN_COUNTER)
    made = meter.create_up_down_counter(row.name, row.unit, row.description)
    made.add(0)
    return made


def histogram(meter: Meter, row: Metric) -> Histogram:
    """A histogram with the row's buckets."""
    _check(row, Kind.HISTOGRAM)
    return meter.create_histogram(
        row.name, row.unit, row.description, explicit_bucket_boundaries_advisory=list(row.buckets)
    )


def gauge(meter: Meter, row: Metric, read: Read) -> None:
    """A gauge, or a running total, that ``read`` tells; see above."""
    _check(row, Kind.GAUGE, Kind.OBSERVED_COUNTER)

    def observe(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, attributes) for value, attributes in read()]

    create = meter.create_observable_gauge if row.kind is Kind.GAUGE else meter.create_observable_counter
    create(row.name, [observe], row.unit, row.description)


def _check(row: Metric, *kinds: Kind) -> None:
    if row.kind not in kinds:
        raise ValueError(f"{row.name} is a {row.kind.value}")

"""A row of the registry: one metric, as the instruments, the docs, the dashboards and the tests read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from starmesh.types import Role

WAITS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
)
"""Bounds for what may take a millisecond or minutes: three a decade."""

GAPS_S: Final = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
"""Bounds for times between tokens: six a decade where SLOs lie, so that a quantile is told to a fifth or so."""

CALLS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Bounds for calls that never take long."""

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS: Final = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
ROUNDS: Final = (0, 1, 2, 3, 4, 6, 8)

ENGINES: Final = (Role.PREFILL, Role.DECODE)

_UNITS: Final = {"s": "seconds", "By": "bytes", "1": ""}
_ANNOTATION: Final = re.compile(r"\{\w+\}")


class Kind(Enum):
    """How a metric is recorded."""

    COUNTER = "counter"
    """Added to as things happen."""
    OBSERVED_COUNTER = "observed counter"
    """A running total that is kept anyway, read when the page is asked for."""
    UP_DOWN_COUNTER = "up-down counter"
    """Added to and subtracted from as things begin and end."""
    GAUGE = "gauge"
    """Read when the page is asked for."""
    HISTOGRAM = "histogram"
    OBSERVED_HISTOGRAM = "observed histogram"
    """Counted by its owner (``starmesh.telemetry.bucket_counts``), read when the page is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """``unit`` as UCUM has it, where an annotation in braces, as in {token}, has no unit. ``roles`` show it.
    ``attributes`` are those of all its points, whose values are few and known: never a request's id. ``buckets`` are
    upper bounds, in ``unit``."""

    name: str
    kind: Kind
    unit: str
    description: str
    roles: tuple[Role, ...]
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.buckets) != (self.kind in (Kind.HISTOGRAM, Kind.OBSERVED_HISTOGRAM)):
            raise ValueError(f"{self.name}: a histogram has buckets, and nothing else has")
        if self.unit not in _UNITS and not _ANNOTATION.fullmatch(self.unit):
            raise ValueError(f"{self.name}: unit {self.unit!r}; use s, By, 1 or an annotation as {{token}}")

    @property
    def prometheus_type(self) -> str:
        """counter, gauge or histogram."""
        match self.kind:
            case Kind.COUNTER | Kind.OBSERVED_COUNTER:
                return "counter"
            case Kind.UP_DOWN_COUNTER | Kind.GAUGE:
                return "gauge"
            case Kind.HISTOGRAM | Kind.OBSERVED_HISTOGRAM:
                return "histogram"

    @property
    def prometheus_name(self) -> str:
        """Its name on the page: dots are underscores, the unit comes last, and ``_total`` after it for a counter. A
        histogram is shown as three series, ``_bucket``, ``_sum`` and ``_count``."""
        name = self.name.replace(".", "_")
        unit = _UNITS.get(self.unit, "")
        if unit and not name.endswith(f"_{unit}"):
            name = f"{name}_{unit}"
        return f"{name}_total" if self.prometheus_type == "counter" else name

    @property
    def series(self) -> tuple[str, ...]:
        """The names that PromQL knows it by."""
        if self.prometheus_type == "histogram":
            return tuple(f"{self.prometheus_name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.prometheus_name,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The attributes as Prometheus has them."""
        return tuple(attribute.replace(".", "_") for attribute in self.attributes)

"""The span of one forward: a trace of its own, for it serves many requests, linked to theirs.

Owns how many it is linked to. A forward that serves no sampled request has no span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from opentelemetry.context import Context

from services.predictor.intake import Samples
from services.predictor.registry import Version
from starmesh.telemetry import names
from starmesh.telemetry.setup import link_to, span, traceparent_of

MAX_LINKS: Final = 128
"""OpenTelemetry's own default bound. A forward has at most twice as many samples."""
_SAMPLED: Final = frozenset("13579bdf")
"""How the flags of a sampled trace context end: parsing those that are not sampled would cost as much."""


@contextmanager
def forward_span(version: Version | None, parts: Sequence[tuple[Samples, Sequence[int]]]) -> Iterator[str]:
    """The forward of ``version`` within the context, over these rows of these calls. Yields its trace context; empty
    where it has none."""
    sampled = _sampled(parts)
    if version is None or not sampled:
        yield ""
        return
    attributes: dict[str, str | int] = {
        names.VERSION: version.name,
        names.SAMPLES: sum(len(rows) for _, rows in parts),
        names.REQUESTS: len({samples.request_ids[row] for samples, rows in parts for row in rows}),
    }
    with span(names.SPAN_PREDICT, Context(), attributes=attributes) as current:
        for traceparent in sampled[:MAX_LINKS]:
            link_to(current, traceparent)
        yield traceparent_of(current)


def _sampled(parts: Sequence[tuple[Samples, Sequence[int]]]) -> list[str]:
    """The trace contexts of the samples that are sampled, each once, in the order of the samples."""
    sent = dict.fromkeys(samples.traceparents[row] for samples, rows in parts for row in rows)
    return [traceparent for traceparent in sent if traceparent[-1:] in _SAMPLED]

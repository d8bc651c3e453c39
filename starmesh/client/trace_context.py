"""The caller's trace, for the router to go on with: W3C's trace context as metadata of a call.

Owns no span. Needs OpenTelemetry's API alone: whose SDK makes the caller's spans, if any does, is the caller's choice.
"""

from __future__ import annotations

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What names the current span; empty without one."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return tuple(carrier.items())

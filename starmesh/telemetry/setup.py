"""Turns tracing and logging on, by the standard ``OTEL_*`` variables. Without an exporter named, tracing costs
nothing: no provider is installed and every span is a no-op."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


class TelemetryConfigError(Exception):
    """An OTEL_* variable asks for what is not there."""


def setup_logging(service: str, level: str) -> None:
    """Log lines to stderr, with the service's name. No handler logs prompts or tokens."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s",
        force=True,
    )


def setup_tracing(service: str, instance_id: str) -> Callable[[], None]:
    """Install the exporter that OTEL_TRACES_EXPORTER names ("otlp", "console", "none"; "otlp" when only
    OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set). Returns the function that flushes and
    ends it. Raises TelemetryConfigError for another name."""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    name = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    exporter: SpanExporter
    if name == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return lambda: None
    if name == "otlp":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    elif name == "console":
        exporter = ConsoleSpanExporter(out=sys.stderr)
    else:
        raise TelemetryConfigError(f"OTEL_TRACES_EXPORTER={name!r}: use otlp, console or none")
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over ours, as the standard says.
    ours = Resource({"service.name": f"starmesh-{service}", "service.instance.id": instance_id})
    provider = TracerProvider(
        resource=ours.merge(Resource.create()) if _names_service() else Resource.create().merge(ours)
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _names_service() -> bool:
    return "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")


def tracer() -> trace.Tracer:
    """The tracer of this process."""
    return trace.get_tracer("starmesh")


def current_traceparent() -> str:
    """The W3C trace context of the current span, empty without one."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def traceparent_of(span: trace.Span) -> str:
    """The W3C trace context of ``span``, empty where tracing is off."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def links_to(traceparent: str) -> list[trace.Link]:
    """A link to the span that a message named, for work that belongs to another trace; none for a malformed one."""
    linked = trace.get_current_span(context_of(traceparent)).get_span_context() if traceparent else None
    return [trace.Link(linked)] if linked is not None and linked.is_valid else []


def context_of(traceparent: str) -> context.Context:
    """The context that a message carried, to start spans under; a malformed one starts a new trace."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})


def context_of_call(metadata: Iterable[tuple[str, str | bytes]] | None) -> context.Context:
    """The same from a call's metadata."""
    return context_of(str(dict(metadata or ()).get("traceparent", "")))

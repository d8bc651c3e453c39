"""Turns tracing and logging on, by the standard ``OTEL_*`` variables. Without an exporter named, tracing costs
nothing: no provider is installed and every span is a no-op."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

from opentelemetry import context, trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from starmesh.telemetry import names

_END_S = 3.0
_PROPAGATOR = TraceContextTextMapPropagator()
# Asking the provider each time would cost as much as a span. Until there is one this stands for it, and does nothing.
_TRACER = trace.get_tracer("starmesh")


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
    provider = make_provider(service, instance_id, exporter)
    trace.set_tracer_provider(provider)
    return lambda: _end(provider)


def _end(provider: TracerProvider) -> None:
    """Flush and end; a collector that does not answer holds nothing up for long. (The exporter would try for 10 s.)"""
    ending = threading.Thread(target=provider.shutdown, name="tracing ends", daemon=True)
    ending.start()
    ending.join(_END_S)


def make_provider(service: str, instance_id: str, exporter: SpanExporter) -> TracerProvider:
    """A provider that samples by OTEL_TRACES_SAMPLER, limits spans by OTEL_SPAN_*, sends to ``exporter`` in batches by
    OTEL_BSP_*, and names the process by OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which win over what we say."""
    ours = Resource({"service.name": f"starmesh-{service}", "service.instance.id": instance_id})
    resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # ended by whoever has set it up
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def tracer() -> trace.Tracer:
    """The tracer of this process."""
    return _TRACER


@contextmanager
def span(
    name: str,
    parent: context.Context | None = None,
    *,
    kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    attributes: Mapping[str, str | int | float] | None = None,
    links: list[trace.Link] | None = None,
) -> Iterator[trace.Span]:
    """The current span within the context, below ``parent`` or whatever is current. An error that leaves it is noted
    by its class and no more: its message may repeat what a client sent."""
    with tracer().start_as_current_span(
        name,
        parent,
        kind=kind,
        attributes=attributes,
        links=links,
        record_exception=False,
        set_status_on_exception=False,
    ) as opened:
        try:
            yield opened
        except Exception as error:
            note_failure(opened, _class_of(error))
            raise


def note_failure(failed: trace.Span, error_type: str) -> None:
    """What a span stands for has failed; ``error_type`` is one of few: a status code or the name of an exception."""
    failed.set_attribute(names.ERROR_TYPE, error_type)
    failed.set_status(trace.Status(trace.StatusCode.ERROR, error_type))


def _class_of(error: Exception) -> str:
    code = getattr(error, "code", None)
    return code.name if isinstance(code, Enum) else type(error).__qualname__


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
    """A link to the span that a message named, for work that belongs to another trace; none for a malformed one, and
    none to a trace that is not sampled: nobody could follow it."""
    linked = trace.get_current_span(context_of(traceparent)).get_span_context() if traceparent else None
    return [trace.Link(linked)] if linked is not None and linked.is_valid and linked.trace_flags.sampled else []


def link_to(span: trace.Span, traceparent: str) -> None:
    """Link a span that has begun to the one that a message named; nothing for a malformed one."""
    if span.is_recording():
        for link in links_to(traceparent):
            span.add_link(link.context)


def address_attributes(address: str) -> dict[str, str | int]:
    """What a call to ``address``, HOST:PORT, goes to."""
    host, _, port = address.rpartition(":")
    return {names.SERVER_ADDRESS: host, names.SERVER_PORT: int(port)}


def context_of(traceparent: str) -> context.Context:
    """The context that a message carried, to start spans under; a malformed one starts a new trace."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})


def context_of_call(metadata: Iterable[tuple[str, str | bytes]] | None) -> context.Context:
    """The same from a call's metadata, or from the headers of an HTTP request, in lower case."""
    return context_of(str(dict(metadata or ()).get("traceparent", "")))

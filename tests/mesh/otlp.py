"""A real OTLP gRPC receiver that keeps the spans it is sent."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came. ``instance`` made it; ``linked`` are trace and span id of what it is linked to, and ``links``
    the trace ids alone; ``event_attributes`` goes with ``events``. Times are nanoseconds since 1970."""

    service: str
    instance: str
    name: str
    kind: int
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    attributes: dict[str, object]
    events: tuple[str, ...]
    event_attributes: tuple[dict[str, object], ...]
    event_times_ns: tuple[int, ...]
    links: tuple[bytes, ...]
    linked: tuple[tuple[bytes, bytes], ...]
    start_ns: int
    end_ns: int
    failed: bool


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a loopback port; ``traces`` has the spans by trace id, ``payloads`` all that came, as it came."""

    def __init__(self) -> None:
        self.traces: dict[bytes, list[ReceivedSpan]] = defaultdict(list)
        self.payloads: list[bytes] = []
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> Receiver:
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop(0)

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans."""
        return [span for spans in list(self.traces.values()) for span in spans]

    async def Export(self, request, context):  # noqa: N802
        self.payloads.append(request.SerializeToString())
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.traces[span.trace_id].append(
                        ReceivedSpan(
                            service=names["service.name"],
                            instance=names.get("service.instance.id", ""),
                            name=span.name,
                            kind=span.kind,
                            trace_id=span.trace_id,
                            span_id=span.span_id,
                            parent_id=span.parent_span_id,
                            attributes=_attributes(span.attributes),
                            events=tuple(event.name for event in span.events),
                            event_attributes=tuple(_attributes(event.attributes) for event in span.events),
                            event_times_ns=tuple(event.time_unix_nano for event in span.events),
                            links=tuple(link.trace_id for link in span.links),
                            linked=tuple((link.trace_id, link.span_id) for link in span.links),
                            start_ns=span.start_time_unix_nano,
                            end_ns=span.end_time_unix_nano,
                            failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                        )
                    )
        return trace_service_pb2.ExportTraceServiceResponse()


def _attributes(items) -> dict[str, object]:
    return {item.key: _value(item.value) for item in items}


def _value(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(value, kind) if kind is not None else None

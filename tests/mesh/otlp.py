"""A real OTLP gRPC receiver that keeps the spans it is sent."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came. ``links`` are the trace ids of what it is linked to."""

    service: str
    name: str
    span_id: bytes
    parent_id: bytes
    attributes: dict[str, object]
    events: tuple[str, ...]
    links: tuple[bytes, ...]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a loopback port; ``traces`` has the spans by trace id."""

    def __init__(self) -> None:
        self.traces: dict[bytes, list[ReceivedSpan]] = defaultdict(list)
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> Receiver:
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop(0)

    async def Export(self, request, context):  # noqa: N802
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.traces[span.trace_id].append(
                        ReceivedSpan(
                            service=names["service.name"],
                            name=span.name,
                            span_id=span.span_id,
                            parent_id=span.parent_span_id,
                            attributes={item.key: _value(item.value) for item in span.attributes},
                            events=tuple(event.name for event in span.events),
                            links=tuple(link.trace_id for link in span.links),
                        )
                    )
        return trace_service_pb2.ExportTraceServiceResponse()


def _value(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(value, kind) if kind is not None else None

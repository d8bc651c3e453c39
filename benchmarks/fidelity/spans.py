"""Receives the spans of the live processes: how long each part of a request's life took, and what became of moves.

Owns an OTLP endpoint on loopback, and keeps of each span its name, its times and its attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from starmesh.telemetry import names


@dataclass(frozen=True, slots=True)
class Span:
    """One span; seconds of the machine's wall clock, or since a moment."""

    name: str
    began_s: float
    ended_s: float
    attributes: dict[str, Any]

    @property
    def request_id(self) -> str:
        """Whose it is; empty where it is of no request."""
        return str(self.attributes.get(names.REQUEST_ID, ""))

    @property
    def duration_s(self) -> float:
        """How long it took."""
        return self.ended_s - self.began_s

    def since(self, moment_s: float) -> Span:
        """The same with times since ``moment_s``."""
        return replace(self, began_s=self.began_s - moment_s, ended_s=self.ended_s - moment_s)


class SpanReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens while it is entered; ``spans`` in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> SpanReceiver:
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop(0)

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += (
                    Span(
                        span.name,
                        span.start_time_unix_nano / 1e9,
                        span.end_time_unix_nano / 1e9,
                        {item.key: _value(item.value) for item in span.attributes},
                    )
                    for span in scope.spans
                )
        return trace_service_pb2.ExportTraceServiceResponse()


def _value(value: Any) -> Any:
    """A plain one as it is, a list or a map as text."""
    kind = value.WhichOneof("value")
    found = getattr(value, kind) if kind is not None else None
    return found if isinstance(found, (str, int, float, bool, type(None))) else str(found)

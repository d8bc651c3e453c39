"""The caller's span is the parent of what a router makes of its request, over however many routers it takes."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, Tracer

from starmesh.client import SyncClient
from starmesh.telemetry import names
from tests.client.conftest import PATIENT, Surroundings, check_pieces, read
from tests.router.conftest import TIMEOUT_S, Mesh, until


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What the routers of this process make, once it has ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("starmesh.telemetry.setup._TRACER", provider.get_tracer("routers"))
    return exporter


@pytest.fixture
def tracer() -> Tracer:
    """The calling program's own."""
    return TracerProvider().get_tracer("program")


def roots(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    """Those that stand for requests."""
    return [span for span in spans.get_finished_spans() if span.name == names.SPAN_GENERATE]


def check_parent(found: ReadableSpan, asking: Span) -> None:
    assert found.context is not None and found.parent is not None
    assert found.context.trace_id == asking.get_span_context().trace_id
    assert found.parent.span_id == asking.get_span_context().span_id


async def test_a_request_belongs_to_the_span_that_asks(
    mesh: Mesh, surroundings: Surroundings, spans: InMemorySpanExporter, tracer: Tracer
) -> None:
    await mesh.start()
    client = await surroundings.client()
    with tracer.start_as_current_span("ask") as asking:
        stream = client.generate("hello", max_output_tokens=20)
    await stream.whole()  # wherever it is read
    await mesh.nothing_left()
    (root,) = roots(spans)
    check_parent(root, asking)


async def test_without_a_span_the_router_begins_the_trace(
    mesh: Mesh, surroundings: Surroundings, spans: InMemorySpanExporter
) -> None:
    await mesh.start()
    await (await surroundings.client()).text("hello", max_output_tokens=20)
    await mesh.nothing_left()
    (root,) = roots(spans)
    assert root.parent is None


async def test_both_routers_of_a_request_are_of_one_trace(
    mesh: Mesh, surroundings: Surroundings, spans: InMemorySpanExporter, tracer: Tracer
) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    other = await surroundings.router()
    relays = [await surroundings.relay(), await surroundings.relay(other.address)]
    client = await surroundings.client(*(relay.address for relay in relays), resume_window_s=0.2)
    with tracer.start_as_current_span("ask") as asking:
        streams = [client.generate("hello", max_output_tokens=20) for _ in relays]
    pieces = [await read(stream, 5) for stream in streams]
    relays[0].refusing = True
    relays[0].cut()
    mesh.decodes[0].resume()
    for stream, begun in zip(streams, pieces, strict=True):
        check_pieces([*begun, *[piece async for piece in stream]], "hello", 20)
    await until(other.router.idle.is_set)
    await mesh.nothing_left()
    assert len(roots(spans)) == 3  # two that began, and one that went on
    for root in roots(spans):
        check_parent(root, asking)


async def test_a_threads_span_reaches_the_clients_loop(mesh: Mesh, spans: InMemorySpanExporter, tracer: Tracer) -> None:
    await mesh.start()

    def ask() -> Span:
        with (
            SyncClient(mesh.process.address, timeout_s=TIMEOUT_S, retries=PATIENT) as client,
            tracer.start_as_current_span("ask") as asking,
        ):
            client.generate("hello", max_output_tokens=20).whole()
        return asking

    asking = await asyncio.to_thread(ask)
    await mesh.nothing_left()
    (root,) = roots(spans)
    check_parent(root, asking)

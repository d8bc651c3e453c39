"""Real traffic makes every span, attribute, event and edge of the registry, and none besides."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from starmesh.telemetry import names
from starmesh.telemetry.spans import ANY_SUFFIX, ON_FAILURE, ROOT, SPANS, SpanRow
from tests.mesh.otlp import ReceivedSpan, Receiver
from tests.mesh.processes import Mesh, until
from tests.telemetry import traced_traffic
from tests.telemetry.tracing_page import PAGE, with_tables

ROWS = {row.name: row for row in SPANS}
KINDS = ("", "INTERNAL", "SERVER", "CLIENT")  # by OTLP's numbers


@pytest.mark.timeout(900)
async def test_every_span_is_as_registered(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tmp_path, environment) as mesh:
            await traced_traffic.start(mesh)
            for step in traced_traffic.STEPS:
                await step(mesh)
                await mesh.settled()
            for service in mesh.services.values():
                if service.process.returncode is None:
                    service.terminate()
            for service in mesh.services.values():
                await service.process.wait()
        await until(lambda: missing(receiver.spans) == set(), "every part", 10, lambda: str(missing(receiver.spans)))
        unregistered = {problem for span in receiver.spans for problem in problems(span)}
        assert not unregistered
        assert not unregistered_edges(receiver.spans)
        check_traces(receiver)
        secret = traced_traffic.SECRET.encode()
        assert not any(secret in payload for payload in receiver.payloads), "a prompt is in a span"
        for log in tmp_path.glob("*.log"):
            assert secret not in log.read_bytes(), f"a prompt is in {log.name}"


def test_the_page_has_the_registry() -> None:
    assert with_tables(PAGE.read_text()) == PAGE.read_text(), "run python -m tests.telemetry.tracing_page"


def problems(span: ReceivedSpan) -> list[str]:
    """What a span has that is not registered, or lacks."""
    row = ROWS.get(span.name)
    if row is None:
        return [f"{span.name} is not registered"]
    found = {_family(name, row) for name in span.attributes}
    allowed = {*row.always, *row.sometimes, *(ON_FAILURE if span.failed else ())}
    needed = {*row.always, *(ON_FAILURE if span.failed else ())}
    said = [f"{span.name} has {name}" for name in found - allowed]
    said += [f"{span.name} lacks {name}" for name in needed - found]
    for event, attributes in zip(span.events, span.event_attributes, strict=True):
        if set(attributes) != set(row.events.get(event, ("unregistered",))):
            said.append(f"{span.name} has the event {event} with {sorted(attributes)}")
    if span.service.removeprefix("starmesh-") not in row.services:
        said.append(f"{span.service} made {span.name}")
    if KINDS[span.kind] not in {kind.name for kind in row.kinds}:
        said.append(f"{span.name} is of kind {KINDS[span.kind]}")
    return said


def missing(spans: list[ReceivedSpan]) -> set[str]:
    """What is registered and was not made."""
    wanted, made = set[str](), set[str]()
    for row in SPANS:
        wanted |= {f"{row.name} by {service}" for service in row.services}
        wanted |= {f"{row.name}: {name}" for name in (*row.always, *row.sometimes)}
        wanted |= {f"{row.name}: event {event}" for event in row.events}
        wanted |= {f"{row.name} below {parent}" for parent in row.parents}
        wanted |= {f"{row.name} linked to {linked}" for linked in row.links}
    wanted |= {f"{name} of a failure" for name in ON_FAILURE}
    for span in spans:
        if span.name in ROWS:
            made.add(f"{span.name} by {span.service.removeprefix('starmesh-')}")
            made |= {f"{span.name}: {_family(name, ROWS[span.name])}" for name in span.attributes}
            made |= {f"{span.name}: event {event}" for event in span.events}
            made |= {f"{name} of a failure" for name in span.attributes if span.failed}
    return wanted - made - edges(spans)


def edges(spans: list[ReceivedSpan]) -> set[str]:
    """Who is below whom, and linked to whom."""
    by_id = {(span.trace_id, span.span_id): span.name for span in spans}
    found = set[str]()
    for span in spans:
        parent = by_id.get((span.trace_id, span.parent_id), "what never came") if span.parent_id else ROOT
        found.add(f"{span.name} below {parent}")
        found |= {f"{span.name} linked to {by_id.get(linked, 'what never came')}" for linked in span.linked}
    return found


def unregistered_edges(spans: list[ReceivedSpan]) -> set[str]:
    """Edges that the registry does not have."""
    known = {f"{row.name} below {parent}" for row in SPANS for parent in row.parents}
    known |= {f"{row.name} linked to {linked}" for row in SPANS for linked in row.links}
    return edges(spans) - known


def check_traces(receiver: Receiver) -> None:
    """Each request is one trace, a tree with one root, and no trace is of two requests."""
    homes: dict[object, set[bytes]] = defaultdict(set)
    for span in receiver.spans:
        # A command is in the trace of the round, or of the operator, that gave it.
        if span.name != names.SPAN_COMMAND and names.REQUEST_ID in span.attributes:
            homes[span.attributes[names.REQUEST_ID]].add(span.trace_id)
    assert {"text", "chat", "large-2", "left", "cancelled", "moved", "recovered", "drained", "long-0"} <= homes.keys()
    assert "hot" not in homes, "what is wrong with a refused request may be its id"
    assert all(len(traces) == 1 for traces in homes.values()), homes
    assert len({trace for traces in homes.values() for trace in traces}) == len(homes)
    assert [span.name for span in receiver.spans].count(names.SPAN_DRAIN) == 1, "asking again is no drain"
    for spans in receiver.traces.values():
        (root,) = [span for span in spans if not span.parent_id]
        assert root.name in {row.name for row in SPANS if ROOT in row.parents}


def _family(attribute: str, row: SpanRow) -> str:
    """The registered name of an attribute of a family."""
    for name in (*row.always, *row.sometimes):
        if name.endswith(ANY_SUFFIX) and attribute.startswith(name.removesuffix("*")):
            return name
    return attribute

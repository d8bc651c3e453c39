"""A forward of the predictor is a trace of its own, linked to the sampled requests that it serves, up to a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.predictor.forward_span import MAX_LINKS, forward_span
from services.predictor.intake import Samples
from services.predictor.registry import Version
from starmesh.telemetry import names, setup

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Sent:
    """The part of a call's samples that matters."""

    request_ids: tuple[str, ...]
    traceparents: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    name: str = "v1"


def sent(traceparents: Sequence[str]) -> Samples:
    ids = tuple(f"r{number}" for number in range(len(traceparents)))
    return cast(Samples, Sent(ids, tuple(traceparents)))


def traceparent(number: int, flags: str = "01") -> str:
    return f"00-{number + 1:032x}-{number + 1:016x}-{flags}"


def forwarded(
    monkeypatch: pytest.MonkeyPatch, parts: Sequence[tuple[Samples, Sequence[int]]]
) -> tuple[str, tuple[ReadableSpan, ...]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(setup, "_TRACER", provider.get_tracer("test"))
    with setup.span("something else"), forward_span(cast(Version, Named()), parts) as told:
        pass
    return told, tuple(span for span in exporter.get_finished_spans() if span.name == names.SPAN_PREDICT)


def test_it_is_linked_to_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = sent([traceparent(0), traceparent(1), traceparent(2, "00"), ""])
    second = sent([traceparent(1), traceparent(3)])
    told, (span,) = forwarded(monkeypatch, [(first, [0, 1, 2, 3]), (second, [0])])
    assert [link.context.span_id for link in span.links] == [1, 2], "row 1 of the second call is of another forward"
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" in told
    assert span.attributes == {names.VERSION: "v1", names.SAMPLES: 5, names.REQUESTS: 4}


def test_links_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = sent([traceparent(number) for number in range(256)])
    _, (span,) = forwarded(monkeypatch, [(many, range(256))])
    assert len(span.links) == MAX_LINKS
    assert span.dropped_links == 0
    assert (span.attributes or {})[names.REQUESTS] == 256


@pytest.mark.parametrize("traceparents", [[], ["", ""], [traceparent(0, "00")]])
def test_without_a_sampled_request_there_is_none(monkeypatch: pytest.MonkeyPatch, traceparents: list[str]) -> None:
    assert forwarded(monkeypatch, [(sent(traceparents), range(len(traceparents)))]) == ("", ())

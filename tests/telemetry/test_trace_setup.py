"""Tracing is set up by OpenTelemetry's standard variables, and what is sampled is decided once for a whole trace."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, server_attributes
from opentelemetry.trace import StatusCode

from starmesh.rpc.status import bad_field
from starmesh.telemetry import names, setup
from starmesh.telemetry.spans import ATTRIBUTES, ON_FAILURE, SPANS

pytestmark = pytest.mark.fast

CLIENT = "00-" + "7e57" * 8 + "-" + "ab" * 8
SAMPLED, UNSAMPLED = f"{CLIENT}-01", f"{CLIENT}-00"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OTEL_TRACES_SAMPLER",
        "OTEL_TRACES_SAMPLER_ARG",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_TRACES_EXPORTER",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)


class Batches(SpanExporter):
    """Remembers how large the batches were."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.sizes.append(len(spans))
        return SpanExportResult.SUCCESS


def trace(monkeypatch: pytest.MonkeyPatch, exporter: SpanExporter, service: str = "router") -> TracerProvider:
    """Trace this process as one of ``service``."""
    provider = setup.make_provider(service, "r0", exporter)
    monkeypatch.setattr(setup, "_TRACER", provider.get_tracer("test"))
    return provider


def made(monkeypatch: pytest.MonkeyPatch, traceparents: Sequence[str]) -> list[ReadableSpan]:
    """What a process sends that begins a span for each, with one below it."""
    exporter = InMemorySpanExporter()
    provider = trace(monkeypatch, exporter)
    for traceparent in traceparents:
        with setup.span("outer", setup.context_of(traceparent)), setup.span("inner"):
            pass
    provider.shutdown()
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize(
    ("sampler", "argument", "fresh", "sampled", "unsampled"),
    [
        # Who is set not to be asked decides alone; who is parent-based follows the client, both ways.
        ("", "", 2, 2, 0),
        ("always_on", "", 2, 2, 2),
        ("always_off", "", 0, 0, 0),
        ("traceidratio", "0", 0, 0, 0),
        ("parentbased_always_on", "", 2, 2, 0),
        ("parentbased_always_off", "", 0, 2, 0),
        ("parentbased_traceidratio", "0", 0, 2, 0),
    ],
)
def test_samplers(
    monkeypatch: pytest.MonkeyPatch, sampler: str, argument: str, fresh: int, sampled: int, unsampled: int
) -> None:
    if sampler:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    if argument:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    assert len(made(monkeypatch, [""])) == fresh
    assert len(made(monkeypatch, [SAMPLED])) == sampled
    assert len(made(monkeypatch, [UNSAMPLED])) == unsampled


def test_a_ratio_samples_whole_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    spans = made(monkeypatch, [""] * 400)
    traces = {span.context.trace_id for span in spans}
    assert 50 < len(traces) < 150
    assert len(spans) == 2 * len(traces)


@pytest.mark.parametrize("sampler", ["parentbased_always_on", "parentbased_always_off"])
def test_the_decision_goes_with_the_context(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """From process to process, by what one tells the other."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    exporter = InMemorySpanExporter()
    trace(monkeypatch, exporter)
    with setup.span("router"):
        told = setup.current_traceparent()
    # Another process, which would decide otherwise by itself.
    others = {"parentbased_always_on": "parentbased_always_off", "parentbased_always_off": "parentbased_always_on"}
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", others[sampler])
    found = made(monkeypatch, [told])
    assert len(found) == (2 if sampler == "parentbased_always_on" else 0)
    assert all(f"{span.context.trace_id:032x}" in told for span in found)


def test_a_clients_trace_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = trace(monkeypatch, exporter)
    for metadata in ((("traceparent", SAMPLED),), {"traceparent": SAMPLED, "accept": "*/*"}.items()):
        with setup.span("request", setup.context_of_call(metadata)):
            assert setup.current_traceparent().startswith(SAMPLED[:36])
    for metadata in (None, (), (("traceparent", "nonsense"),), (("traceparent", b"\xff"),)):
        with setup.span("request", setup.context_of_call(metadata)):
            assert not setup.current_traceparent().startswith(SAMPLED[:36])
    provider.shutdown()
    spans = exporter.get_finished_spans()
    assert [span.parent is not None for span in spans] == [True, True, False, False, False, False]


def test_without_tracing_a_clients_trace_passes_through() -> None:
    with setup.span("request", setup.context_of(SAMPLED)):
        assert setup.current_traceparent() == SAMPLED
    with setup.span("request", setup.context_of("")):
        assert setup.current_traceparent() == ""


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "3")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    exporter = Batches()
    provider = trace(monkeypatch, exporter)
    for _ in range(10):
        with setup.span("one"):
            pass
    provider.force_flush()
    provider.shutdown()
    assert sum(exporter.sizes) == 10
    assert max(exporter.sizes) == 3


@pytest.mark.parametrize(
    ("variables", "name", "instance"),
    [
        ({}, "starmesh-router", "r0"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine", "r0"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,deployment.environment.name=test"}, "ours", "r0"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=pod-3"}, "starmesh-router", "pod-3"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours", "OTEL_SERVICE_NAME": "mine"}, "mine", "r0"),
    ],
)
def test_names(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, instance: str) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    provider = setup.make_provider("router", "r0", InMemorySpanExporter())
    provider.shutdown()
    attributes = provider.resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == (name, instance)
    if "deployment" in str(variables):
        assert attributes["deployment.environment.name"] == "test"


def test_exporters(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed() -> bool:
        before = []
        monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", before.append)
        setup.setup_tracing("router", "r0")()
        return bool(before)

    assert not installed()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    assert installed()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not installed()
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jaeger")
    with pytest.raises(setup.TelemetryConfigError, match="use otlp, console or none"):
        installed()


def test_a_failure_is_noted_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = trace(monkeypatch, exporter)
    for error in (bad_field("text", "zanzibar"), KeyError("zanzibar")):
        with pytest.raises(type(error)), setup.span("one"):
            raise error
    provider.shutdown()
    spans = exporter.get_finished_spans()
    assert [span.attributes for span in spans] == [
        {names.ERROR_TYPE: "INVALID_ARGUMENT"},
        {names.ERROR_TYPE: "KeyError"},
    ]
    assert all(span.status.status_code is StatusCode.ERROR and not span.events for span in spans)
    assert "zanzibar" not in "".join(span.to_json() for span in spans)


def test_links_lead_to_sampled_traces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = trace(monkeypatch, exporter)
    with setup.span("one") as span:
        for traceparent in (SAMPLED, UNSAMPLED, "", "nonsense"):
            setup.link_to(span, traceparent)
    provider.shutdown()
    (found,) = exporter.get_finished_spans()
    assert [f"{link.context.trace_id:032x}" for link in found.links] == ["7e57" * 8]


def test_names_are_of_the_conventions() -> None:
    """Every name outside ``starmesh.*`` is one of OpenTelemetry's."""
    conventions = {
        value
        for module in (gen_ai_attributes, error_attributes, server_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    assert {name for name in ATTRIBUTES if not name.startswith("starmesh.")} <= conventions


def test_the_registry_is_whole() -> None:
    """Every name of a span is a row's, and every attribute of a row is described."""
    assert {row.name for row in SPANS} == {value for key, value in vars(names).items() if key.startswith("SPAN_")}
    assert len({row.name for row in SPANS}) == len(SPANS)
    used = {*ON_FAILURE}
    for row in SPANS:
        used |= {*row.always, *row.sometimes, *(name for event in row.events.values() for name in event)}
        assert {*row.parents, *row.links} <= {"", *(other.name for other in SPANS)}
    assert used == ATTRIBUTES.keys()
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(\.\*)?", name) for name in used)


def test_a_collector_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            release.wait()
            return SpanExportResult.FAILURE

    monkeypatch.setattr(setup, "_END_S", 0.01)
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(setup, "ConsoleSpanExporter", lambda **options: Hanging())
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    end = setup.setup_tracing("router", "r0")
    end()  # returns
    release.set()

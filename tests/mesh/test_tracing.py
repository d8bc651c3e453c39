"""One trace follows a request through router, prefill, handoff and decode, to a real OTLP receiver."""

from __future__ import annotations

from pathlib import Path

from starmesh.telemetry import names
from tests.mesh.otlp import ReceivedSpan, Receiver
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import generate, request

SECRET = "zanzibar-lantern"
EXPECTED = {
    names.SPAN_GENERATE: "starmesh-router",
    names.SPAN_DISPATCH: "starmesh-router",
    names.SPAN_PREFILL: "starmesh-prefill",
    names.SPAN_HANDOFF: "starmesh-decode",
    names.SPAN_DECODE: "starmesh-decode",
}


async def test_one_trace_per_request(tiny_model_dir: Path, tmp_path: Path) -> None:
    async with Receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tiny_model_dir, environment) as mesh:
            await mesh.start_all(prefill=1, decode=1, flags=("--kv-memory-mib", "16"))
            message = request(f"Say {SECRET}.", max_output_tokens=12, ignore_eos=True)
            message.request_id = "traced"
            await generate(mesh.inference(), message)

            def trace() -> list[ReceivedSpan]:
                for spans in receiver.traces.values():
                    if any(span.attributes.get(names.REQUEST_ID) == "traced" for span in spans):
                        return spans
                return []

            def complete() -> bool:
                return {span.name for span in trace()} >= EXPECTED.keys()

            await until(complete, "the trace", describe=lambda: str([(s.service, s.name) for s in trace()]))
            spans = trace()
            for name, service in EXPECTED.items():
                (span,) = [span for span in spans if span.name == name]
                assert span.service == service
            known = {span.span_id for span in spans}
            roots = [span for span in spans if span.parent_id not in known]
            assert len(roots) == 1, "one tree"
            (generated,) = [span for span in spans if span.name == names.SPAN_GENERATE]
            assert generated.attributes[names.OUTPUT_TOKENS] == 12
            assert generated.attributes[names.OPERATION]
            assert names.EVENT_FIRST_TOKEN in generated.events
            (handoff,) = [span for span in spans if span.name == names.SPAN_HANDOFF]
            assert handoff.attributes[names.TRANSFER_BACKEND] == "nixl"
            assert int(str(handoff.attributes[names.TRANSFER_BYTES])) > 0
            (decoded,) = [span for span in spans if span.name == names.SPAN_DECODE]
            assert decoded.attributes[names.FINISH_REASONS]
            assert SECRET not in str(receiver.traces), "a prompt is in a span"
            for service in mesh.services.values():
                assert SECRET not in service.log.read_text(), f"a prompt is in the log of {service.name}"

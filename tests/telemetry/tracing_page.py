"""``python -m tests.telemetry.tracing_page``: brings the table of spans in docs/tracing.md up to the registry.

With ``--trace`` it also moves a request about on a real mesh and draws the trace that an OTLP receiver got of it.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
from pathlib import Path

from starmesh.telemetry import names
from starmesh.telemetry.spans import ATTRIBUTES, ROOT, SPANS
from tests.mesh.otlp import Receiver
from tests.mesh.processes import Mesh, until
from tests.telemetry import traced_traffic
from tests.telemetry.waterfall import waterfall

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "tracing.md"
PICTURE = DOCS / "images" / "trace.svg"
_PART = "<!-- {0}: python -m tests.telemetry.tracing_page -->\n{1}<!-- end of {0} -->"


def with_tables(page: str) -> str:
    """``page`` with its generated parts as the registry is now."""
    for name, table in (("spans", _spans()), ("attributes", _attributes())):
        pattern = re.escape(_PART.format(name, "\0")).replace(re.escape("\0"), ".*?")
        page, count = re.subn(pattern, lambda _: _PART.format(name, table), page, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{PAGE.name} has {count} parts named {name}"
    return page


def _spans() -> str:
    lines = ["| span | made by | below | linked to | what it stands for |", "|---|---|---|---|---|"]
    for row in SPANS:
        below = ", ".join(f"`{parent}`" if parent != ROOT else "a client's, or none" for parent in row.parents)
        if ROOT in row.parents and row.name not in (names.SPAN_GENERATE, names.SPAN_COMMAND, names.SPAN_DRAIN):
            below = "none"
        linked = ", ".join(f"`{link}`" for link in row.links)
        lines.append(f"| `{row.name}` | {', '.join(row.services)} | {below} | {linked} | {row.what} |")
    return "\n".join(lines) + "\n"


def _attributes() -> str:
    lines = ["| attribute | on | what it says |", "|---|---|---|"]
    for name, what in ATTRIBUTES.items():
        on = [row.name for row in SPANS if name in (*row.always, *row.sometimes)]
        on += [f"{row.name}, event {event}" for row in SPANS for event, with_ in row.events.items() if name in with_]
        short = ", ".join(span.removeprefix("starmesh.") for span in on) or "any that failed"
        lines.append(f"| `{name}` | {short} | {what} |")
    return "\n".join(lines) + "\n"


async def trace_of_a_moved_request() -> str:
    """The picture of a request that an operator moves, as the spans were received."""
    with tempfile.TemporaryDirectory() as directory:
        async with Receiver() as receiver:
            environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
            async with Mesh(Path(directory), Path(directory), environment) as mesh:
                await traced_traffic.start(mesh)
                await traced_traffic.moved_once(mesh)
                await mesh.settled()
                await until(lambda: names.SPAN_MIGRATION_TARGET in {span.name for span in receiver.spans}, "the move")
                for service in mesh.services.values():
                    service.terminate()
                for service in mesh.services.values():
                    await service.process.wait()
            (root,) = [
                span
                for span in receiver.spans
                if span.attributes.get(names.REQUEST_ID) == "moved-once" and span.name == names.SPAN_GENERATE
            ]
            return waterfall(receiver.traces[root.trace_id])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", action="store_true", help="draw docs/images/trace.svg anew")
    if parser.parse_args().trace:
        PICTURE.write_text(asyncio.run(trace_of_a_moved_request()))
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()

"""A trace as a picture: a bar for each span, below the span that it belongs to, with its events."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from starmesh.telemetry import names
from tests.mesh.otlp import ReceivedSpan

_WIDTH, _ROW, _LABELS, _MARGIN = 1000, 26, 330, 14
_BARS = _WIDTH - _LABELS - 2 * _MARGIN
_COLOURS = {
    "starmesh-router": "#4063a8",
    "starmesh-prefill": "#b8860b",
    "starmesh-decode": "#2e8b57",
    "starmesh-predictor": "#8b4789",
    "starmesh-rescheduler": "#a0522d",
}
_SAID = (names.TRANSFER_BLOCKS, names.TRANSFER_BYTES, names.OUTPUT_TOKENS, names.MIGRATION_OUTCOME)


def waterfall(spans: list[ReceivedSpan]) -> str:
    """SVG of one trace."""
    begin = min(span.start_ns for span in spans)
    scale = _BARS / max(1, max(span.end_ns for span in spans) - begin)
    rows = list(_in_order(spans))
    height = _ROW * (len(rows) + 1) + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (depth, span) in enumerate(rows):
        top = _MARGIN + number * _ROW
        left = _LABELS + _MARGIN + (span.start_ns - begin) * scale
        width = max(1.5, (span.end_ns - span.start_ns) * scale)
        name = f"{span.name.removeprefix('starmesh.')} · {span.instance}"
        parts.append(f'<text x="{_MARGIN + 14 * depth}" y="{top + 16}" fill="#222222">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left:.1f}" y="{top + 5}" width="{width:.1f}" height="15" fill="{_COLOURS[span.service]}"/>'
        )
        said = _said(span)
        inside = width > 7 * len(said)
        if not inside and left + width + 7 * len(said) > _WIDTH:
            place, anchor = left - 5, "end"
        else:
            place, anchor = (left + 5, "start") if inside else (left + width + 5, "start")
        colour = "#ffffff" if inside else "#555555"
        parts.append(
            f'<text x="{place:.1f}" y="{top + 17}" fill="{colour}" font-size="11" text-anchor="{anchor}">'
            f"{escape(said)}</text>"
        )
        for event, at_ns in zip(span.events, span.event_times_ns, strict=True):
            x = _LABELS + _MARGIN + (at_ns - begin) * scale
            parts.append(
                f'<path d="M{x:.1f} {top + 2} v21" stroke="#c0392b" stroke-width="2">'
                f"<title>{escape(event)}</title></path>"
            )
    total_ms = (max(span.end_ns for span in spans) - begin) / 1e6
    base = height - _MARGIN + 2
    for part in range(5):
        x = _LABELS + _MARGIN + _BARS * part / 4
        anchor = "end" if part == 4 else "start"
        parts.append(
            f'<text x="{x:.0f}" y="{base}" fill="#555555" font-size="11" text-anchor="{anchor}">'
            f"{total_ms * part / 4:.0f} ms</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _in_order(spans: list[ReceivedSpan]) -> Iterator[tuple[int, ReceivedSpan]]:
    """Depth first, the earliest first."""
    known = {span.span_id for span in spans}

    def below(parent: bytes, depth: int) -> Iterator[tuple[int, ReceivedSpan]]:
        for span in sorted(spans, key=lambda span: span.start_ns):
            if (span.parent_id if span.parent_id in known else b"") == parent:
                yield depth, span
                yield from below(span.span_id, depth + 1)

    return below(b"", 0)


def _said(span: ReceivedSpan) -> str:
    """How long, and what else is worth knowing."""
    said = [f"{(span.end_ns - span.start_ns) / 1e6:.1f} ms"]
    for name in _SAID:
        if name in span.attributes:
            word = name.rpartition(".")[2].removeprefix("transfer_").removeprefix("migration_").replace("_", " ")
            value = span.attributes[name]
            said.append(str(value) if isinstance(value, str) else f"{value} {word}")
    return ", ".join(said)

"""Charts as SVG text that stands alone: its style is inside, light and dark, so that a page of documentation can show
it too.

Owns axes, marks and colours. Knows nothing of simulations. Every mark carries its value in ``data-tip``, for the page's
script, and in a ``<title>`` for everything else; a line without marks carries those of its points in ``data-tips``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 340
COLOURS: Final = 7
"""Lines that look different from each other; of more than these, two look alike."""

REFERENCE: Final = 7
"""The colour of what is no line of its own: dashed and grey."""

STYLE: Final = (Path(__file__).parent / "plot.css").read_text(encoding="utf-8")

_LEFT, _RIGHT, _BOTTOM = 64, 14, 44
_LEGEND_ROW = 18
_CHARACTER = 6.6


@dataclass(frozen=True, slots=True)
class Point:
    """A value at ``x``, with its interval (NaN for none) and what to say of it; on a line without marks, of ``x``."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A named line in one of the colours. Points are in order; those that are NaN are left out."""

    name: str
    colour: int
    points: tuple[Point, ...]
    marks: bool = True

    @property
    def known(self) -> list[Point]:
        """Its points that have a value."""
        return [point for point in self.points if math.isfinite(point.y)]


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            part = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values along it."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool | None = None,
    references: Sequence[tuple[float, str]] = (),
    x_ticks: Sequence[tuple[float, str]] = (),
    height: int = HEIGHT,
) -> str:
    """Lines with their intervals as bands, of values of at least 0. ``log_y`` None decides by how far the values reach.
    ``references`` are horizontal lines with a name; ``x_ticks`` are named places, instead of round ones."""
    lines = [line for line in lines if line.known]
    top, legend = _legend([(line.name, line.colour) for line in lines])
    xs = [point.x for line in lines for point in line.known]
    values = [point.y for line in lines for point in line.known]
    # A wide interval, of few seeds, must not flatten the lines: it is cut at half as much again as the highest value.
    most = 1.5 * max(values, default=0.0)
    highs = [min(point.high, most) for line in lines for point in line.known if math.isfinite(point.high)]
    ys = [*values, *highs, *(value for value, _ in references)]
    if log_y is None:
        log_y = bool(ys) and min(ys) > 0 and max(ys) / min(ys) > 20
    x_axis = _spanning(xs, start=_LEFT, end=WIDTH - _RIGHT, log=False, from_zero=False)
    y_axis = _spanning(ys, start=height - _BOTTOM, end=top, log=log_y, from_zero=True)
    body = [legend, _axes(x_axis, y_axis, x_label, y_label, height=height, x_ticks=x_ticks)]
    for value, name in references:
        y = y_axis.at(value)
        body.append(f'<line class="reference" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="label" x="{WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    body.extend(_drawn(line, x_axis, y_axis) for line in lines)
    return document(body, title=title, height=height)


def bar_chart(bars: Sequence[tuple[str, int, Point]], *, title: str, x_label: str) -> str:
    """A horizontal bar with its interval for each (name, colour, value); ``Point.x`` is not looked at."""
    left = max((len(name) for name, _, _ in bars), default=0) * _CHARACTER + 24
    height = 56 + 26 * len(bars) + _BOTTOM - 20
    known = [value for _, _, bar in bars for value in (bar.y, bar.high) if math.isfinite(value)]
    axis = _spanning(known, start=left, end=WIDTH - _RIGHT, log=False, from_zero=True)
    bottom = height - _BOTTOM
    body = []
    for tick in axis.ticks():
        x = axis.at(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="40" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    middle = (left + WIDTH) / 2
    body.append(f'<text class="label" x="{middle:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for place, (name, colour, bar) in enumerate(bars):
        y = 46 + 26 * place
        body.append(f'<text class="label" x="{left - 8:.0f}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        if not math.isfinite(bar.y):
            continue
        width = max(axis.at(bar.y) - left, 1)
        body.append(
            f'<rect class="c{colour} bar" x="{left:.1f}" y="{y}" width="{width:.1f}" height="18" '
            f'tabindex="0" data-tip="{escape(bar.tip)}"><title>{escape(bar.tip)}</title></rect>'
        )
        if math.isfinite(bar.low):
            body.append(
                f'<path class="whisker" d="M{axis.at(bar.low):.1f} {y + 9}H{axis.at(bar.high):.1f}'
                f'M{axis.at(bar.low):.1f} {y + 5}v8M{axis.at(bar.high):.1f} {y + 5}v8"/>'
            )
    return document(body, title=title, height=height)


def histogram(edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str, y_label: str) -> str:
    """Counts between logarithmic edges above 0."""
    height = 260
    if not counts:
        return document(['<text class="label" x="64" y="80">nothing finished</text>'], title=title, height=height)
    x_axis = Axis(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT, log=True)
    y_axis = _spanning([float(count) for count in counts], start=height - _BOTTOM, end=40, log=False, from_zero=True)
    body = [_axes(x_axis, y_axis, x_label, y_label, height=height)]
    for place, count in enumerate(counts):
        left, right, y = x_axis.at(edges[place]), x_axis.at(edges[place + 1]), y_axis.at(count)
        tip = f"{count:,} from {edges[place]:,.0f} to {edges[place + 1]:,.0f}"
        body.append(
            f'<rect class="c0 bar" x="{left + 0.5:.1f}" y="{y:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'height="{y_axis.start - y:.1f}" tabindex="0" data-tip="{tip}"><title>{tip}</title></rect>'
        )
    return document(body, title=title, height=height)


def document(body: Sequence[str], *, title: str, height: float) -> str:
    """A whole SVG with its title above ``body``."""
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>'
        f'<text class="title" x="12" y="20">{escape(title)}</text>{"".join(body)}</svg>'
    )


def number(value: float) -> str:
    """A tick's value, short."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:g}"


def _drawn(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    points = line.known
    band = [point for point in points if math.isfinite(point.low) and math.isfinite(point.high)]
    parts = []
    if len(band) > 1:
        upper = [f"{x_axis.at(point.x):.1f},{y_axis.at(point.high):.1f}" for point in band]
        lower = [f"{x_axis.at(point.x):.1f},{y_axis.at(point.low):.1f}" for point in reversed(band)]
        parts.append(f'<polygon class="c{line.colour} band" points="{" ".join(upper + lower)}"/>')
    path = " ".join(f"{x_axis.at(point.x):.1f},{y_axis.at(point.y):.1f}" for point in points)
    if not line.marks:
        tips = escape(";".join(f"{point.tip}|{point.y:.4g}" for point in points))
        name = escape(line.name)
        parts.append(f'<polyline class="c{line.colour} line" points="{path}" data-name="{name}" data-tips="{tips}"/>')
        return "".join(parts)
    if len(points) > 1:
        parts.append(f'<polyline class="c{line.colour} line" points="{path}"/>')
    for point in points:
        tip = escape(point.tip or f"{line.name}: {point.y:g}")
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        parts.append(
            f'<g class="c{line.colour} point" tabindex="0" data-tip="{tip}"><title>{tip}</title>'
            f'<circle class="reach" cx="{x:.1f}" cy="{y:.1f}" r="9"/>{_mark(line.colour, x, y)}</g>'
        )
    return "".join(parts)


def _mark(colour: int, x: float, y: float) -> str:
    """Shapes differ with the colour, for whoever sees no colours."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 4.8:.1f}l4.6 8.2h-9.2z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
        f"M{x:.1f} {y + 4.8:.1f}l4.6 -8.2h-9.2z",
        f"M{x - 5:.1f} {y - 1.5:.1f}h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
        f"M{x - 5:.1f} {y - 2:.1f}h10v4h-10z",
        f"M{x - 2:.1f} {y - 5:.1f}h4v10h-4z",
    )
    return f'<path class="mark" d="{shapes[colour % len(shapes)]}"/>'


def _legend(names: Sequence[tuple[str, int]]) -> tuple[int, str]:
    """Where the drawing may begin below it, and the legend."""
    parts = []
    x, y = 14.0, 40
    for name, colour in names:
        width = 26 + len(name) * _CHARACTER
        if x + width > WIDTH and x > 14:
            x, y = 14.0, y + _LEGEND_ROW
        parts.append(f'<g class="c{colour}">{_mark(colour, x + 4, y - 4)}</g>')
        parts.append(f'<text class="label" x="{x + 14:.0f}" y="{y}">{escape(name)}</text>')
        x += width
    return y + 14, "".join(parts)


def _axes(
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
    *,
    height: float,
    x_ticks: Sequence[tuple[float, str]] = (),
) -> str:
    bottom = y_axis.start
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{x_axis.start}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x_axis.start - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick, text in x_ticks or [(tick, number(tick)) for tick in x_axis.ticks()]:
        x = x_axis.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
    middle_x, middle_y = (x_axis.start + x_axis.end) / 2, (y_axis.start + y_axis.end) / 2
    parts.append(
        f'<text class="label" x="{middle_x:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(14 {middle_y:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _spanning(values: Sequence[float], *, start: float, end: float, log: bool, from_zero: bool) -> Axis:
    """An axis over ``values`` with a little room at its ends."""
    if not values:
        return Axis(0.0, 1.0, start, end)
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    if from_zero:
        return Axis(min(low, 0.0), high * 1.06 if high > 0 else 1.0, start, end)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


def _linear_ticks(low: float, high: float, about: int = 6) -> list[float]:
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 5 else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]

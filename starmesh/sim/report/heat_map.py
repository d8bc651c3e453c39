"""A value over time for each of many instances as colours: an SVG around a small picture with a pixel for each value.

Owns the colours and the picture's encoding. ``data-levels`` has the values as bytes (0: none, 1 to 255: from 0 to the
greatest), so that the page's script can say what is under the pointer.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import Final

from starmesh.sim.report.svg import WIDTH, Axis, document, number

_STOPS: Final = ((0, 34, 78), (59, 73, 109), (108, 110, 114), (158, 148, 117), (212, 190, 104), (254, 232, 56))
"""Cividis, which is the same to those who see no red or no green (Nuñez et al., 2018), at six places."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 70, 34, 40


def heat_map(
    rows: Sequence[Sequence[float | None]],
    names: Sequence[str],
    *,
    title: str,
    resolution_s: float,
    most: float,
    unit: str = "",
) -> str:
    """A row for each of ``names``, a column for each ``resolution_s``; ``most`` is the brightest value: several maps
    can share it."""
    points = max((len(row) for row in rows), default=0)
    if not points:
        return document(['<text class="label" x="64" y="60">nothing was seen</text>'], title=title, height=80)
    high = min(max(len(rows) * 14, 42), 260)
    height = _TOP + high + _BOTTOM
    levels = [bytes(_level(value, most) for value in row) for row in rows]
    wide = WIDTH - _LEFT - _RIGHT
    picture = base64.b64encode(_png(levels, points)).decode()
    body = [
        f'<image class="heat" x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{picture}" tabindex="0" '
        f'data-levels="{base64.b64encode(b"".join(levels)).decode()}" data-rows="{escape(" ".join(names))}" '
        f'data-points="{points}" data-resolution="{resolution_s:g}" data-most="{most:g}" data-unit="{escape(unit)}"/>'
    ]
    every = max(1, -(-len(names) * 14 // high))
    for place in range(0, len(names), every):
        y = _TOP + high * (place + 0.5) / len(names) + 4
        body.append(f'<text class="tick" x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(names[place])}</text>')
    axis = Axis(0.0, points * resolution_s, _LEFT, WIDTH - _RIGHT)
    bottom = _TOP + high
    body.extend(
        f'<text class="tick" x="{axis.at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in axis.ticks()
    )
    middle = _LEFT + wide / 2
    body.append(f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">virtual time, s</text>')
    body.append(_scale(most, unit, high))
    return document(body, title=title, height=height)


def _scale(most: float, unit: str, high: float) -> str:
    """The colours and what they stand for."""
    picture = base64.b64encode(_png([bytes([level]) for level in range(255, 0, -1)], 1)).decode()
    x = WIDTH - _RIGHT + 10
    return (
        f'<image x="{x}" y="{_TOP}" width="10" height="{high:.0f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{picture}"/>'
        f'<text class="tick" x="{x + 14}" y="{_TOP + 10}">{number(float(f"{most:.3g}"))}{escape(unit)}</text>'
        f'<text class="tick" x="{x + 14}" y="{_TOP + high:.0f}">0</text>'
    )


def _level(value: float | None, most: float) -> int:
    if value is None:
        return 0
    return 1 + min(254, max(0, round(value / most * 254))) if most > 0 else 1


def _png(rows: Sequence[bytes], width: int) -> bytes:
    """A picture of bytes through the palette (PNG, RFC 2083); rows that are short are padded with none."""
    header = struct.pack(">IIBBBBB", width, len(rows), 8, 3, 0, 0, 0)
    lines = b"".join(b"\0" + row.ljust(width, b"\0") for row in rows)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", _PALETTE),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _colour(level: int) -> bytes:
    place = (level - 1) / 254 * (len(_STOPS) - 1)
    below = min(int(place), len(_STOPS) - 2)
    part = place - below
    return bytes(round(a + (b - a) * part) for a, b in zip(_STOPS[below], _STOPS[below + 1], strict=True))


_PALETTE: Final = bytes(3) + b"".join(map(_colour, range(1, 256)))

"""Trace files: recorded arrivals and lengths, read one request at a time.

Owns opening (also ``.gz``), line lengths and order. What a line says is ``trace_formats``'. Memory is bounded by one
line, however large the file.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from starmesh.sim.workload.request import WorkloadConfig, WorkloadError
from starmesh.sim.workload.trace_formats import (
    TRACE_FORMATS,
    TraceFormat,
    TraceFormatError,
    TraceRow,
    detect_format,
)

MOST_LINE_BYTES: Final = 1 << 20
"""Mooncake's lines name the blocks of their prompts: a prompt of a million tokens takes some 20 KB."""

BACKWARDS_S: Final = 1.0
"""Rows may be this much older than one before them, as clocks of several machines are; they count as simultaneous."""


def read_trace(path: str | Path, *, format_name: str | None = None) -> Iterator[TraceRow]:
    """The requests of a file in their order; ``arrives_s`` counts from the first one and never falls.

    ``format_name`` is one of ``TRACE_FORMATS``; None tells the format from the first line. Requests without prompt or
    without output (failed ones, in BurstGPT) are left out. Blank lines are skipped.

    Raises WorkloadError, while reading, with the file, the line, and what is expected there.
    """
    path = Path(path)
    lines = ((number, text) for number, text in _lines(path) if text)
    first = next(lines, None)
    if first is None:
        raise WorkloadError(f"{path} is empty")
    number = first[0]
    try:
        found = detect_format(first[1]) if format_name is None else _named(format_name)
        parse = found.parser(first[1])
        began_s: float | None = None
        reached_s = 0.0
        for number, text in lines if found.has_header else itertools.chain([first], lines):  # noqa: B007 - for errors
            row = parse(text)
            if not (row.prompt_tokens and row.output_tokens):
                continue
            began_s = row.arrives_s if began_s is None else began_s
            arrives_s = row.arrives_s - began_s
            if arrives_s < reached_s - BACKWARDS_S:
                raise TraceFormatError(
                    f"arrives {reached_s - arrives_s:.3f} s before a request above it; sort the file by arrival"
                )
            reached_s = max(reached_s, arrives_s)
            yield row._replace(arrives_s=reached_s)
    except TraceFormatError as error:
        raise WorkloadError(f"{path}, line {number}: {error}") from None


def trace_arrivals(rows: Iterator[TraceRow], config: WorkloadConfig) -> Iterator[float]:
    """When ``rows`` arrive, sped up or slowed down to ``config.rate``.

    The trace's own rate is that of its first ``config.requests`` requests; to know it the file is read once before.
    """
    speed = 1.0
    if config.rate is not None:
        assert config.trace_path is not None  # WorkloadConfig demands it
        speed = config.rate / _own_rate(config.trace_path, config)
    for row in rows:
        yield row.arrives_s / speed


def _own_rate(path: str, config: WorkloadConfig) -> float:
    count, reached_s = 0, 0.0
    for row in itertools.islice(read_trace(path, format_name=config.trace_format), config.requests):
        count, reached_s = count + 1, row.arrives_s
    if reached_s <= 0:
        raise WorkloadError(
            f"{path}: its first {count} requests arrive at once and have no rate to change; leave the rate out"
        )
    return (count - 1) / reached_s


def _named(format_name: str) -> TraceFormat:
    try:
        return TRACE_FORMATS[format_name]
    except KeyError:
        raise WorkloadError(f"trace formats are {', '.join(TRACE_FORMATS)}, not {format_name!r}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, without white space around them."""
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_LINE_BYTES:
                    raise WorkloadError(
                        f"{path}, line {number}: longer than {MOST_LINE_BYTES} bytes; no trace has such"
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except OSError as error:  # gzip's complaint about a file that isn't one among them
        raise WorkloadError(
            f"{path} cannot be read: {error.strerror or error}; name a trace file that is there, as CSV or JSON Lines, "
            "with .gz if it is compressed"
        ) from None
    except (EOFError, zlib.error) as error:
        raise WorkloadError(f"{path} cannot be read after line {number}: damaged or cut gzip ({error})") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path}, line {number}: not UTF-8 text; traces are CSV or JSON Lines") from None


def _opened(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")

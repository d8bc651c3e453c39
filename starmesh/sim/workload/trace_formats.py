"""What a line of a trace says: the public formats, and a plain one of our own.

Owns the columns, their units and what they may hold. A format is told by its columns, so that files with further ones
are read too. Each format's parser is made from the file's first line, which is the header of a CSV file.

| format | file | columns used | time |
|---|---|---|---|
| plain_csv, plain_jsonl | CSV, JSON Lines | arrives_s, prompt_tokens, output_tokens; optional: below | seconds |
| azure | CSV | TIMESTAMP, ContextTokens, GeneratedTokens (LLM inference 2023 and 2024) | date and time |
| burstgpt | CSV | Timestamp, Request tokens, Response tokens (with or without session columns) | seconds |
| mooncake | JSON Lines | timestamp, input_length, output_length | milliseconds |

The plain ones may also have request_id, and max_output_tokens, the request's own limit.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from starmesh.sim.workload.request import MOST_TOKENS

MOST_SECONDS: Final = 1e12
"""Beyond any clock: 1970 in seconds is 1.8e9 ago, in milliseconds 1.8e12."""

T = TypeVar("T")

_MOST_DIGITS: Final = 32
_SHOWN: Final = 40
_DATE_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:?\d\d)?",
    re.ASCII,
)


class TraceFormatError(ValueError):
    """A line that is not of its format; the message says what is expected. Whoever reads adds file and line."""


class TraceRow(NamedTuple):
    """A request of a trace. ``max_output_tokens`` is None where the trace names no limit."""

    arrives_s: float
    prompt_tokens: int
    output_tokens: int
    request_id: str = ""
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """Names of the columns that hold each value; ``time`` reads the first one in seconds. The last two may be "" (the
    format has no such column) and are optional in a file."""

    name: str
    has_header: bool
    arrival: str
    prompt: str
    output: str
    time: Callable[[Any], float]
    request_id: str = ""
    limit: str = ""

    @property
    def needed(self) -> tuple[str, str, str]:
        """What every line holds."""
        return self.arrival, self.prompt, self.output

    def parser(self, first_line: str) -> Callable[[str], TraceRow]:
        """What reads a line. Raises TraceFormatError for a header that lacks a column."""
        if not self.has_header:
            return lambda line: self._row(_json_object(line))
        columns = _cells(first_line)
        if missing := [name for name in self.needed if name not in columns]:
            raise TraceFormatError(f"a {self.name} file has a column {missing[0]!r}, this one has {_shown(first_line)}")
        return lambda line: self._row(_named_cells(columns, line))

    def _row(self, values: Mapping[str, Any]) -> TraceRow:
        if missing := [name for name in self.needed if name not in values]:
            raise TraceFormatError(f"a {self.name} request has {', '.join(self.needed)}; {missing[0]!r} is missing")
        request_id, limit = values.get(self.request_id), values.get(self.limit)
        return TraceRow(
            arrives_s=self._read(self.arrival, self.time, values[self.arrival]),
            prompt_tokens=self._read(self.prompt, _tokens, values[self.prompt]),
            output_tokens=self._read(self.output, _tokens, values[self.output]),
            request_id="" if request_id is None else str(request_id),
            max_output_tokens=None if limit in (None, "") else self._read(self.limit, _limit, limit),
        )

    def _read(self, column: str, read: Callable[[Any], T], value: Any) -> T:
        try:
            return read(value)
        except TraceFormatError as error:
            raise TraceFormatError(f"{column} is {error}, not {_shown(value)}") from None


def _json_object(line: str) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise TraceFormatError(f"expected one JSON object, found {_shown(line)}")
    return read


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True))]
    except (csv.Error, StopIteration):
        raise TraceFormatError(f"expected comma-separated values, found {_shown(line)}") from None


def _named_cells(columns: list[str], line: str) -> dict[str, str]:
    cells = _cells(line)
    if len(cells) != len(columns):
        raise TraceFormatError(f"expected {len(columns)} values as the header has, found {len(cells)}: {_shown(line)}")
    return dict(zip(columns, cells, strict=True))


def _number(value: Any, expected: str) -> float:
    """Of JSON or of a cell. What is too long to be one is not tried."""
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # An integer beyond any float is no number of ours either.
        number = float(value) if abs(value) < 1 << 62 else math.inf
    elif isinstance(value, str) and len(value) <= _MOST_DIGITS:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if not math.isfinite(number):
        raise TraceFormatError(expected)
    return number


def _tokens(value: Any) -> int:
    expected = f"a whole number of tokens from 0 to {MOST_TOKENS}"
    number = _number(value, expected)
    if not (0 <= number <= MOST_TOKENS and number.is_integer()):
        raise TraceFormatError(expected)
    return int(number)


def _limit(value: Any) -> int:
    if not (limit := _tokens(value)):
        raise TraceFormatError("a limit of at least 1 token")
    return limit


def _seconds(value: Any) -> float:
    expected = "a number of seconds from 0"
    number = _number(value, expected)
    if not 0 <= number <= MOST_SECONDS:
        raise TraceFormatError(expected)
    return number


def _milliseconds(value: Any) -> float:
    expected = "a number of milliseconds from 0"
    number = _number(value, expected)
    if not 0 <= number <= 1000 * MOST_SECONDS:
        raise TraceFormatError(expected)
    return number / 1000


def _date_time(value: Any) -> float:
    """Azure's are of 2023 without a zone and with 7 decimals, of 2024 with one and with up to 6."""
    expected = "a date and time like 2023-11-16 18:17:03.97996"
    found = _DATE_TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise TraceFormatError(expected)
    whole, fraction, zone = found.groups()
    try:
        moment = datetime.fromisoformat(whole + (zone or ""))
    except ValueError:
        raise TraceFormatError(expected) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(fraction or 0)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_PLAIN: Final = ("arrives_s", "prompt_tokens", "output_tokens", _seconds, "request_id", "max_output_tokens")

TRACE_FORMATS: Final[Mapping[str, TraceFormat]] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            TraceFormat("plain_jsonl", False, *_PLAIN),
            TraceFormat("plain_csv", True, *_PLAIN),
            TraceFormat("azure", True, "TIMESTAMP", "ContextTokens", "GeneratedTokens", _date_time),
            TraceFormat("burstgpt", True, "Timestamp", "Request tokens", "Response tokens", _seconds),
            TraceFormat("mooncake", False, "timestamp", "input_length", "output_length", _milliseconds),
        )
    }
)


def detect_format(first_line: str) -> TraceFormat:
    """Raises TraceFormatError, with what would be expected, for a line that begins none of them."""
    is_json = first_line.startswith("{")
    names = set(_json_object(first_line)) if is_json else set(_cells(first_line))
    for entry in TRACE_FORMATS.values():
        if entry.has_header != is_json and names.issuperset(entry.needed):
            return entry
    known = "; ".join(
        f"{entry.name}: {'columns' if entry.has_header else 'JSON with'} {', '.join(entry.needed)}"
        for entry in TRACE_FORMATS.values()
    )
    raise TraceFormatError(f"no known trace begins with {_shown(first_line)}. Known are {known}")

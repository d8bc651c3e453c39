"""What a simulation found, with all that it takes to run it again.

Owns the values and their JSON, which is read strictly: a file with a field missing, unknown or of the wrong type raises
InvalidResult. Owns no measuring (``measurements``) and no words for people (``report``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

from starmesh.policy.rescheduling.plain import NotPlain, from_plain, to_plain
from starmesh.sim.config import SimulationConfig, Slo
from starmesh.sim.histogram import Distribution
from starmesh.sim.series import Spread, TimeSeries
from starmesh.types import MigrationReason

VERSION: Final = 1
"""Raised when the same fields come to mean something else; changed fields are refused in any case."""

MOVED: Final = "moved"
"""The outcome of a migration that moved its sequence; the others are values of ``migration.terms.Cause``."""


class InvalidResult(ValueError):
    """A text is not a result of this release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """``arrived`` counts all requests, the rest those that were measured: each of them is ``finished``, ``refused`` or,
    when the run ended, ``unfinished``. Of the finished ones ``cut`` ended before they wanted to, for want of context or
    memory; they got ``output_tokens`` together. What happened to the measured ones: ``preemptions``, ``migrations``,
    ``recoveries``."""

    arrived: int
    measured: int
    finished: int
    refused: int
    unfinished: int
    cut: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    migrations: int
    recoveries: int

    @property
    def migrations_per_request(self) -> float:
        """How often a measured request moved."""
        return self.migrations / self.measured if self.measured else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """``good`` of the measured requests met ``slo``, that is ``share`` of them, or ``per_s`` for each second in which
    measured requests arrived. A refused or unfinished request has missed every SLO."""

    slo: Slo
    good: int
    share: float
    per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationCount:
    """How many migrations of one reason came to one end: "moved", or why not."""

    reason: MigrationReason
    outcome: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationSummary:
    """All migrations of the run, warm-up included. ``size_bytes`` are of those that moved, ``wasted_bytes`` of the
    others. In seconds, of those that moved: ``duration``, and ``stood_still`` for how long the sequence got no token.
    """

    counts: tuple[MigrationCount, ...]
    size_bytes: int
    wasted_bytes: int
    duration: Distribution
    stood_still: Distribution

    @property
    def moved(self) -> int:
        """Migrations that moved their sequence."""
        return sum(count.count for count in self.counts if count.outcome == MOVED)

    @property
    def failed(self) -> int:
        """Migrations that did not."""
        return sum(count.count for count in self.counts if count.outcome != MOVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthHistogram:
    """Output tokens of the measured requests that finished: ``counts`` [n], of which the i-th lie from ``edges[i]``
    up to, but not including, ``edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What it took to simulate, and on what. No part of any digest."""

    wall_s: float
    simulated_tokens: int
    machine: str
    python: str
    numpy: str

    @property
    def simulated_tokens_per_s(self) -> float:
        """Output tokens that requests got, in a second of wall clock."""
        return self.simulated_tokens / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """One run of ``config``. Seconds are of virtual time, but for ``execution``.

    ``trace_digest`` is over the outcome of every request, in order. ``measured_s`` is how long measured requests
    arrived. In seconds, ``ttft``, ``tpot``, ``end_to_end`` and ``longest_gap`` (between two tokens of a request) are of
    the measured requests that finished, and ``itl`` of every gap between two tokens of a sequence. It,
    ``preemptions`` and ``recomputed_tokens`` (None where nobody counted) are of all of the run, warm-up included.
    """

    config: SimulationConfig
    code_version: str
    trace_digest: str
    duration_s: float
    measured_s: float
    requests: RequestCounts
    goodput: tuple[Goodput, ...]
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    end_to_end: Distribution
    longest_gap: Distribution
    output_lengths: LengthHistogram
    preemptions: int
    recomputed_tokens: int | None
    migrations: MigrationSummary
    spread: Spread
    series: TimeSeries
    execution: Execution

    @property
    def finished(self) -> int:
        """Measured requests that came to their end, be it that of the context or of memory (``requests.cut``)."""
        return self.requests.finished

    @property
    def refused(self) -> int:
        """Measured requests that were turned away."""
        return self.requests.refused

    @property
    def migrations_moved(self) -> int:
        """Migrations that moved their sequence, in all of the run."""
        return self.migrations.moved

    @property
    def digest(self) -> str:
        """Over all that was found, whatever machine, version of the code or way of stepping found it."""
        fields = _fields(self)
        del fields["config"], fields["execution"], fields["code_version"]
        return hashlib.blake2b(_compact(fields).encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """One line, without its end."""
        return _compact({"version": VERSION} | _fields(self))

    @classmethod
    def from_json(cls, text: str) -> SimulationResult:
        """The result that ``to_json`` wrote. Raises InvalidResult."""
        fields = _object(text)
        version = fields.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise InvalidResult(f"version {str(version)[:20]}, not {VERSION}: run the simulation again")
        try:
            return from_plain(cls, fields, "result")
        except NotPlain as error:
            raise InvalidResult(str(error)) from None


def config_to_json(config: SimulationConfig) -> str:
    """A configuration as one line: equal for equal configurations."""
    return _compact(to_plain(config))


def config_from_json(text: str) -> SimulationConfig:
    """The configuration that ``config_to_json`` wrote. Raises InvalidResult."""
    try:
        return from_plain(SimulationConfig, _object(text), "config")
    except NotPlain as error:
        raise InvalidResult(str(error)) from None


def _fields(result: SimulationResult) -> dict[str, Any]:
    return {field.name: to_plain(getattr(result, field.name)) for field in dataclasses.fields(result)}


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidResult(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidResult("not a JSON object")
    return fields

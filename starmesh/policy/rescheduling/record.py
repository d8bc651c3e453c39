"""A round as a line of JSON: all that went into a plan, and the plan, so that anyone can plan it again.

Owns the line and its version. Owns no file and no comparison. A line of another version, or with a field missing,
unknown or of the wrong type, raises InvalidRecord: planning half of what was planned proves nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, NoReturn

from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.memory import PlanMemory
from starmesh.policy.rescheduling.outcome import Plan
from starmesh.policy.rescheduling.plain import NotPlain, from_plain, to_plain
from starmesh.types import ClusterView

VERSION: Final = 1
"""Raised when the same fields come to mean something else; changed fields are refused in any case."""


class InvalidRecord(ValueError):
    """A line is not a round that this release can plan again."""


@dataclass(frozen=True, slots=True)
class RecordedRound:
    """``plan(view, memory, config)`` gave ``plan``. Holds ids and counts, no prompts and no tokens."""

    view: ClusterView
    memory: PlanMemory
    config: ReschedulingConfig
    plan: Plan


def encode_round(recorded: RecordedRound) -> str:
    """One line, without its end. Raises ValueError for a number that JSON does not have."""
    return json.dumps({"version": VERSION} | _fields(recorded), separators=(",", ":"), allow_nan=False)


def decode_round(line: str) -> RecordedRound:
    """The round of a line. Raises InvalidRecord."""
    try:
        fields = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRecord("not a JSON object")
    version = fields.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise InvalidRecord(f"version {str(version)[:20]}, not {VERSION}: use the release that wrote it")
    try:
        return from_plain(RecordedRound, fields, "round")
    except NotPlain as error:
        raise InvalidRecord(str(error)) from None


def _fields(recorded: RecordedRound) -> dict[str, object]:
    fields = to_plain(recorded)
    assert isinstance(fields, dict)
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")

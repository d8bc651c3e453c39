"""What became of a migration, as rescheduling remembers it: from a source's last word, or from its status.

Owns that mapping and the words for people. Owns no call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import grpc

from starmesh.migration.terms import GONE
from starmesh.rpc import convert_migration
from starmesh.rpc.status import StatusError
from starmesh.types import Migration
from starmesh.v1 import decode_pb2

_ENDS: Final = {
    decode_pb2.MIGRATION_STAGE_MOVED,
    decode_pb2.MIGRATION_STAGE_STAYED,
    decode_pb2.MIGRATION_STAGE_ENDED,
    decode_pb2.MIGRATION_STAGE_IN_DOUBT,
}
# What a source says that has not begun the migration, or has given it up. After anything else it may be under way.
_REFUSALS: Final = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
}


class Outcome(Enum):
    """What rescheduling remembers of a migration that is over."""

    MOVED = "moved"
    FAILED = "failed"
    """The sequence goes on where it was, or nobody knows where: it rests, and its target is blamed."""
    GONE = "gone"
    """There is no such sequence any more, or its source had its hands full: nothing is remembered."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A migration that is over, ``duration_s`` after its command; ``what`` is for people."""

    migration: Migration
    outcome: Outcome
    what: str
    duration_s: float


def is_end(progress: decode_pb2.MigrateResponse) -> bool:
    """Whether the source says that it is over."""
    return progress.stage in _ENDS


def of_progress(progress: decode_pb2.MigrateResponse) -> tuple[Outcome, str]:
    """The outcome that a source's last word tells."""
    if progress.stage == decode_pb2.MIGRATION_STAGE_MOVED:
        frozen_ms = progress.frozen_duration.ToMilliseconds()
        size_mb = progress.transfer_bytes / 1e6
        return Outcome.MOVED, f"moved: {size_mb:.1f} MB in {progress.rounds} rounds, standing still for {frozen_ms} ms"
    what = decode_pb2.MigrationStage.Name(progress.stage).removeprefix("MIGRATION_STAGE_").lower().replace("_", " ")
    if progress.cause:
        what += f": {convert_migration.cause_words(progress.cause)}"
    if progress.refusal:
        what += f" ({convert_migration.refusal_words(progress.refusal)})"
    return (Outcome.GONE if convert_migration.cause(progress.cause) in GONE else Outcome.FAILED), what


def of_status(status: StatusError, *, begun: bool) -> tuple[Outcome, str] | None:
    """The outcome that a source's status tells; None where the migration may be under way still. ``begun``: the source
    has spoken of it before, so that it may have moved what is not found now."""
    what = f"{status.code.name}: {status.message}"
    # A source that is busy is no fault of the target, nor will it be for long.
    if status.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return (Outcome.FAILED if begun else Outcome.GONE), what
    return (Outcome.FAILED, what) if status.code in _REFUSALS else None

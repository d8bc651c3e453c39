"""Protobuf enums of migrations <-> ``starmesh.types`` and ``starmesh.migration``. Only shape.

A value of a newer peer comes out as None, and what that means is the caller's to say.
"""

from __future__ import annotations

from starmesh.migration.source_record import SourceState
from starmesh.migration.terms import Cause, Refusal
from starmesh.types import MigrationReason
from starmesh.v1 import decode_pb2

_REASONS = {
    MigrationReason.LOAD: decode_pb2.MIGRATION_REASON_LOAD,
    MigrationReason.PREDICTED_LOAD: decode_pb2.MIGRATION_REASON_PREDICTED_LOAD,
    MigrationReason.MEMORY: decode_pb2.MIGRATION_REASON_MEMORY,
    MigrationReason.DRAIN: decode_pb2.MIGRATION_REASON_DRAIN,
    MigrationReason.OPERATOR: decode_pb2.MIGRATION_REASON_OPERATOR,
}
_STAGES = {
    SourceState.RESERVING: decode_pb2.MIGRATION_STAGE_RESERVING,
    SourceState.COPYING: decode_pb2.MIGRATION_STAGE_COPYING,
    SourceState.FREEZING: decode_pb2.MIGRATION_STAGE_FREEZING,
    SourceState.COMMITTING: decode_pb2.MIGRATION_STAGE_COMMITTING,
    SourceState.TAKING_BACK: decode_pb2.MIGRATION_STAGE_TAKING_BACK,
    # Whether it claims or asks is the ledger's doing, not progress.
    SourceState.ASKING: decode_pb2.MIGRATION_STAGE_TAKING_BACK,
    SourceState.MOVED: decode_pb2.MIGRATION_STAGE_MOVED,
    SourceState.STAYED: decode_pb2.MIGRATION_STAGE_STAYED,
    SourceState.ENDED: decode_pb2.MIGRATION_STAGE_ENDED,
    SourceState.IN_DOUBT: decode_pb2.MIGRATION_STAGE_IN_DOUBT,
}
_CAUSES = {
    Cause.REFUSED: decode_pb2.MIGRATION_CAUSE_REFUSED,
    Cause.OUTGROWN: decode_pb2.MIGRATION_CAUSE_OUTGROWN,
    Cause.DECLINED: decode_pb2.MIGRATION_CAUSE_DECLINED,
    Cause.TARGET_SILENT: decode_pb2.MIGRATION_CAUSE_TARGET_SILENT,
    Cause.TIMED_OUT: decode_pb2.MIGRATION_CAUSE_TIMED_OUT,
    Cause.PREEMPTED: decode_pb2.MIGRATION_CAUSE_PREEMPTED,
    Cause.FINISHED: decode_pb2.MIGRATION_CAUSE_FINISHED,
    Cause.CANCELLED: decode_pb2.MIGRATION_CAUSE_CANCELLED,
    Cause.SUPERSEDED: decode_pb2.MIGRATION_CAUSE_SUPERSEDED,
    Cause.OWNER_UNKNOWN: decode_pb2.MIGRATION_CAUSE_OWNER_UNKNOWN,
}
_REFUSALS = {
    Refusal.NO_ROOM: decode_pb2.MIGRATION_REFUSAL_NO_ROOM,
    Refusal.TOO_LONG: decode_pb2.MIGRATION_REFUSAL_TOO_LONG,
    Refusal.NOT_READY: decode_pb2.MIGRATION_REFUSAL_NOT_READY,
    Refusal.TOO_MANY_MIGRATIONS: decode_pb2.MIGRATION_REFUSAL_TOO_MANY_MIGRATIONS,
    Refusal.ALREADY_HERE: decode_pb2.MIGRATION_REFUSAL_ALREADY_HERE,
    Refusal.LAYOUT_MISMATCH: decode_pb2.MIGRATION_REFUSAL_LAYOUT_MISMATCH,
    Refusal.LEDGER_UNAVAILABLE: decode_pb2.MIGRATION_REFUSAL_LEDGER_UNAVAILABLE,
}
_REASONS_BACK = {value: key for key, value in _REASONS.items()}
_CAUSES_BACK = {value: key for key, value in _CAUSES.items()}
_REFUSALS_BACK = {value: key for key, value in _REFUSALS.items()}


def reason_pb(reason: MigrationReason) -> decode_pb2.MigrationReason.ValueType:
    return _REASONS[reason]


def reason(value: decode_pb2.MigrationReason.ValueType) -> MigrationReason | None:
    """None when it is unspecified, too."""
    return _REASONS_BACK.get(value)


def stage_pb(state: SourceState) -> decode_pb2.MigrationStage.ValueType:
    return _STAGES[state]


def cause_pb(cause: Cause | None) -> decode_pb2.MigrationCause.ValueType:
    """None, of a migration that moved its sequence or is under way, is unspecified."""
    return decode_pb2.MIGRATION_CAUSE_UNSPECIFIED if cause is None else _CAUSES[cause]


def cause(value: decode_pb2.MigrationCause.ValueType) -> Cause | None:
    """None when it is unspecified, too."""
    return _CAUSES_BACK.get(value)


def refusal_pb(refusal: Refusal | None) -> decode_pb2.MigrationRefusal.ValueType:
    """None, of a target that takes the sequence, is unspecified."""
    return decode_pb2.MIGRATION_REFUSAL_UNSPECIFIED if refusal is None else _REFUSALS[refusal]


def refusal(value: decode_pb2.MigrationRefusal.ValueType) -> Refusal | None:
    """None when it is unspecified, too."""
    return _REFUSALS_BACK.get(value)


def stage_words(value: decode_pb2.MigrationStage.ValueType) -> str:
    """As ``cause_words``."""
    known = value in decode_pb2.MigrationStage.values()
    return decode_pb2.MigrationStage.Name(value).removeprefix("MIGRATION_STAGE_").lower() if known else str(int(value))


def cause_words(value: decode_pb2.MigrationCause.ValueType) -> str:
    """For people; a newer peer's as its number."""
    known = cause(value)
    return known.value if known is not None else str(int(value))


def refusal_words(value: decode_pb2.MigrationRefusal.ValueType) -> str:
    """As ``cause_words``."""
    known = refusal(value)
    return known.value if known is not None else str(int(value))

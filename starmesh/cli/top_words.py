"""Times, moves and rounds as lines for people in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from starmesh.v1 import cluster_pb2, decode_pb2

_OUTCOMES: Final = {
    cluster_pb2.MIGRATION_OUTCOME_UNDER_WAY: ("under way", "yellow"),
    cluster_pb2.MIGRATION_OUTCOME_MOVED: ("moved", "green"),
    cluster_pb2.MIGRATION_OUTCOME_FAILED: ("failed", "red"),
    cluster_pb2.MIGRATION_OUTCOME_GONE: ("gone", "dim"),
}


def seconds_of(duration: Duration) -> float:
    """A Duration as seconds."""
    return float(duration.seconds) + float(duration.nanos) / 1e9


def span_of(seconds: float) -> str:
    """With two or three figures, in the unit that fits."""
    if seconds < 0.00995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"


def move_line(move: cluster_pb2.RecentMigration) -> Text:
    """How long ago, what, from where to where, why, and how it ended."""
    outcome, style = _OUTCOMES.get(move.outcome, (f"outcome {int(move.outcome)}", ""))
    line = Text.assemble(
        (f"{_ago(move.age):>6} ", "dim"),
        f"{move.request_id} {move.source_instance_id} → {move.target_instance_id} ",
        (outcome, style),
    )
    facts = [_reason(move.reason)] if move.reason else []
    if move.HasField("gap"):
        facts.append(f"gap {span_of(seconds_of(move.gap))}")
    if move.description:
        facts.append(move.description)
    return line.append(f" {', '.join(facts)}" if facts else "")


def round_line(told: cluster_pb2.ReschedulingRound) -> Text:
    """How long ago, who led, what was planned, and why the others stay."""
    ago = (f"{_ago(told.age):>6} ", "dim")
    stayed = ", ".join(filter(None, (_counted(told.skipped_sequences), _counted(told.skipped_instances))))
    if not told.planned_moves:
        many = f"{told.rounds} rounds" if told.rounds != 1 else "1 round"
        why = f" ({stayed})" if stayed else ""
        return Text.assemble(ago, (f"{many} by {told.leader_instance_id}: nothing to move{why}", "dim"))
    reasons: dict[str, int] = {}
    for move in told.moves:
        reasons[_reason(move.reason)] = reasons.get(_reason(move.reason), 0) + 1
    return Text.assemble(
        ago,
        (f"{told.policy} moves {told.planned_moves}", "bold"),
        f" ({_counted(reasons)}), spread {told.spread_before_tokens:.0f} → {told.spread_after_tokens:.0f} tokens",
        f"; stay: {stayed}" if stayed else "",
    )


def _ago(age: Duration) -> str:
    seconds = seconds_of(age)
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _reason(reason: decode_pb2.MigrationReason.ValueType) -> str:
    if reason not in decode_pb2.MigrationReason.values():
        return f"reason {int(reason)}"  # of a newer router
    return decode_pb2.MigrationReason.Name(reason).removeprefix("MIGRATION_REASON_").lower().replace("_", " ")


def _counted(counts: Mapping[str, int]) -> str:
    """The most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in ordered)

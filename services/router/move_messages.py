"""Moves and rounds as messages: what this router has seen of its streams, and what the rescheduler has shown, as one.

Owns which of the two tells what of a migration that both know. Owns neither source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.router.seen_moves import MAX_MOVES, SeenMove
from starmesh.rounds import MoveOutcome, RoundMove, RoundSummary
from starmesh.rpc.convert import duration_pb
from starmesh.rpc.convert_migration import reason_pb
from starmesh.v1 import cluster_pb2

_OUTCOMES = {
    MoveOutcome.UNDER_WAY: cluster_pb2.MIGRATION_OUTCOME_UNDER_WAY,
    MoveOutcome.MOVED: cluster_pb2.MIGRATION_OUTCOME_MOVED,
    MoveOutcome.FAILED: cluster_pb2.MIGRATION_OUTCOME_FAILED,
    MoveOutcome.GONE: cluster_pb2.MIGRATION_OUTCOME_GONE,
}


def round_messages(
    rounds: Iterable[RoundSummary], moves: Sequence[SeenMove], *, now_s: float
) -> list[cluster_pb2.ReschedulingRound]:
    """The rounds, the newest first as they come; ``now_s`` is on the ledger's clock. A move that was planned again, for
    it had not succeeded, has been seen only the last time."""
    unclaimed = list(moves)
    return [_round(shown, unclaimed, now_s) for shown in rounds]


def move_messages(
    rounds: Sequence[cluster_pb2.ReschedulingRound], moves: Sequence[SeenMove], *, now_s: float
) -> list[cluster_pb2.RecentMigration]:
    """All moves of the rounds and all that were seen, each once, the newest first; ``now_s`` is on the clock of
    ``moves``."""
    planned = [message for shown in rounds for message in shown.moves]
    known = {_ends(message) for message in planned}
    seen = [_seen(move, now_s) for move in moves]
    messages = planned + [message for message in seen if _ends(message) not in known]
    return sorted(messages, key=lambda message: message.age.ToNanoseconds())[:MAX_MOVES]


def _ends(message: cluster_pb2.RecentMigration) -> tuple[str, str, str, int]:
    return (message.request_id, message.source_instance_id, message.target_instance_id, message.epoch)


def _round(shown: RoundSummary, unclaimed: list[SeenMove], now_s: float) -> cluster_pb2.ReschedulingRound:
    """Takes from ``unclaimed`` what has become of its moves."""
    age = duration_pb(max(0.0, now_s - shown.last_s))
    message = cluster_pb2.ReschedulingRound(
        leader_instance_id=shown.leader,
        leader_term=shown.term,
        policy=shown.policy,
        first_age=duration_pb(max(0.0, now_s - shown.first_s)),
        age=age,
        rounds=shown.rounds,
        instances=shown.instances,
        spread_before_tokens=shown.spread_before_tokens,
        spread_after_tokens=shown.spread_after_tokens,
        planned_moves=shown.planned_moves,
        skipped_instances=shown.skipped_instances,
        skipped_sequences=shown.skipped_sequences,
    )
    for move in shown.moves:
        seen = next((seen for seen in unclaimed if seen.is_of(move.migration)), None)
        if seen is not None:
            unclaimed.remove(seen)
        planned = _planned(move, seen)
        planned.age.CopyFrom(age)
        message.moves.append(planned)
    return message


def _planned(move: RoundMove, seen: SeenMove | None) -> cluster_pb2.RecentMigration:
    """A stream that has gone along says more than a leader that has lost sight of the move."""
    migration = move.migration
    outcome = MoveOutcome.MOVED if seen is not None else move.outcome
    message = cluster_pb2.RecentMigration(
        request_id=migration.request_id,
        source_instance_id=migration.source,
        target_instance_id=migration.target,
        epoch=migration.epoch,
        reason=reason_pb(migration.reason),
        outcome=_OUTCOMES[outcome],
        description=move.words if outcome is move.outcome else "",
        gain_tokens=migration.gain_tokens,
    )
    if seen is not None:
        _add_seen(message, seen)
    return message


def _seen(move: SeenMove, now_s: float) -> cluster_pb2.RecentMigration:
    message = cluster_pb2.RecentMigration(
        request_id=move.request_id,
        source_instance_id=move.source,
        target_instance_id=move.target,
        epoch=move.source_epoch,
        outcome=cluster_pb2.MIGRATION_OUTCOME_MOVED,
        age=duration_pb(max(0.0, now_s - move.at_s)),
    )
    if move.reason is not None:
        message.reason = reason_pb(move.reason)
    _add_seen(message, move)
    return message


def _add_seen(message: cluster_pb2.RecentMigration, move: SeenMove) -> None:
    message.output_tokens = move.output_tokens
    if move.gap_s is not None:
        message.gap.CopyFrom(duration_pb(move.gap_s))

"""One migration as its client saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starmesh.v1 import decode_pb2

Told = Sequence[tuple[float, decode_pb2.MigrateResponse]]
"""What a source tells of a migration, with the times of its arrival."""


@dataclass(frozen=True, slots=True)
class Move:
    """Seconds on ``time.perf_counter``.

    ``gap_s`` is the time between the last token from the source and the first from the target, ``itl_s`` the median
    time between two tokens around it. ``copying_s`` says when the first copy round began and the last one was over
    (equal without any). ``frozen_s`` is the source's own account: in no batch from freeze to the target's answer.
    """

    resident_tokens: int
    gap_s: float
    itl_s: float
    copying_s: tuple[float, float]
    copied_bytes: int
    tail_bytes: int
    rounds: int
    frozen_s: float

    @property
    def copy_s(self) -> float:
        return self.copying_s[1] - self.copying_s[0]


class MoveFailed(Exception):
    """A migration did not move its sequence."""


def check_moved(told: Told, what: str) -> None:
    """Raise MoveFailed, with how far it came, unless it has moved."""
    start_s, end = told[0][0], told[-1][1]
    if end.stage != decode_pb2.MIGRATION_STAGE_MOVED:
        stages = ", ".join(f"{decode_pb2.MigrationStage.Name(one.stage)} {at_s - start_s:.3f} s" for at_s, one in told)
        raise MoveFailed(f"{what}: {decode_pb2.MigrationCause.Name(end.cause)}; {stages}")


def copying(told: Told) -> tuple[tuple[float, float], decode_pb2.MigrateResponse]:
    """When the copy rounds began and were over, and what the source told at their end."""
    end_s, end = next((at_s, one) for at_s, one in told if one.stage == decode_pb2.MIGRATION_STAGE_FREEZING)
    begins = (at_s for at_s, one in told if one.stage == decode_pb2.MIGRATION_STAGE_COPYING)
    return (next(begins, end_s), end_s), end

"""The moves of this router's requests between decode instances, as their streams have changed owner.

Owns the list, bounded, and the gap that each client has seen. Owns no stream (``follower``) and no word of moves that
came to nothing, which a router does not hear of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from services.router.flight import Flight
from starmesh.types import Migration, MigrationReason

MAX_MOVES: Final = 64


@dataclass(frozen=True, slots=True)
class SeenMove:
    """A request has gone on at ``target``. ``source_epoch`` is the epoch under which ``source`` owned it; ``reason`` is
    None where this router does not know it. ``gap_s`` lies between the last token before the move and the first one
    after it, None while that has not come."""

    request_id: str
    source: str
    target: str
    source_epoch: int
    at_s: float
    output_tokens: int
    reason: MigrationReason | None = None
    gap_s: float | None = None

    def is_of(self, migration: Migration) -> bool:
        """Whether it is what has become of a migration that a round has planned."""
        planned = (migration.request_id, migration.source, migration.target, migration.epoch)
        return planned == (self.request_id, self.source, self.target, self.source_epoch)


class SeenMoves:
    """The last ``MAX_MOVES``."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        """``now_s`` is the clock that flights go by."""
        self._now_s = now_s
        self._moves: dict[int, SeenMove] = {}
        """By count, in order: the oldest first."""
        self._count = 0
        self._ordered: deque[tuple[str, str, str]] = deque(maxlen=MAX_MOVES)

    def __iter__(self) -> Iterator[SeenMove]:
        """The newest first."""
        return reversed(self._moves.values())

    def ordered(self, request_id: str, source: str, target: str) -> None:
        """An operator has ordered a move here: should it be seen, this is why."""
        self._ordered.append((request_id, source, target))

    def note(self, flight: Flight, *, source: str, target: str, epoch: int, draining: bool) -> None:
        """A request's stream goes on at ``target`` under ``epoch``. ``draining``: its source is to be empty."""
        ends = (flight.request_id, source, target)
        reason = MigrationReason.DRAIN if draining else None
        if ends in self._ordered:
            self._ordered.remove(ends)
            reason = MigrationReason.OPERATOR
        tokens = len(flight.stream.token_ids)
        number, before_s = self._count, flight.last_token_s
        self._moves[number] = SeenMove(*ends, epoch - 1, self._now_s(), tokens, reason)
        self._count += 1
        self._moves.pop(number - MAX_MOVES, None)

        def resumed(at_s: float) -> None:
            move = self._moves.get(number)
            if move is not None and before_s is not None:
                self._moves[number] = replace(move, gap_s=at_s - before_s)

        flight.on_next_token = resumed

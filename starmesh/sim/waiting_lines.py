"""Who waits at which decode instance for memory, where each is placed at once (``Strategy.admit_all``).

Owns the order, first come first served at each instance, and when the first is offered to it: when it comes, and again
each time something there has ended, since until then a full instance stays full. Owns no handoff: ``offer`` begins one,
and whoever began it says how it went.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")


@dataclass(slots=True)
class _Line(Generic[Waiter]):
    """``ends`` counts what has ended at the instance, ``offered_at`` is that count when the first was offered to it."""

    waiters: deque[Waiter] = field(default_factory=deque)
    ends: int = 0
    offered_at: int = 0
    refused: bool = False


class WaitingLines(Generic[Waiter]):
    """The lines by instance. ``offer`` is called with the first of one; ``taken`` or ``refused`` answers, or the waiter
    leaves."""

    def __init__(self, offer: Callable[[Waiter], None]) -> None:
        self._offer = offer
        self._lines: defaultdict[str, _Line[Waiter]] = defaultdict(_Line)

    def join(self, instance_id: str, waiter: Waiter) -> None:
        """Wait there, behind those that do."""
        line = self._lines[instance_id]
        line.waiters.append(waiter)
        if len(line.waiters) == 1:
            self._offer_first(line)

    def taken(self, instance_id: str) -> None:
        """The first has its place."""
        line = self._lines[instance_id]
        line.waiters.popleft()
        self._offer_first(line)

    def refused(self, instance_id: str) -> None:
        """There was no room for the first."""
        line = self._lines[instance_id]
        if line.ends == line.offered_at:
            line.refused = True
        else:  # something has ended while the refusal was on its way
            self._offer_first(line)

    def freed(self, instance_id: str) -> None:
        """Something has ended there, or the instance itself."""
        line = self._lines[instance_id]
        line.ends += 1
        if line.refused:
            self._offer_first(line)

    def leave(self, instance_id: str, waiter: Waiter) -> None:
        """Wait there no more, if it does."""
        line = self._lines[instance_id]
        if waiter not in line.waiters:
            return
        first = line.waiters[0] == waiter
        line.waiters.remove(waiter)
        if first:
            self._offer_first(line)

    def _offer_first(self, line: _Line[Waiter]) -> None:
        line.refused = False
        line.offered_at = line.ends
        if line.waiters:
            self._offer(line.waiters[0])

"""The queue of samples that wait for a forward: bounded over all callers, the newest are kept.

Owns order, bound and batches. Pure: owns no waiting and no forward. An estimate is worth the less the older its sample,
and a sequence that lost one sends another twenty tokens later, so when the queue is full the oldest sample goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Call = TypeVar("Call", bound=Hashable)
Version = TypeVar("Version")


class SampleQueue(Generic[Call, Version]):
    """Rows of calls, first in first out, each for one version of the predictor. Every operation takes constant time for
    each row concerned."""

    def __init__(self, capacity: int) -> None:
        """Raises ValueError for a queue that holds nothing."""
        if capacity < 1:
            raise ValueError(f"a queue of {capacity} samples holds none")
        self._capacity = capacity
        self._rows: OrderedDict[tuple[Call, int], Version] = OrderedDict()
        self._queued: dict[Call, set[int]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def push(self, call: Call, row: int, version: Version) -> tuple[Call, int] | None:
        """Queue a row. Returns the oldest one, which it dropped, when the queue was full."""
        dropped = None
        if len(self._rows) >= self._capacity:
            dropped, _ = self._pop()
        self._rows[call, row] = version
        self._queued.setdefault(call, set()).add(row)
        return dropped

    def take(self, limit: int) -> tuple[Version | None, list[tuple[Call, int]]]:
        """The oldest rows, at most ``limit``, that are for the version of the oldest; None of an empty queue."""
        taken: list[tuple[Call, int]] = []
        version: Version | None = None
        while self._rows and len(taken) < limit:
            oldest = next(iter(self._rows.values()))
            if taken and oldest is not version:
                break
            entry, version = self._pop()
            taken.append(entry)
        return version, taken

    def discard(self, call: Call) -> int:
        """Forget the rows of a call that has gone. Returns how many there were."""
        rows = self._queued.pop(call, set())
        for row in rows:
            del self._rows[call, row]
        return len(rows)

    def _pop(self) -> tuple[tuple[Call, int], Version]:
        (call, row), version = self._rows.popitem(last=False)
        queued = self._queued[call]
        queued.discard(row)
        if not queued:
            del self._queued[call]
        return (call, row), version

"""Clocks. Pure code takes time as data; shells take a ``Clock``, so that tests and the simulator own time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic seconds."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move on by ``seconds``. Raises ValueError for a negative amount."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back ({seconds} s)")
        self._now_s += seconds

    def reach(self, when_s: float) -> None:
        """Go to ``when_s`` exactly: a sum of small advances would round. Raises ValueError for a time that is past."""
        if when_s < self._now_s:
            raise ValueError(f"a clock does not go back (from {self._now_s} to {when_s} s)")
        self._now_s = when_s

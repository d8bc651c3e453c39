"""Discrete events on virtual time: what happens when, in an order that nothing but the run itself decides.

Owns the queue and the clock. Knows nothing of clusters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from starmesh.clock import VirtualClock


class Event:
    """Something that will happen once at ``at_s``, unless it is cancelled."""

    __slots__ = ("at_s", "do")

    def __init__(self, at_s: float, do: Callable[[], None]) -> None:
        self.at_s = at_s
        self.do: Callable[[], None] | None = do

    def cancel(self) -> None:
        """Have it not happen; too late or twice is as good as never."""
        self.do = None


class EventLoop:
    """Runs events by time, those of one moment by their ``order``, and those of one order as they were asked for.

    What an instance does by itself has an order of its own above 0, so that it comes after whatever else happens at
    that moment, whenever it was asked for: a leap asks for fewer events than the steps that it stands for.
    """

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self._queue: list[tuple[float, int, int, Event]] = []
        self._asked = 0
        self._reached = 0  # the highest order of this moment's events so far

    @property
    def now_s(self) -> float:
        """Virtual seconds since the run began."""
        return self.clock.now_s()

    def passed(self, when_s: float, order: int) -> bool:
        """Whether an event of this order would have begun by now. To be asked within an event."""
        return when_s < self.now_s or (when_s == self.now_s and order <= self._reached)

    def at(self, when_s: float, do: Callable[[], None], *, order: int = 0) -> Event:
        """Have ``do`` called at ``when_s``. Raises ValueError for a time that is past."""
        if when_s < self.now_s:
            raise ValueError(f"{when_s} s is past, it is {self.now_s} s")
        event = Event(when_s, do)
        self._asked += 1
        heapq.heappush(self._queue, (when_s, order, self._asked, event))
        return event

    def after(self, delay_s: float, do: Callable[[], None]) -> Event:
        """Have ``do`` called ``delay_s`` from now."""
        return self.at(self.now_s + delay_s, do)

    def turn(self) -> bool:
        """Let the next event happen; whether there was one."""
        while self._queue:
            when_s, order, _, event = heapq.heappop(self._queue)
            if event.do is None:
                continue
            do, event.do = event.do, None
            self._reached = max(self._reached, order) if when_s == self.now_s else order
            self.clock.reach(when_s)
            do()
            return True
        return False

    @property
    def next_s(self) -> float | None:
        """When the next event will happen; None when none will."""
        while self._queue and self._queue[0][3].do is None:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

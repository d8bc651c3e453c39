"""Lets the time of steps pass on the real clock.

Owns when a step is due to end. A busy engine's next step begins where the last one was due to end, however long
scheduling, delivery or an oversleep took meanwhile: so errors do not add up, and a step's time holds all that is done
for it, as it does on a GPU whose host works ahead. An engine that falls behind catches up, but for what is more than
``max_backlog_s`` late: that much of the emulated time is lost, and the log says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

MAX_BACKLOG_S: Final = 0.25
"""How far behind steps are made up for. Our choice: rides out a pause of the machine, and no sequence gets a burst of
tokens that a client could take for the hardware's."""

UNNOTICED_S: Final = 0.002
"""An engine that begins a step so soon after another has not been idle, as far as anybody can tell: so long takes the
engine's own work between the steps of prompts that wait for each other. Our choice."""

REPORT_INTERVAL_S: Final = 30.0
TOLERATED_LOSS: Final = 0.02
"""The part of the time that may be lost before the log says so."""


class StepPace:
    """``clock`` gives monotonic seconds and ``sleep`` waits; both are the machine's unless a test says otherwise."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._due_s = clock()
        self._report_s = self._due_s + REPORT_INTERVAL_S
        self._asked_s = 0.0
        self._lost_s = 0.0

    @property
    def lost_s(self) -> float:
        """Time that steps took beyond what they should have, and that was not made up for, since the last report."""
        return self._lost_s

    def begin(self, *, busy: bool) -> None:
        """A step begins; ``busy``: known to follow another at once."""
        now_s = self._clock()
        late_s = now_s - self._due_s
        if late_s > UNNOTICED_S and not busy:
            self._due_s = now_s
        elif late_s > MAX_BACKLOG_S:
            self._lost_s += late_s - MAX_BACKLOG_S
            self._due_s = now_s - MAX_BACKLOG_S

    def wait(self, seconds: float) -> None:
        """Let the step's time pass: return when it is due to end."""
        self._due_s += seconds
        self._asked_s += seconds
        now_s = self._clock()
        if now_s < self._due_s:
            self._sleep(self._due_s - now_s)
        if now_s >= self._report_s:
            self._report(now_s)

    def _report(self, now_s: float) -> None:
        if self._lost_s > TOLERATED_LOSS * self._asked_s:
            log.warning(
                "steps took %.0f %% longer than emulated: this machine is too busy; use a lower --speed, or fewer or "
                "smaller instances",
                100 * self._lost_s / self._asked_s,
            )
        self._report_s = now_s + REPORT_INTERVAL_S
        self._asked_s = self._lost_s = 0.0

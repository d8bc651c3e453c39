"""What a client does next about a failed call: read on, begin anew from the tokens it has, or give up. Pure.

Two kinds of failure. The router's word (a status with its details) says whether and when to ask again. A connection
that broke says nothing of the request: it goes on at the router, which keeps it for its resume window, so the first
thing is to read on there at once; a router that cannot be reached then is taken for dead, and another goes on from the
tokens that are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from starmesh.rpc.status import StatusError

_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, and after how long. ``max_retries`` counts the delays in a row after which no token came. One is drawn
    from the upper half of ``first_delay_s``, doubled each time up to ``max_delay_s``, and comes on top of what the
    router asks for."""

    max_retries: int = 10
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call ended. ``broken``: the connection's doing, not the router's word."""

    status: StatusError
    broken: bool


@dataclass(frozen=True, slots=True)
class ReadOn:
    """Resume the request at its router, after so long."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Anew:
    """Begin another request behind the tokens that are here, after so long, ``elsewhere`` if need be."""

    delay_s: float
    elsewhere: bool


Step = ReadOn | Anew | None
"""None: give up."""


class Retrying:
    """One request's."""

    def __init__(self, policy: RetryPolicy, *, resumable: bool, routers: int, draw: Callable[[], float]) -> None:
        """``routers`` is how many there are to ask. ``draw`` gives random numbers in [0, 1)."""
        self._policy = policy
        self._resumable = resumable
        self._routers = routers
        self._draw = draw
        self._reading_on = False
        self._begun_anew = 0
        self._delays = 0

    def progressed(self) -> None:
        """Tokens have come."""
        self._reading_on = False
        self._begun_anew = self._delays = 0

    def after(self, failure: Failure) -> Step:
        """What to do about the last call's end."""
        status = failure.status
        reading_on, self._reading_on = self._reading_on, False
        lost = reading_on and status.code is grpc.StatusCode.NOT_FOUND and not failure.broken
        told_to_wait = status.code in _RETRIED and status.retry_delay_s is not None
        if not (failure.broken or lost or told_to_wait):
            return None
        if failure.broken and self._resumable and not reading_on:
            self._reading_on = True
            return ReadOn(0.0)
        elsewhere = self._routers > 1 and not lost
        # At once where nothing speaks against it: at a router that is up again without a memory of the request, and at
        # others that have not been asked. What room there is on the instances, all of them know.
        full = status.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not failure.broken
        at_once = (lost or (elsewhere and not full)) and self._begun_anew < max(1, self._routers - 1)
        if not at_once and self._delays >= self._policy.max_retries:
            return None
        delay_s = 0.0 if at_once else self._delay_s(status.retry_delay_s)
        if failure.broken and self._resumable and not elsewhere:
            self._reading_on = True
            return ReadOn(delay_s)
        self._begun_anew += 1
        return Anew(delay_s, elsewhere=elsewhere)

    def _delay_s(self, told_s: float | None) -> float:
        policy, drawn = self._policy, self._draw()
        back_off_s = min(policy.max_delay_s, policy.first_delay_s * 2.0 ** min(self._delays, 30))
        self._delays += 1
        # Never less than told, and not all clients at once.
        return (told_s or 0.0) * (1.0 + 0.25 * drawn) + back_off_s * (0.5 + 0.5 * drawn)

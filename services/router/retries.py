"""How often and after how long a request is tried again. Pure.

Two kinds of trouble. An instance without room is waited for: by a request that has begun as long as its deadline
allows, by a new one only so long. Anything else counts as a failure, and failures are bounded: a request that kills or
confuses every instance that it meets must not go round for ever.
"""

from __future__ import annotations

import grpc

from starmesh.rpc.status import StatusError, retry_later

RETRY_DELAY_S = 1.0
NO_CAPACITY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)

_FIRST_S = 0.05
_MOST_S = 1.0


class Retries:
    """One request's."""

    def __init__(self, *, max_failures: int, give_up_s: float) -> None:
        """A request that has not begun waits for room until ``give_up_s``."""
        self._max_failures = max_failures
        self._give_up_s = give_up_s
        self._failures = 0
        self._refusals = 0

    def after_refusal(self, error: StatusError, now_s: float, *, started: bool) -> float:
        """Seconds to wait for room. Raises StatusError when a request that has not begun has waited enough."""
        if not started and now_s >= self._give_up_s:
            raise retry_later(error.code, "no instance has room; try again later", RETRY_DELAY_S)
        self._refusals += 1
        return _back_off_s(self._refusals)

    def after_failure(self) -> float:
        """Seconds to wait before the next try. Raises StatusError when there have been enough."""
        self._failures += 1
        if self._failures > self._max_failures:
            raise retry_later(
                grpc.StatusCode.UNAVAILABLE,
                f"gave up after {self._failures} failed tries on this cluster; try again later",
                RETRY_DELAY_S,
            )
        return _back_off_s(self._failures)


def _back_off_s(times: int) -> float:
    """Doubling: an instance that is briefly full is asked again soon, one that stays full is not pestered."""
    return float(min(_MOST_S, _FIRST_S * 2 ** min(times - 1, 10)))

"""When each request got its last token, and the longest that it ever waited for one.

Owns these times over all instances, so that the gap of a handoff or a migration is seen at the first token after it.
Counts nothing over requests: ``measurements`` does.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class TokenTimes:
    """By request id; up to date for a request whenever an instance tells of an output of it or answers a call."""

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}
        self._longest_gap_s: dict[str, float] = {}

    def tokens(self, request_ids: Iterable[str], ends_s: npt.NDArray[np.float64]) -> list[float]:
        """Each of these requests got a token at each of ``ends_s`` (ascending, at least one).

        Returns the gap before the first of them for each request that had a token before, in order; the gaps between
        are the differences of ``ends_s``.
        """
        first_s, last_s = float(ends_s[0]), float(ends_s[-1])
        longest_s = float(np.max(ends_s[1:] - ends_s[:-1])) if len(ends_s) > 1 else 0.0
        gaps_s = []
        for request_id in request_ids:
            before_s = self._last_s.get(request_id)
            self._last_s[request_id] = last_s
            gap_s = longest_s
            if before_s is not None:
                gaps_s.append(first_s - before_s)
                gap_s = max(gap_s, gaps_s[-1])
            if gap_s > self._longest_gap_s.get(request_id, 0.0):
                self._longest_gap_s[request_id] = gap_s
        return gaps_s

    def forget(self, request_id: str) -> float:
        """The longest gap between two tokens of a request that has ended, in seconds; 0 for one without any."""
        self._last_s.pop(request_id, None)
        return self._longest_gap_s.pop(request_id, 0.0)

"""When each request got its last token, and the longest that it ever waited for one.

Owns these times over all instances, so that the gap of a handoff or a migration is seen at the first token after it.
Counts nothing over requests: ``measurements`` does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


class TokenTimes:
    """By request id; up to date for a request once the instance has told that it has left its batch."""

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}
        self._longest_gap_s: dict[str, float] = {}

    def token(self, request_ids: Iterable[str], at_s: float) -> list[float]:
        """Each of these requests got a token at ``at_s``. Returns the gap before it for each that had one before, in
        order."""
        gaps_s = []
        for request_id in request_ids:
            before_s = self._last_s.get(request_id)
            self._last_s[request_id] = at_s
            if before_s is None:
                continue
            gaps_s.append(at_s - before_s)
            if gaps_s[-1] > self._longest_gap_s.get(request_id, 0.0):
                self._longest_gap_s[request_id] = gaps_s[-1]
        return gaps_s

    def catch_up(self, request_id: str, last_s: float, longest_gap_s: float) -> None:
        """This request has got tokens up to ``last_s``, no further apart than ``longest_gap_s``."""
        self._last_s[request_id] = last_s
        if longest_gap_s > self._longest_gap_s.get(request_id, 0.0):
            self._longest_gap_s[request_id] = longest_gap_s

    def forget(self, request_id: str) -> float:
        """The longest gap between two tokens of a request that has ended, in seconds; 0 for one without any."""
        self._last_s.pop(request_id, None)
        return self._longest_gap_s.pop(request_id, 0.0)


class SharedTimes:
    """The token times of the requests of one batch, which get their tokens together.

    They are kept once for all. Of each request it is known since which of the gaps it takes part; of the gaps, only
    those that are longer than all that came after them.
    """

    def __init__(self, times: TokenTimes) -> None:
        self._times = times
        self._request_ids: list[str] = []
        self._since: dict[str, int] = {}  # of each request: the gaps that were over when it joined
        self._last_s = 0.0
        self._gaps = 0
        self._peaks: list[tuple[int, float]] = []  # number and length: numbers rise, lengths fall

    def tokens(self, request_ids: list[str], ends_s: Times) -> list[tuple[Times, int]]:
        """Each of these requests got a token at each of ``ends_s`` (ascending, at least one). The very same list as the
        last time says that nobody has left or joined.

        Returns gaps between tokens, and for how many requests each is.
        """
        gaps: list[tuple[Times, int]] = []
        if request_ids is not self._request_ids:
            self.keep(request_ids)
            self._request_ids = request_ids
            joining = [request_id for request_id in request_ids if request_id not in self._since]
            if joining:
                staying = len(self._since)
                if staying:
                    gaps.append((ends_s[:1] - self._last_s, staying))
                    self._note(float(gaps[0][0][0]))
                self._last_s = float(ends_s[0])
                first_gaps_s = self._times.token(joining, self._last_s)
                if first_gaps_s:
                    gaps.append((np.array(first_gaps_s), 1))
                self._since.update(dict.fromkeys(joining, self._gaps))
                ends_s = ends_s[1:]
        if len(ends_s):
            gaps_s = np.empty(len(ends_s))
            gaps_s[0] = ends_s[0] - self._last_s
            np.subtract(ends_s[1:], ends_s[:-1], out=gaps_s[1:])
            gaps.append((gaps_s, len(request_ids)))
            self._last_s = float(ends_s[-1])
            self._note(float(gaps_s.max()))
        return gaps

    def keep(self, request_ids: Collection[str]) -> None:
        """All others have left the batch: bring ``TokenTimes`` up to date for them."""
        staying = set(request_ids)
        for request_id in [request_id for request_id in self._since if request_id not in staying]:
            first = bisect_left(self._peaks, (self._since.pop(request_id), 0.0))
            if first < len(self._peaks):
                self._times.catch_up(request_id, self._last_s, self._peaks[first][1])
        self._request_ids = []
        if not self._since:
            self._peaks.clear()

    def _note(self, gap_s: float) -> None:
        while self._peaks and self._peaks[-1][1] <= gap_s:
            self._peaks.pop()
        self._peaks.append((self._gaps, gap_s))
        self._gaps += 1

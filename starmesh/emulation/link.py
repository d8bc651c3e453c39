"""The link through which an emulated instance pulls KV: real bytes pass as fast as they can, and then wait for the time
that the emulated ones would take.

Owns the time of transfers that share a link, equally. Only the end that pulls is emulated: what a source's link slows
down when many pull from it at once is not.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple


class _Flow(NamedTuple):
    """A transfer; over when the link has given each of its flows ``ends_at_bytes`` in all. ``number`` is its own."""

    ends_at_bytes: float
    number: int
    over: asyncio.Future[None]


class SharedLink:
    """A link of ``bytes_per_s``. Belongs to one event loop."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._flows: list[_Flow] = []  # a heap
        self._flows_so_far = 0
        self._given_bytes = 0.0  # to each flow that has been there all along
        self._as_of_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def transfer(self, size_bytes: int) -> AsyncIterator[None]:
        """Lasts at least as long as ``size_bytes`` take on the link; one that fails or is cancelled leaves it."""
        self._pass_time()
        self._flows_so_far += 1
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        flow = _Flow(self._given_bytes + size_bytes, self._flows_so_far, over)
        heapq.heappush(self._flows, flow)
        self._set_timer()
        try:
            yield
            await over
        finally:
            if flow in self._flows:
                self._pass_time()
                self._flows.remove(flow)
                heapq.heapify(self._flows)
                self._set_timer()

    def _pass_time(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._flows:
            self._given_bytes += (now_s - self._as_of_s) * self._bytes_per_s / len(self._flows)
        else:
            self._given_bytes = 0.0
        self._as_of_s = now_s

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flows:
            left_bytes = max(0.0, self._flows[0].ends_at_bytes - self._given_bytes) * len(self._flows)
            self._timer = asyncio.get_running_loop().call_later(left_bytes / self._bytes_per_s, self._end_first)

    def _end_first(self) -> None:
        self._pass_time()
        first = heapq.heappop(self._flows)
        if not first.over.done():
            first.over.set_result(None)
        self._set_timer()

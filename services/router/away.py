"""Requests whose client is away: its stream broke or ended, and until their resume window ends it may come back.

Owns for how long and how many. A request that still runs costs an instance's room, so there may be only so many; one
that has ended costs memory, by the token. Beyond either bound the one goes that has waited longest: its client, if it
comes, finds nothing, as after the window. Owns no request's course (``router``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from services.router.flight import Flight

# What the objects of a request take beside its tokens, in tokens of some 36 bytes.
_REQUEST_TOKENS: Final = 64


@dataclass(eq=False, slots=True)
class Entry:
    """A request id in use: until nobody will read its answer any more and its life has cleaned up."""

    flight: Flight
    task: asyncio.Task[None]
    closed: bool = False
    """Whether no client will read any more."""
    away: bool = False
    """Whether none reads now, but one may come back."""
    admission: ExitStack = field(default_factory=ExitStack)
    """Counts against the limits of its API key until its life has ended and nobody reads: also while a client is away,
    which could otherwise begin any number."""


class Away:
    """The entries whose clients are away."""

    def __init__(self, *, max_running: int, max_kept_tokens: int, give_up: Callable[[Entry], None]) -> None:
        """``give_up`` ends an entry whose client will not come back; it calls ``leave_off`` itself."""
        self._max_running = max_running
        self._max_kept_tokens = max_kept_tokens
        self._give_up = give_up
        self._windows: dict[Entry, asyncio.TimerHandle] = {}
        # Both by request id, those that have waited longest first.
        self._running: dict[str, Entry] = {}
        self._kept: dict[str, Entry] = {}
        self.kept_tokens = 0
        """What the answers that are complete weigh together."""

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def running(self) -> int:
        """Those of them that have not ended."""
        return len(self._running)

    @property
    def kept(self) -> int:
        """Those whose answers are complete."""
        return len(self._kept)

    def find(self, request_id: str) -> Entry | None:
        """The entry of that id, if its client is away."""
        return self._running.get(request_id) or self._kept.get(request_id)

    def wait(self, entry: Entry) -> None:
        """Wait for the client of an entry, for the length of its resume window."""
        flight = entry.flight
        loop = asyncio.get_running_loop()
        self._windows[entry] = loop.call_later(flight.resume_window_s, self._give_up, entry)
        if flight.ended:
            # What still runs is its clean-up, which takes no room of an instance.
            self._keep(entry)
            return
        self._running[flight.request_id] = entry
        if len(self._running) > self._max_running:
            self._give_up(next(iter(self._running.values())))

    def ended(self, entry: Entry) -> None:
        """An entry that waits does not run any more. Without effect on one that was told of before."""
        if self._running.pop(entry.flight.request_id, None) is not None:
            self._keep(entry)

    def leave_off(self, entry: Entry) -> None:
        """Wait for its client no longer. Without effect on an entry that does not wait."""
        window = self._windows.pop(entry, None)
        if window is None:
            return
        window.cancel()
        request_id = entry.flight.request_id
        if self._running.pop(request_id, None) is None:
            del self._kept[request_id]
            self.kept_tokens -= _weight(entry)

    def clear(self) -> None:
        """Wait for nobody any more."""
        for entry in list(self._windows):
            self._give_up(entry)

    def _keep(self, entry: Entry) -> None:
        """Keep an answer that is complete, as long as there is room for all of them."""
        self._kept[entry.flight.request_id] = entry
        self.kept_tokens += _weight(entry)
        while self.kept_tokens > self._max_kept_tokens:
            self._give_up(next(iter(self._kept.values())))


def _weight(entry: Entry) -> int:
    return len(entry.flight.stream.token_ids) + _REQUEST_TOKENS

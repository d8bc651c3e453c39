"""Which instance owns a sequence: the ledger's entries, changed by compare-and-set only, but for a router's own.

Owns the entries and the time that a question or a claim takes. An entry does not expire, for routers renew theirs, and
the ledger of a simulation always answers. The whole latency lies before the look or the change, so that what is
answered is so at that moment.
"""

from __future__ import annotations

from collections.abc import Callable

from starmesh.migration.terms import OwnerIs
from starmesh.sim.events import Event, EventLoop
from starmesh.types import Ownership

LEDGER_S = 0.0005
"""Seconds that a call to the ledger takes: Redis in the same rack."""


class Owners:
    """Entries by request id."""

    def __init__(self, loop: EventLoop, *, latency_s: float = LEDGER_S) -> None:
        self._loop = loop
        self._latency_s = latency_s
        self._entries: dict[str, Ownership] = {}

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._entries)

    def owner(self, request_id: str) -> Ownership | None:
        """Who owns it, as only an onlooker knows at once."""
        return self._entries.get(request_id)

    def assign(self, request_id: str, instance_id: str, epoch: int) -> None:
        """A router's claim, for a sequence that begins or begins anew; done at once, as its time is the router's to
        model. Raises ValueError for an epoch that is not newer."""
        present = self._entries.get(request_id)
        if present is not None and present.epoch >= epoch:
            raise ValueError(f"{request_id} is owned under epoch {present.epoch}, which {epoch} does not follow")
        self._entries[request_id] = Ownership(instance_id, epoch)

    def claim(self, request_id: str, expected: Ownership, new: Ownership, answer: Callable[[OwnerIs], None]) -> Event:
        """Make ``new`` the owner if ``expected`` is; ``answer`` hears who owns it then. A claim whose event is
        cancelled has not reached the ledger."""

        def exchange() -> None:
            if self._entries.get(request_id) == expected:
                self._entries[request_id] = new
            answer(OwnerIs(self._entries.get(request_id)))

        return self._loop.after(self._latency_s, exchange)

    def ask(self, request_id: str, answer: Callable[[OwnerIs], None], *, at_s: float = 0.0) -> Event:
        """Ask who owns it, not before ``at_s``."""
        begin_s = max(at_s, self._loop.now_s)
        return self._loop.at(begin_s + self._latency_s, lambda: answer(OwnerIs(self._entries.get(request_id))))

    def disown(self, request_id: str, epoch: int | None = None) -> None:
        """Remove an entry; with ``epoch``, only one of that epoch or an older one."""
        present = self._entries.get(request_id)
        if present is not None and (epoch is None or present.epoch <= epoch):
            del self._entries[request_id]

"""Two decode peers on a ledger in virtual time, and reschedulers that take their rounds when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from services.rescheduler.lead import Lead
from services.rescheduler.loop import Rescheduler
from services.rescheduler.recorder import Recorder
from starmesh.clock import VirtualClock
from starmesh.ledger import LedgerUnavailable
from starmesh.ledger.memory import MemoryLedger
from starmesh.policy.rescheduling import ReschedulingConfig
from starmesh.types import ClusterView, Role
from tests.policy.decoding import CONFIG
from tests.rescheduler.peers import Peer

WAIT_S = 20.0
LEAD_S = 6.0


class FaultyLedger(MemoryLedger):
    """A ledger that can be down, and at which something can happen just after it was looked at."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self.down = False
        self.after_view: Callable[[], Awaitable[object]] | None = None

    async def lead(self, role: Role, instance_id: str, incarnation: str, *, ttl_s: float) -> int | None:
        if self.down:
            raise LedgerUnavailable("down")
        return await super().lead(role, instance_id, incarnation, ttl_s=ttl_s)

    async def view(self) -> ClusterView:
        view = await super().view()
        if self.after_view is not None:
            happens, self.after_view = self.after_view, None
            await happens()
        return view


@dataclass
class Cluster:
    """d0 and d1, and reschedulers by name."""

    clock: VirtualClock
    ledger: FaultyLedger
    d0: Peer
    d1: Peer
    stack: AsyncExitStack
    reschedulers: dict[str, Rescheduler] = field(default_factory=dict)

    def start(
        self, name: str = "r0", config: ReschedulingConfig = CONFIG, recorder: Recorder | None = None
    ) -> Rescheduler:
        lead = Lead(self.ledger, name, "one", ttl_s=LEAD_S)
        made = Rescheduler(self.ledger, lead, config, interval_s=1.0, recorder=recorder)
        self.reschedulers[name] = made
        self.stack.push_async_callback(made._commander.close)
        return made


@pytest.fixture
async def mesh() -> AsyncIterator[Cluster]:
    clock = VirtualClock(1000.0)
    ledger = FaultyLedger(clock)
    async with Peer(ledger, "d0") as d0, Peer(ledger, "d1") as d1, AsyncExitStack() as stack:
        yield Cluster(clock, ledger, d0, d1, stack)


async def until(condition: Callable[[], object], turn: Callable[[], Awaitable[object]] | None = None) -> None:
    """Wait until ``condition`` holds, with a ``turn`` before each look."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if turn is not None:
                await turn()
            if condition():
                return
            await asyncio.sleep(0.005)

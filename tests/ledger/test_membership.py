"""An instance stays in the ledger, comes back to one that lost it, and leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from starmesh.clock import VirtualClock
from starmesh.ledger import LedgerUnavailable
from starmesh.ledger.membership import Membership
from starmesh.ledger.memory import MemoryLedger
from starmesh.types import InstanceInfo, InstanceLoad, InstanceState, Role

pytestmark = pytest.mark.fast

INFO = InstanceInfo(instance_id="decode-0", incarnation="one", role=Role.DECODE, address="127.0.0.1:1")


class Unreachable(MemoryLedger):
    """A memory ledger that can be cut off."""

    cut = False

    async def report(self, instance_id: str, incarnation: str, load: InstanceLoad, *, ttl_s: float) -> bool:
        if self.cut:
            raise LedgerUnavailable("cut off")
        return await super().report(instance_id, incarnation, load, ttl_s=ttl_s)

    async def set_state(self, instance_id: str, incarnation: str, state: InstanceState) -> bool:
        if self.cut:
            raise LedgerUnavailable("cut off")
        return await super().set_state(instance_id, incarnation, state)


class Reporter:
    """Counts the loads asked of it; ``next()`` waits for one more report."""

    def __init__(self) -> None:
        self.asked = 0
        self._more = asyncio.Event()

    async def load(self) -> InstanceLoad:
        self.asked += 1
        self._more.set()
        return InstanceLoad(total_blocks=10, free_blocks=10, output_tokens=self.asked)

    async def next(self) -> None:
        """Wait until a report that began after this call has got through: two more loads have been asked for."""
        for _ in range(2):
            self._more.clear()
            async with asyncio.timeout(10):
                await self._more.wait()


def membership(ledger: MemoryLedger, reporter: Reporter) -> Membership:
    return Membership(ledger, INFO, load=reporter.load, ttl_s=60.0, interval_s=0.002)


async def test_it_registers_reports_and_leaves() -> None:
    ledger, reporter = MemoryLedger(VirtualClock()), Reporter()
    member = membership(ledger, reporter)
    await member.start()
    await reporter.next()
    (seen,) = (await ledger.view()).instances
    assert seen.info == INFO
    assert seen.load is not None and seen.load.output_tokens > 0
    await member.stop()
    assert (await ledger.view()).instances == ()


@pytest.mark.parametrize("silent", [1, 2, 3])
async def test_a_ledger_may_be_late_twice_at_the_start(silent: int) -> None:
    class Late(MemoryLedger):
        asked = 0

        async def register(self, info: InstanceInfo, *, ttl_s: float) -> None:
            self.asked += 1
            if self.asked <= silent:
                raise LedgerUnavailable("did not answer in time")
            await super().register(info, ttl_s=ttl_s)

    ledger = Late(VirtualClock())
    member = membership(ledger, Reporter())
    if silent < 3:
        await member.start()
        assert [view.info for view in (await ledger.view()).instances] == [INFO]
        await member.stop()
    else:
        with pytest.raises(LedgerUnavailable):
            await member.start()
        assert ledger.asked == 3


async def test_it_registers_again_where_it_was_forgotten() -> None:
    ledger, reporter = MemoryLedger(VirtualClock()), Reporter()
    member = membership(ledger, reporter)
    await member.start()
    await reporter.next()
    await ledger.deregister("decode-0", "one")
    await reporter.next()
    assert [view.info for view in (await ledger.view()).instances] == [INFO]
    await member.stop()


@pytest.mark.parametrize("forgotten", [True, False])
async def test_a_drain_begun_while_the_ledger_was_away_shows_when_it_is_back(forgotten: bool) -> None:
    ledger, reporter = Unreachable(VirtualClock()), Reporter()
    member = membership(ledger, reporter)
    await member.start()
    ledger.cut = True
    await reporter.next()
    assert not member.ledger_reachable
    await member.set_state(InstanceState.DRAINING)
    ledger.cut = False
    if forgotten:  # the lease ran out meanwhile
        await ledger.deregister("decode-0", "one")
    await reporter.next()
    assert member.ledger_reachable
    assert [view.info.state for view in (await ledger.view()).instances] == [InstanceState.DRAINING]
    await member.stop()


async def test_a_report_interval_that_cannot_keep_the_lease_is_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        Membership(MemoryLedger(VirtualClock()), INFO, load=Reporter().load, ttl_s=1.0, interval_s=0.6)


async def test_a_report_that_fails_for_another_reason_is_not_the_last() -> None:
    ledger, reporter = MemoryLedger(VirtualClock()), Reporter()

    async def load() -> InstanceLoad:
        made = await reporter.load()
        return InstanceLoad(total_blocks=1, free_blocks=2) if reporter.asked < 3 else made

    member = Membership(ledger, INFO, load=load, ttl_s=60.0, interval_s=0.002)
    await member.start()
    for _ in range(3):
        await reporter.next()
    (seen,) = (await ledger.view()).instances
    assert seen.load is not None and seen.load.free_blocks == 10
    await member.stop()


class Overtaken(MemoryLedger):
    """Lets ``on_register`` happen while a registration is on its way."""

    on_register: Callable[[], Awaitable[None]] | None = None

    async def register(self, info: InstanceInfo, *, ttl_s: float) -> None:
        happen, self.on_register = self.on_register, None
        if happen is not None:
            await happen()
        await super().register(info, ttl_s=ttl_s)


async def test_a_state_set_while_a_registration_is_on_its_way_is_not_overtaken_by_it() -> None:
    ledger, reporter = Overtaken(VirtualClock()), Reporter()
    member = membership(ledger, reporter)
    await member.start()
    ledger.on_register = lambda: member.set_state(InstanceState.DRAINING)
    await ledger.deregister("decode-0", "one")
    for _ in range(2):
        await reporter.next()
    assert ledger.on_register is None
    assert [view.info.state for view in (await ledger.view()).instances] == [InstanceState.DRAINING]
    await member.stop()

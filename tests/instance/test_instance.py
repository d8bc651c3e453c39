"""The end of an instance, and its drain: it always ends, and DRAINED means that nothing is left."""

from __future__ import annotations

import asyncio

import pytest

from services.prefill.worker import PrefillWorker
from starmesh.clock import WallClock
from starmesh.instance.intake import check_sequence
from starmesh.ledger.memory import MemoryLedger
from starmesh.rpc.status import StatusError
from starmesh.types import InstanceState, Role
from tests.instance.running import running_instance, spec, until


async def test_it_stops_when_nobody_ends_a_lease() -> None:
    """A decode instance that died leaves its lease: it must not keep the process from ending."""
    ledger = MemoryLedger(WallClock())
    async with running_instance(Role.PREFILL, ledger, PrefillWorker, grace_s=0.05, kv_lease_s=600.0) as prefill:
        assert (await prefill.worker.prefill(spec(), "checking")).ticket is not None
        await prefill.stop()
    assert (await ledger.view()).instances == ()


async def test_a_drain_ends_with_the_last_lease() -> None:
    ledger = MemoryLedger(WallClock())

    async def state() -> InstanceState:
        (view,) = (await ledger.view()).instances
        return view.info.state

    async with running_instance(Role.PREFILL, ledger, PrefillWorker, kv_lease_s=600.0) as prefill:
        await prefill.worker.prefill(spec(), "checking")
        await prefill.instance.drain()
        assert await state() is InstanceState.DRAINING
        await prefill.instance.load()
        assert await state() is InstanceState.DRAINING
        prefill.instance.revoke_lease("a", 1)
        await prefill.instance.engine.call(lambda core: core.cancel("a"))

        async def drained() -> bool:
            return await state() is InstanceState.DRAINED

        await until(drained)


async def test_work_in_progress_keeps_an_instance_from_being_drained() -> None:
    """A handoff that has not reserved its blocks yet is in no load."""
    ledger, handoff = MemoryLedger(WallClock()), asyncio.Event()

    async def hand_off() -> None:
        await handoff.wait()

    async with running_instance(Role.PREFILL, ledger, PrefillWorker) as prefill:
        task = prefill.instance.background(hand_off())
        await prefill.instance.drain()
        for _ in range(2):  # the first may find nothing, and by the second the drain has ended
            await prefill.instance.load()
        assert prefill.instance.state is InstanceState.DRAINING
        handoff.set()
        await task

        async def drained() -> bool:
            return prefill.instance.state is InstanceState.DRAINED

        await until(drained)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"request_id": "a b"}, "sequence.request_id"),
        ({"epoch": 0}, "sequence.epoch"),
        ({"prompt": 0}, "sequence.prompt_token_ids"),
    ],
)
def test_a_sequence_that_no_report_could_carry_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(StatusError) as caught:
        check_sequence(spec(**changes))  # type: ignore[arg-type]
    assert caught.value.fields == [field]

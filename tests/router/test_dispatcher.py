"""What the dispatcher counts of a request by instance, when the request moves."""

from __future__ import annotations

import asyncio

import pytest

from services.router.config import RouterSettings
from services.router.dispatcher import Dispatcher
from services.router.ledger_watch import LedgerWatch
from services.router.placement import Demand
from starmesh.clock import VirtualClock
from starmesh.ledger.memory import MemoryLedger
from starmesh.policy.admission import Need
from starmesh.types import InstanceInfo, InstanceLoad, KvLayout, Role, SequenceLoad

pytestmark = pytest.mark.fast

LAYOUT = KvLayout(model_revision="r", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=16)
TTL_S = 60.0


def instance(instance_id: str, role: Role = Role.DECODE) -> InstanceInfo:
    return InstanceInfo(instance_id, "one", role, "127.0.0.1:1", layout=LAYOUT, max_sequence_tokens=512)


def counted(watch: LedgerWatch) -> dict[str, int]:
    """Tokens that the router counts for the request, by decode instance."""
    return {
        view.info.instance_id: sum(item.tokens for item in view.reservations if item.request_id == "r")
        for view in watch.local.corrected().of_role(Role.DECODE)
    }


async def test_a_request_that_moves_is_counted_where_it_is() -> None:
    ledger = MemoryLedger(VirtualClock())
    watch = LedgerWatch(ledger, interval_s=1.0)
    dispatcher = Dispatcher(ledger, watch, RouterSettings(_cli_parse_args=False))
    for info in (instance("p", Role.PREFILL), instance("d0"), instance("d1"), instance("d2")):
        await ledger.register(info, ttl_s=TTL_S)
        await ledger.report(info.instance_id, "one", InstanceLoad(64, 64), ttl_s=TTL_S)
    await watch.refresh()
    loop_s = dispatcher._loop.time()
    need = Need(tokens=20, remaining_output_tokens=30)
    placement = await dispatcher.place(Demand("r", need, deadline_s=loop_s + 60))
    dispatcher.prefilled("r", "p")
    source = placement.decode.instance_id
    first, second = {"d0", "d1", "d2"} - {source}
    assert counted(watch) == {source: 64, first: 0, second: 0}
    # Its instance reports it, so the ledger drops the reservation; it moves, twice, and no report tells of that yet.
    running = SequenceLoad("r", 1, 20, 1, 20, 30)
    await ledger.report(source, "one", InstanceLoad(64, 60, sequences=(running,)), ttl_s=TTL_S)
    await watch.refresh()
    assert counted(watch) == {source: 0, first: 0, second: 0}
    dispatcher.moved("r", first, Need(tokens=30, remaining_output_tokens=20))
    assert counted(watch) == {source: 0, first: 64, second: 0}
    dispatcher.moved("r", second, Need(tokens=30, remaining_output_tokens=20))
    assert counted(watch) == {source: 0, first: 0, second: 64}
    await ledger.report(second, "one", InstanceLoad(64, 60, sequences=(running,)), ttl_s=TTL_S)
    await watch.refresh()
    assert counted(watch) == {source: 0, first: 0, second: 0}
    dispatcher.moved("r", "not in the view", Need(tokens=30, remaining_output_tokens=20))
    await dispatcher.release("r")
    assert (dispatcher._reservations._places, dispatcher._reservations._moved, watch.local._pending) == ({}, {}, {})


async def test_a_request_that_is_placed_anew_after_a_move_counts_once() -> None:
    ledger = MemoryLedger(VirtualClock())
    watch = LedgerWatch(ledger, interval_s=1.0)
    dispatcher = Dispatcher(ledger, watch, RouterSettings(_cli_parse_args=False))
    for info in (instance("p", Role.PREFILL), instance("d0"), instance("d1")):
        await ledger.register(info, ttl_s=TTL_S)
    await watch.refresh()
    demand = Demand("r", Need(tokens=20, remaining_output_tokens=30), deadline_s=dispatcher._loop.time() + 60)
    source = (await dispatcher.place(demand)).decode.instance_id
    dispatcher.moved("r", "d1" if source == "d0" else "d0", demand.need)
    await dispatcher.place(demand)
    at = [name for name, tokens in counted(watch).items() if tokens]
    assert len(at) == 1
    assert dispatcher._reservations._moved == {}
    await dispatcher.release("r")
    await watch.refresh()
    assert counted(watch) == {"d0": 0, "d1": 0}


async def test_a_request_is_held_until_memory_will_do() -> None:
    ledger = MemoryLedger(VirtualClock())
    watch = LedgerWatch(ledger, interval_s=1.0)
    dispatcher = Dispatcher(ledger, watch, RouterSettings(_cli_parse_args=False, dispatch_policy="held_peak"))
    for info in (instance("p", Role.PREFILL), instance("d0")):
        await ledger.register(info, ttl_s=TTL_S)
        await ledger.report(info.instance_id, "one", InstanceLoad(64, 64), ttl_s=TTL_S)
    # There is room for it now, but the others grow by 300 tokens each.
    growing = tuple(SequenceLoad(name, 1, 150, 1, 150, 900, 300, 300, 0) for name in "abc")
    await ledger.report("d0", "one", InstanceLoad(64, 34, 3, sequences=growing), ttl_s=TTL_S)
    await watch.refresh()
    demand = Demand("r", Need(tokens=20, remaining_output_tokens=400), deadline_s=dispatcher._loop.time() + 60)
    placing = asyncio.create_task(dispatcher.place(demand))
    while not dispatcher.queued_requests:
        await asyncio.sleep(0)
    dispatcher.wake()
    await asyncio.sleep(0)
    assert not placing.done()
    await ledger.report("d0", "one", InstanceLoad(64, 54, 1, sequences=growing[:1]), ttl_s=TTL_S)
    await watch.refresh()
    dispatcher.wake()
    assert (await placing).decode.instance_id == "d0"

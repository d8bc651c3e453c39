"""An instance that drains, stops or runs short of blocks moves its sequences away by itself, and no client notices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from services.decode import evacuation
from services.decode.config import EvacuationConfig
from services.decode.evacuation import Evacuator
from starmesh.policy.evacuation import drain_plan
from starmesh.policy.rescheduling import Plan, PlanMemory
from starmesh.types import ClusterView, FinishReason, InstanceLoad, InstanceState
from tests.decode.cluster import LIMITS, Cluster, Hold, Request, running_cluster
from tests.instance.running import PATIENCE_S, spec, until


@asynccontextmanager
async def evacuating_cluster(ids: str, *, horizon_s: float = 0.5, **options: Any) -> AsyncIterator[Cluster]:
    async with running_cluster(ids, **options) as cluster:
        for instance_id, running in cluster.decode.items():
            evacuator = Evacuator(
                running.instance,
                cluster.worker(instance_id).migrator,
                EvacuationConfig(relief_horizon_s=horizon_s),
            )
            running.instance.on_load = evacuator.look
        yield cluster


async def start(cluster: Cluster, count: int, instance_id: str = "A", **fields: Any) -> list[Request]:
    return [await cluster.router.start(spec(chr(ord("a") + n), **fields), instance_id) for n in range(count)]


async def pace(cluster: Cluster, step_s: float) -> None:
    """Let each step take so long: nothing ends while a drain is under way, however busy the machine."""
    for running in cluster.decode.values():
        await running.instance.engine.call(lambda core: setattr(core._executor, "step_s", step_s))


async def until_drained(cluster: Cluster, instance_id: str) -> None:
    async def drained() -> bool:
        return cluster.decode[instance_id].instance.state is InstanceState.DRAINED

    await until(drained)


async def check(cluster: Cluster, requests: list[Request]) -> None:
    for request in requests:
        assert await request.ended() is FinishReason.LENGTH
        assert request.stream.token_ids == request.reference
    await cluster.nothing_left()


async def test_a_drain_moves_everything_away_and_does_not_wait_for_the_ends() -> None:
    async with evacuating_cluster("ABC") as cluster:
        await pace(cluster, 0.03)
        requests = await start(cluster, 6, limit=120)
        assert await cluster.decode["A"].instance.drain() == 6
        await until_drained(cluster, "A")
        # Before their ends, and to both of the others.
        assert not any(request.stream.finish_reason for request in requests)
        loads = [await cluster.decode[name].instance.load() for name in "BC"]
        assert sum(load.migrated_sequences for load in loads) == 6
        assert all(load.migrated_sequences for load in loads)
        await check(cluster, requests)
        assert [len(request.moves) for request in requests] == [1] * 6


async def test_a_stop_is_a_drain_within_the_grace_period() -> None:
    async with evacuating_cluster("AB", grace_s=15.0) as cluster:
        await pace(cluster, 0.03)
        requests = await start(cluster, 4, limit=120)
        stopped = cluster.decode.pop("A")
        await stopped.stop()
        assert all(request.failure is None for request in requests)
        assert all(request.owner.instance_id == "B" for request in requests)
        await check(cluster, requests)


async def test_what_fits_nowhere_ends_where_it_is() -> None:
    # Each comes to 23 blocks: B holds two of them.
    async with evacuating_cluster("AB", blocks={"B": 60}, limits=replace(LIMITS, headroom_blocks=12)) as cluster:
        await pace(cluster, 0.03)
        requests = await start(cluster, 4, limit=80)
        await cluster.decode["A"].instance.drain()

        async def some_have_moved() -> bool:
            return any(request.moves for request in requests)

        await until(some_have_moved)
        # What is left there ends first: what ends at B makes room.
        cluster.executors["A"].step_s = 0.0
        await until_drained(cluster, "A")
        assert sum(len(request.moves) for request in requests) < 4
        await check(cluster, requests)


async def test_a_drain_waits_for_the_ledger_and_goes_on() -> None:
    async with evacuating_cluster("AB") as cluster:
        requests = await start(cluster, 2, limit=300)
        ledger = cluster.ledgers["A"]
        ledger.silent = True
        await cluster.decode["A"].instance.drain()
        await requests[0].until(lambda: len(requests[0].stream.token_ids) > 60)
        assert not any(request.moves for request in requests)
        await pace(cluster, 0.02)
        ledger.silent = False
        await until_drained(cluster, "A")
        await check(cluster, requests)
        assert all(len(request.moves) == 1 for request in requests)


@pytest.mark.parametrize("evacuates", [True, False])
async def test_sequences_move_away_before_any_is_preempted(evacuates: bool) -> None:
    # Four sequences of up to 130 tokens in 80 blocks of 4: 320 of the 520 that they come to.
    made = partial(evacuating_cluster, horizon_s=2.0) if evacuates else running_cluster
    async with made("AB", blocks={"A": 80}) as cluster:
        requests = await start(cluster, 4, limit=120)
        await requests[0].until(lambda: len(requests[0].stream.token_ids) >= 110)
        await check(cluster, requests)
        load = await cluster.decode["A"].instance.load()
        assert (load.preemptions == 0) == evacuates
        assert any(request.moves for request in requests) == evacuates


async def test_what_fails_while_a_plan_is_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    planning, planned = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow_plan(view: ClusterView, instance_id: str, load: InstanceLoad, memory: PlanMemory, config: Any) -> Plan:
        plan = drain_plan(view, instance_id, load, memory, config)
        if memory.in_flight:
            loop.call_soon_threadsafe(planning.set)
            planned.wait(PATIENCE_S)
        return plan

    monkeypatch.setattr(evacuation, "drain_plan", slow_plan)
    async with evacuating_cluster("AB", limits=replace(LIMITS, reserve_s=1.0)) as cluster:
        await pace(cluster, 0.02)
        requests = await start(cluster, 2, limit=200)
        unanswered = Hold(cluster.worker("B").migrator.incoming, "reserve")
        await cluster.decode["A"].instance.drain()
        await asyncio.wait_for(planning.wait(), PATIENCE_S)

        async def failed() -> bool:
            return not cluster.worker("A").migrator.counts().outgoing

        await until(failed)
        unanswered.open.set()
        planned.set()
        await until_drained(cluster, "A")
        assert all(request.moves for request in requests)
        await check(cluster, requests)

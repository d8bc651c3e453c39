"""The router's side of a move: it attaches before the claim or after it, late, never, or to what is not there."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

from services.decode.link import RouterLink
from starmesh.migration.source_record import SourceState
from starmesh.migration.target_record import TargetState
from starmesh.rpc import convert
from starmesh.types import FinishReason, Ownership
from starmesh.v1 import decode_pb2
from tests.decode.cluster import LIMITS, Cluster, Hold, Request, running_cluster
from tests.decode.test_migration_failures import IMPATIENT, Stages
from tests.instance.running import PATIENCE_S, spec, until


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster
        await cluster.nothing_left()


async def moved(cluster: Cluster, *, limit: int = 400) -> Request:
    """A request that has moved from A to B, and whose router has not followed."""
    request = await cluster.router.start(spec(limit=limit), "A")
    request.follows = False
    assert (await cluster.migrate("a", "A", "B").outcome()).moved
    await request.until(lambda: request.moves)
    return request


async def complete(request: Request) -> None:
    assert await request.ended() is FinishReason.LENGTH
    assert request.stream.token_ids == request.reference


async def refused(cluster: Cluster, request: Request, code: grpc.StatusCode = grpc.StatusCode.NOT_FOUND) -> None:
    await request.until(lambda: request.failure is not None)
    assert request.failure is not None and request.failure.code is code


async def test_a_router_that_comes_late_gets_all_that_was_made_meanwhile(cluster: Cluster) -> None:
    request = await moved(cluster)
    have = len(request.stream.token_ids)
    await until(lambda: _made(cluster, have + 20))
    await cluster.router.attach(request, Ownership("B", 2))
    await complete(request)


async def _made(cluster: Cluster, tokens: int) -> bool:
    return len(cluster.worker("B").running["a"].token_ids) >= tokens


@pytest.mark.parametrize("missing", [1, 5, 10_000])
async def test_a_router_that_lost_tokens_gets_them_again(cluster: Cluster, missing: int) -> None:
    """Those that the source made and that never arrived are sent by the target."""
    request = await moved(cluster)
    offset = max(0, len(request.stream.token_ids) - missing)
    await cluster.router.attach(request, Ownership("B", 2), offset=offset)
    await complete(request)


async def test_a_sequence_that_ends_before_its_router_comes_is_kept_for_it(cluster: Cluster) -> None:
    request = await moved(cluster)
    cluster.hurry()
    await until(lambda: _ended(cluster))
    load = await cluster.decode["B"].instance.load()
    assert not load.sequences and load.incoming_migrations == 1
    await cluster.router.attach(request, Ownership("B", 2))
    await complete(request)


async def _ended(cluster: Cluster) -> bool:
    return cluster.worker("B").running["a"].end is not None


async def test_a_drain_waits_for_the_router_of_a_sequence_that_has_ended() -> None:
    async with running_cluster(grace_s=20.0) as cluster:
        request = await moved(cluster)
        cluster.hurry()
        await until(lambda: _ended(cluster))
        stopping = asyncio.create_task(cluster.decode["B"].stop())
        for _ in range(3):
            await cluster.decode["B"].instance.load()
        assert not stopping.done()
        await cluster.router.attach(request, Ownership("B", 2))
        await complete(request)
        await stopping


async def test_a_router_that_comes_before_the_claim_waits_for_it(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    request.follows = False
    stages = Stages(cluster, "claim")
    migration = await stages.begin()
    await cluster.router.attach(request, Ownership("B", 2))
    await until(lambda: _waits(cluster))
    stages.go_on()
    assert (await migration.outcome()).moved
    await complete(request)


async def _waits(cluster: Cluster) -> bool:
    return any(migration._waiting for migration in cluster.worker("B").migrator.incoming._migrations.values())


async def test_a_router_that_waits_hears_that_the_sequence_does_not_come() -> None:
    async with running_cluster() as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        request.follows = False
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        await cluster.router.attach(request, Ownership("B", 2))
        await until(lambda: _waits(cluster))
        await cluster.ledger.claim("a", "elsewhere", expected=Ownership("A", 1), epoch=4, ttl_s=30)
        stages.go_on()
        assert (await migration.outcome()).state is SourceState.STAYED
        await refused(cluster, request)
        await cluster.router.cancel("A", "a", 9)
        await cluster.nothing_left()


async def test_a_router_that_goes_while_it_waits_ends_the_migration() -> None:
    async with running_cluster(limits=IMPATIENT) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        request.follows = False
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        await cluster.router.attach(request, Ownership("B", 2))
        await until(lambda: _waits(cluster))
        await cluster.router.part("B")
        # The claim is on its way and may be done; nobody decodes under it.
        stages.go_on()
        outcome = await migration.outcome()
        assert outcome.state in (SourceState.STAYED, SourceState.MOVED)
        # The news that the router has gone may come to the target after the claim.
        await until(lambda: _runs_nowhere(cluster))
        await cluster.router.cancel("A", "a", 9)
        await cluster.nothing_left()


async def _runs_nowhere(cluster: Cluster) -> bool:
    return "a" not in cluster.worker("B").running


@pytest.mark.parametrize("stage", ["reserve", "copy"])
async def test_a_router_that_comes_before_the_commit_ends_the_migration(stage: str) -> None:
    """It comes only when the source is sure that it will not commit; so the target gives up."""
    async with running_cluster(limits=IMPATIENT) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        instance, go_on = cluster.decode["B"].instance, threading.Event()
        if stage == "reserve":
            held = asyncio.create_task(instance.engine.call(lambda core: go_on.wait(PATIENCE_S)))
        else:
            held = asyncio.create_task(asyncio.to_thread(go_on.wait, PATIENCE_S))
            Hold(instance, "pull")  # which the end of the migration cancels
        migration = cluster.migrate("a", "A", "B")
        state = TargetState.RESERVING if stage == "reserve" else TargetState.PULLING
        await until(lambda: _stands(cluster, state))
        stray = RouterLink()
        cluster.worker("B").attach(stray, "a", 2, 3, timeout_s=60.0)
        message = await asyncio.wait_for(stray.take(), PATIENCE_S)
        (output,) = message.outputs
        assert (output.request_id, output.epoch, output.offset) == ("a", 2, 3)
        assert output.failure.code == grpc.StatusCode.NOT_FOUND.value[0]
        go_on.set()
        await held
        assert (await migration.outcome()).state is SourceState.STAYED
        await complete(request)
        await cluster.nothing_left()


async def _stands(cluster: Cluster, state: TargetState) -> bool:
    return state in cluster.target_states("B")


@pytest.mark.parametrize(
    ("request_id", "epoch", "offset", "code"),
    [
        ("b", 2, 0, grpc.StatusCode.NOT_FOUND),
        ("a", 1, 0, grpc.StatusCode.NOT_FOUND),
        ("a", 3, 0, grpc.StatusCode.NOT_FOUND),
        ("a", 2, -1, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_is_not_here_is_refused(
    cluster: Cluster, request_id: str, epoch: int, offset: int, code: grpc.StatusCode
) -> None:
    request = await moved(cluster)
    stray = RouterLink()
    cluster.worker("B").attach(stray, request_id, epoch, offset, timeout_s=60.0)
    (output,) = (await asyncio.wait_for(stray.take(), PATIENCE_S)).outputs
    assert (output.request_id, output.epoch) == (request_id, epoch)
    assert output.failure.code == code.value[0]
    await cluster.router.attach(request, Ownership("B", 2))
    await complete(request)


async def test_a_router_with_tokens_that_nobody_made_does_not_go_on(cluster: Cluster) -> None:
    request = await moved(cluster)
    await cluster.router.attach(request, Ownership("B", 2), offset=399)
    await refused(cluster, request)


async def test_a_router_that_does_not_come_is_waited_for_so_long() -> None:
    async with running_cluster(limits=dataclasses.replace(LIMITS, attach_s=0.3)) as cluster:
        request = await moved(cluster)
        await cluster.nothing_left()
        assert await cluster.ledger.owner("a") is None, "disowned"
        await cluster.router.attach(request, Ownership("B", 2))
        await refused(cluster, request)


async def test_a_cancel_with_the_new_epoch_ends_what_nobody_listens_to(cluster: Cluster) -> None:
    """Its router has heard of the move, and its client has gone."""
    await moved(cluster)
    await cluster.router.cancel("B", "a", 1)
    await cluster.router.cancel("B", "b", 2)
    assert "a" in cluster.worker("B").running
    await cluster.router.cancel("B", "a", 2)
    await cluster.nothing_left()


async def test_the_deadline_moves_along_until_the_router_comes(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    request.follows = False
    worker = cluster.worker("A")
    worker._bound(worker._running["a"], 30.0)
    assert (await cluster.migrate("a", "A", "B").outcome()).moved
    there = cluster.worker("B")
    assert 0 < there._running["a"].remaining_s <= 30.0
    await request.until(lambda: request.moves)
    attach = decode_pb2.AttachSequence(request_id="a", epoch=2, offset=len(request.stream.token_ids))
    attach.timeout.CopyFrom(convert.duration_pb(50.0))
    request.owner = Ownership("B", 2)
    request.stream.begin(2)
    await cluster.router.send("B", decode_pb2.DecodeRequest(attach=attach))
    await request.until(lambda: there._running["a"].link is not None)
    assert there._running["a"].remaining_s > 30.0
    await complete(request)


async def test_a_deadline_that_passes_before_the_router_comes_ends_it(cluster: Cluster) -> None:
    request = await moved(cluster)
    worker = cluster.worker("B")
    worker._expire(worker._running["a"])
    await cluster.nothing_left()
    await cluster.router.attach(request, Ownership("B", 2))
    await refused(cluster, request)


# A router that goes on by itself meanwhile.


@pytest.mark.parametrize("stage", ["copy", "tail", "claim"])
async def test_a_start_of_a_newer_epoch_takes_the_place_of_what_is_taken_in(stage: str) -> None:
    """The router recovers the request onto the very target. Its blocks are not taken while a pull writes."""
    async with running_cluster(limits=IMPATIENT) as cluster:
        first = await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        newer = spec(epoch=4, limit=400)
        done = await cluster.prefill.worker.prefill(newer, "checking")
        newer = dataclasses.replace(newer, output_token_ids=(done.token_id,))
        await cluster.ledger.claim("a", "B", expected=Ownership("A", 1), epoch=4, ttl_s=30)
        await cluster.router.cancel("A", "a", 1)
        request = cluster.router.requests["a"] = Request(newer, Ownership("B", 4), cluster.hurry)
        await cluster.router.start_on("B", newer, done.ticket)
        assert (await migration.outcome()).state is SourceState.ENDED
        stages.go_on()
        await complete(request)
        await cluster.nothing_left()
        first.check()


async def test_a_start_of_an_older_epoch_changes_nothing(cluster: Cluster) -> None:
    request = await moved(cluster)
    stray = RouterLink()
    older = spec(epoch=2, outputs=(1,), limit=400)
    done = await cluster.prefill.worker.prefill(spec("p"), "checking")
    cluster.worker("B").start(stray, older, done.ticket, timeout_s=60.0, traceparent="")
    (output,) = (await asyncio.wait_for(stray.take(), PATIENCE_S)).outputs
    assert output.failure.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    await cluster.router.attach(request, Ownership("B", 2))
    await complete(request)
    cluster.prefill.instance.revoke_lease("p", 9)
    await cluster.prefill.instance.engine.call(lambda core: core.cancel("p"))

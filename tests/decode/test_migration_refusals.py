"""What no end of a migration does: every refusal says why, and changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from services.decode.link import RouterLink
from services.decode.running import RunningSequence
from starmesh.migration.source_record import SourceState
from starmesh.migration.terms import Cause, Refusal
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError
from starmesh.types import FinishReason, InstanceState
from starmesh.v1 import decode_pb2
from tests.decode.cluster import Cluster, Hold, running_cluster
from tests.decode.migration_requests import commit_request, copy_request, reserve_request, ticket
from tests.instance.running import PATIENCE_S, spec, until


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """A sequence runs on A, and goes on there or elsewhere to its end."""
    async with running_cluster("ABC") as cluster:
        await cluster.router.start(spec(limit=400), "A")
        yield cluster
        request = cluster.router.requests["a"]
        assert await request.ended() is FinishReason.LENGTH
        assert request.stream.token_ids == request.reference
        await cluster.nothing_left()


def refusal_of(cluster: Cluster, request_id: str = "a", target: str = "B", **asked: Any) -> grpc.StatusCode:
    with pytest.raises(StatusError) as caught:
        cluster.migrate(request_id, "A", target, **asked)
    return caught.value.code


async def test_a_source_refuses_what_it_cannot_move(cluster: Cluster) -> None:
    assert refusal_of(cluster, "unknown") is grpc.StatusCode.NOT_FOUND
    assert refusal_of(cluster, epoch=2) is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal_of(cluster, target="A") is grpc.StatusCode.INVALID_ARGUMENT
    worker = cluster.worker("A")
    assert cluster.movable("A") == ("a",)
    running = worker.running["a"]
    link, running.link = running.link, None
    assert refusal_of(cluster) is grpc.StatusCode.FAILED_PRECONDITION
    assert cluster.movable("A") == ()
    running.link = link


async def test_a_sequence_whose_kv_is_on_its_way_stays(cluster: Cluster) -> None:
    hold = Hold(cluster.decode["B"].instance, "pull")
    sequence = spec("b", limit=5)
    done = await cluster.prefill.worker.prefill(sequence, "checking")
    link = RouterLink()
    sequence = dataclasses.replace(sequence, output_token_ids=(done.token_id,))
    cluster.worker("B").start(link, sequence, done.ticket, timeout_s=60.0, traceparent="")
    await hold.until_reached()
    with pytest.raises(StatusError, match="on its way"):
        cluster.migrate("b", "B", "A")
    assert cluster.movable("B") == ()
    hold.open.set()
    await until(lambda: _is_over(cluster, "B", "b"))


async def _is_over(cluster: Cluster, instance_id: str, request_id: str) -> bool:
    return request_id not in cluster.worker(instance_id).running


async def test_nothing_moves_while_the_ledger_is_silent(cluster: Cluster) -> None:
    await _lose_ledger(cluster, "A")
    assert refusal_of(cluster) is grpc.StatusCode.UNAVAILABLE
    cluster.ledgers["A"].silent = False


async def test_a_leader_that_was_replaced_moves_nothing(cluster: Cluster) -> None:
    hold = Hold(cluster.worker("B").migrator.incoming, "reserve")
    migration = cluster.migrate("a", "A", "B", leader_term=7)
    assert refusal_of(cluster, leader_term=6) is grpc.StatusCode.FAILED_PRECONDITION
    assert cluster.migrate("a", "A", "B", leader_term=7) is migration
    assert cluster.migrate("a", "A", "B") is migration, "an operator has no term"
    assert cluster.movable("A") == ()
    assert refusal_of(cluster, target="C") is grpc.StatusCode.FAILED_PRECONDITION, "it is on its way to B"
    hold.open.set()
    assert (await migration.outcome()).moved


async def test_limits_bind_at_both_ends() -> None:
    config = {"max_outgoing": 1, "max_incoming": 1}
    async with running_cluster("ABC", config=config) as cluster:
        for name, instance_id in (("a", "A"), ("b", "A"), ("c", "C")):
            await cluster.router.start(spec(name, limit=400), instance_id)
        hold = Hold(cluster.decode["B"].instance, "pull")
        first = cluster.migrate("a", "A", "B")
        with pytest.raises(StatusError) as caught:
            cluster.migrate("b", "A", "B")
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and caught.value.retry_delay_s
        await hold.until_reached()
        assert cluster.worker("A").migrator.counts().outgoing == 1
        assert (await cluster.decode["B"].instance.load()).incoming_migrations == 1
        outcome = await cluster.migrate("c", "C", "B").outcome()
        assert (outcome.cause, outcome.refusal) == (Cause.REFUSED, Refusal.TOO_MANY_MIGRATIONS)
        hold.open.set()
        assert (await first.outcome()).moved
        for request in cluster.router.requests.values():
            await request.ended()
        await cluster.nothing_left()


async def _drain(cluster: Cluster) -> None:
    membership = cluster.decode["B"].instance.membership
    membership._info = dataclasses.replace(membership.info, state=InstanceState.DRAINING)


async def _lay_out_differently(cluster: Cluster) -> None:
    cluster.decode["B"].instance.layout = dataclasses.replace(cluster.decode["B"].instance.layout, kv_heads=2)


async def _shorten(cluster: Cluster) -> None:
    membership = cluster.decode["B"].instance.membership
    membership._info = dataclasses.replace(membership.info, max_sequence_tokens=405)


async def _lose_ledger(cluster: Cluster, instance_id: str = "B") -> None:
    cluster.ledgers[instance_id].silent = True

    async def noticed() -> bool:
        return not cluster.decode[instance_id].instance.membership.ledger_reachable

    await until(noticed)


async def _have_it_there(cluster: Cluster) -> None:
    running = RunningSequence.of(spec(), None, traceparent="")
    cluster.worker("B")._running["a"] = running


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (_drain, Refusal.NOT_READY),
        (_lay_out_differently, Refusal.LAYOUT_MISMATCH),
        (_shorten, Refusal.TOO_LONG),
        (_lose_ledger, Refusal.LEDGER_UNAVAILABLE),
        (_have_it_there, Refusal.ALREADY_HERE),
    ],
)
async def test_a_target_refuses_and_says_why(
    cluster: Cluster, spoil: Callable[[Cluster], Awaitable[None]], refusal: Refusal
) -> None:
    await spoil(cluster)
    outcome = await cluster.migrate("a", "A", "B").outcome()
    assert (outcome.state, outcome.cause, outcome.refusal) == (SourceState.STAYED, Cause.REFUSED, refusal)
    cluster.worker("B")._running.pop("a", None)


async def test_a_full_target_refuses(cluster: Cluster) -> None:
    engine = cluster.decode["B"].instance.engine
    await engine.call(lambda core: core.reserve("other", 1, 256 * 4))
    outcome = await cluster.migrate("a", "A", "B").outcome()
    assert (outcome.cause, outcome.refusal) == (Cause.REFUSED, Refusal.NO_ROOM)
    await engine.call(lambda core: core.cancel("other"))


async def test_a_target_that_can_hold_no_headroom_still_takes_it() -> None:
    """170 tokens fit 43 blocks; what the source asks for beyond what it has by then is more than the whole pool."""
    async with running_cluster(blocks={"B": 44}) as cluster:
        request = await cluster.router.start(spec(limit=160), "A")
        await request.until(lambda: len(request.stream.token_ids) > 50)
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        await request.ended()
        assert request.stream.token_ids == request.reference
        await cluster.nothing_left()


# The calls as such.


async def test_calls_that_are_unknown_doubled_or_out_of_order() -> None:
    async with running_cluster("B") as cluster:
        stub = cluster.stub("B")

        async def code(call: Any) -> grpc.StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            return caught.value.code()

        assert await code(stub.CopyMigration(copy_request(), timeout=PATIENCE_S)) is grpc.StatusCode.NOT_FOUND
        assert await code(stub.CommitMigration(commit_request(), timeout=PATIENCE_S)) is grpc.StatusCode.NOT_FOUND
        await stub.AbortMigration(decode_pb2.AbortMigrationRequest(reservation_id="r"), timeout=PATIENCE_S)
        for _ in range(2):
            reserved = await stub.ReserveMigration(reserve_request(), timeout=PATIENCE_S)
            assert (reserved.blocks, convert.duration_s(reserved.lease_duration)) == (8, 10.0)
        other = stub.ReserveMigration(reserve_request(request_id="y"), timeout=PATIENCE_S)
        assert await code(other) is grpc.StatusCode.FAILED_PRECONDITION
        for wrong in (copy_request(round=2), copy_request(first_block=1), copy_request(ticket(block_ids=range(9)))):
            call = stub.CopyMigration(wrong, timeout=PATIENCE_S)
            assert await code(call) is grpc.StatusCode.FAILED_PRECONDITION
        assert cluster.worker("B").migrator.counts().incoming == 1, "what was out of order has changed nothing"
        # The holder cannot be reached: the pull fails, and the target gives up.
        declined = await stub.CopyMigration(copy_request(), timeout=PATIENCE_S)
        assert declined.verdict == decode_pb2.MIGRATION_VERDICT_DECLINED
        assert await code(stub.CopyMigration(copy_request(), timeout=PATIENCE_S)) is grpc.StatusCode.NOT_FOUND
        await cluster.nothing_left()


async def test_a_newer_reservation_takes_the_place_of_one_that_was_given_up() -> None:
    async with running_cluster("B") as cluster:
        stub = cluster.stub("B")
        for reservation_id in ("r", "s", "t"):
            request = reserve_request(reservation_id=reservation_id)
            assert (await stub.ReserveMigration(request, timeout=PATIENCE_S)).blocks == 8
        older = reserve_request(reservation_id="u", epoch=1)
        newer = reserve_request(reservation_id="v", epoch=3)
        assert (await stub.ReserveMigration(newer, timeout=PATIENCE_S)).blocks == 8
        refused = await stub.ReserveMigration(older, timeout=PATIENCE_S)
        assert refused.refusal == decode_pb2.MIGRATION_REFUSAL_ALREADY_HERE
        assert cluster.worker("B").migrator.counts().incoming == 1
        await stub.AbortMigration(decode_pb2.AbortMigrationRequest(reservation_id="v"), timeout=PATIENCE_S)
        await cluster.nothing_left()

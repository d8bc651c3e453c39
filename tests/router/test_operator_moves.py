"""MigrateSequence: finding the request, passing the order on, telling what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from services.router.operator_moves import plan_move
from starmesh.rpc.status import StatusError, from_rpc_error, retry_later
from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    Ownership,
    Role,
    SequenceLoad,
)
from starmesh.v1 import cluster_pb2, decode_pb2
from tests.router.conftest import Mesh, check_answer, until
from tests.router.decode_peer import DecodePeer

STAGES = (decode_pb2.MIGRATION_STAGE_RESERVING, decode_pb2.MIGRATION_STAGE_COPYING)


def view_of(*at: tuple[str, int], target: InstanceState = InstanceState.READY) -> ClusterView:
    """A request ``r``, reported by these instances under these epochs."""
    epochs = dict(at)
    instances = []
    for name in ("a", "b", "c", "p"):
        role = Role.PREFILL if name == "p" else Role.DECODE
        state = target if name == "c" else InstanceState.READY
        info = InstanceInfo(name, "one", role, f"{name}:1", state=state)
        sequences = (SequenceLoad("r", epochs[name], 1, 1, 1, 9),) if name in epochs else ()
        load = None if name == "b" and not sequences else InstanceLoad(8, 8, sequences=sequences)
        instances.append(InstanceView(info, load))
    return ClusterView(0.0, tuple(instances))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("view", "owner", "source", "epoch"),
    [
        (view_of(), Ownership("a", 4), "a", 4),
        (view_of(("a", 4)), None, "a", 4),
        (view_of(("a", 4)), Ownership("b", 5), "b", 5),  # its report is yet to come
        (view_of(("b", 9)), Ownership("a", 4), "b", 9),  # a claim without the ledger
        (view_of(("a", 4), ("b", 5)), None, "b", 5),
        (view_of(("a", 4)), Ownership("gone", 9), "a", 4),
    ],
)
def test_the_newest_epoch_tells_the_source(view: ClusterView, owner: Ownership | None, source: str, epoch: int) -> None:
    move = plan_move(view, owner, "r", "c")
    order = move.order(traceparent="t")
    assert (move.source.instance_id, order.epoch) == (source, epoch)
    assert (order.request_id, order.target_instance_id, order.target_address) == ("r", "c", "c:1")
    assert (order.reason, order.traceparent) == (decode_pb2.MIGRATION_REASON_OPERATOR, "t")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("view", "target", "code", "field"),
    [
        (view_of(("a", 1)), "nobody", grpc.StatusCode.NOT_FOUND, "target_instance_id"),
        (view_of(("a", 1)), "p", grpc.StatusCode.INVALID_ARGUMENT, "target_instance_id"),
        (
            view_of(("a", 1), target=InstanceState.DRAINING),
            "c",
            grpc.StatusCode.FAILED_PRECONDITION,
            "target_instance_id",
        ),
        (view_of(("c", 1)), "c", grpc.StatusCode.FAILED_PRECONDITION, "target_instance_id"),
        (view_of(), "c", grpc.StatusCode.NOT_FOUND, "request_id"),
    ],
)
def test_what_cannot_move(view: ClusterView, target: str, code: grpc.StatusCode, field: str) -> None:
    with pytest.raises(StatusError) as refused:
        plan_move(view, None, "r", target)
    assert (refused.value.code, refused.value.fields) == (code, [field])


async def paused(mesh: Mesh) -> tuple[asyncio.Task[Any], DecodePeer, DecodePeer]:
    """A request ``r`` that pauses at its instance, that instance, and another."""
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 5

    async def collect() -> list[Any]:
        return [message async for message in mesh.generate(request_id="r")]

    answer = asyncio.create_task(collect())
    await until(lambda: any(decode.running for decode in mesh.decodes))
    source, target = sorted(mesh.decodes, key=lambda decode: not decode.running)
    target.pause_after = None
    return answer, source, target


def ask(mesh: Mesh, target: str, *, request_id: str = "r", timeout: float = 20, **options: Any) -> Any:
    request = cluster_pb2.MigrateSequenceRequest(request_id=request_id, target_instance_id=target)
    return mesh.cluster.MigrateSequence(request, timeout=timeout, **options)


async def refusal(call: Any) -> StatusError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def test_an_operator_moves_a_request(mesh: Mesh) -> None:
    answer, source, target = await paused(mesh)

    async def obey(order: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        for stage in STAGES:
            yield decode_pb2.MigrateResponse(stage=stage)
        await source.move(order.request_id, target)
        yield decode_pb2.MigrateResponse(stage=decode_pb2.MIGRATION_STAGE_MOVED, copied_blocks=3)

    source.on_order = obey
    traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    told = [message async for message in ask(mesh, target.instance_id, metadata=(("traceparent", traceparent),))]
    assert {message.source_instance_id for message in told} == {source.instance_id}
    assert [message.progress.stage for message in told] == [*STAGES, decode_pb2.MIGRATION_STAGE_MOVED]
    assert told[-1].progress.copied_blocks == 3
    (order,) = source.orders
    assert (order.epoch, order.target_address, order.traceparent) == (1, target.info.address, traceparent)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert messages[-1].usage.migrations == 1
    await mesh.nothing_left()


async def test_a_move_goes_on_without_its_asker(mesh: Mesh) -> None:
    answer, source, target = await paused(mesh)
    left = asyncio.Event()

    async def obey(order: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        yield decode_pb2.MigrateResponse(stage=STAGES[0])
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    source.on_order = obey
    call = ask(mesh, target.instance_id)
    assert (await call.read()).progress.stage == STAGES[0]
    call.cancel()
    async with asyncio.timeout(20):
        await left.wait()
    # The call at the source has ended; the source's migration is its own.
    await source.move("r", target)
    check_answer(await answer, "hello", 20)
    await mesh.nothing_left()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (StatusError(grpc.StatusCode.NOT_FOUND, "no such sequence"), grpc.StatusCode.NOT_FOUND, "does not run at"),
        (
            StatusError(grpc.StatusCode.FAILED_PRECONDITION, "on its way elsewhere"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "on its way elsewhere",
        ),
        (
            retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "2 migrations leave here", 0.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "2 migrations leave here; try again",
        ),
        (
            retry_later(grpc.StatusCode.UNAVAILABLE, "the ledger does not answer", 0.5),
            grpc.StatusCode.UNAVAILABLE,
            "the ledger does not answer; try again",
        ),
        (
            StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "8 calls follow this migration; wait for its end"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "wait for its end",
        ),
        (StatusError(grpc.StatusCode.INTERNAL, "oops"), grpc.StatusCode.UNAVAILABLE, "does not tell"),
        (StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), grpc.StatusCode.DEADLINE_EXCEEDED, "goes on"),
    ],
)
async def test_what_the_source_refuses_says_what_to_do(
    mesh: Mesh, error: StatusError, code: grpc.StatusCode, says: str
) -> None:
    answer, source, target = await paused(mesh)

    async def refuse(order: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        raise error
        yield

    source.on_order = refuse
    status = await refusal(ask(mesh, target.instance_id))
    assert status.code is code
    assert says in status.message
    if error.retry_delay_s is not None:
        assert status.retry_delay_s == error.retry_delay_s
    source.resume()
    check_answer(await answer, "hello", 20)
    await mesh.nothing_left()


async def test_a_deadline_ends_the_asking_and_not_the_move(mesh: Mesh) -> None:
    _, source, target = await paused(mesh)

    async def hang(order: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        yield decode_pb2.MigrateResponse(stage=STAGES[0])
        await asyncio.Event().wait()

    source.on_order = hang
    status = await refusal(ask(mesh, target.instance_id, timeout=0.5))
    assert status.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_source_that_does_not_answer(mesh: Mesh) -> None:
    _, source, target = await paused(mesh)
    await source.server.stop(0)
    await mesh.ledger.claim("q", source.instance_id, expected=None, epoch=1, ttl_s=60)
    status = await refusal(ask(mesh, target.instance_id, request_id="q"))
    assert (status.code, status.retry_delay_s is None) == (grpc.StatusCode.UNAVAILABLE, False)
    assert "does not answer; try again" in status.message


async def test_requests_that_run_nowhere_and_bad_ids(mesh: Mesh) -> None:
    await mesh.start(decodes=1)
    status = await refusal(ask(mesh, "decode-0", request_id="nobody"))
    assert (status.code, status.fields) == (grpc.StatusCode.NOT_FOUND, ["request_id"])
    status = await refusal(ask(mesh, "decode-0", request_id="a b"))
    assert (status.code, status.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])
    status = await refusal(ask(mesh, ""))
    assert (status.code, status.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["target_instance_id"])
    mesh.ledger.down = True
    status = await refusal(ask(mesh, "decode-0", request_id="nobody"))
    assert status.code is grpc.StatusCode.NOT_FOUND
    mesh.ledger.down = False

"""What every backend must do, against real servers on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc.aio
import numpy as np
import pytest

from starmesh.transfer import LayoutMismatch, LeaseLost, TransferError
from starmesh.transfer.host_memory import HostMemory
from starmesh.transfer.wire import layout_to_pb
from starmesh.types import KvLayout, TransferBackend
from starmesh.v1 import sequence_pb2, transfer_pb2, transfer_pb2_grpc
from tests.transfer.conftest import BACKENDS, LAYOUT, Instance, running_instance

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
async def holder(backend: TransferBackend) -> AsyncIterator[Instance]:
    async with running_instance([backend]) as instance:
        yield instance


@pytest.fixture
async def target(backend: TransferBackend) -> AsyncIterator[Instance]:
    async with running_instance([backend], memory=HostMemory(LAYOUT, 64), instance_id="target") as instance:
        yield instance


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        (range(64), range(64)),
        ([5], [9]),
        ([7, 3, 4, 5, 63, 0], [0, 10, 11, 12, 1, 2]),
        ([9, 8, 7], [20, 21, 22]),
    ],
)
async def test_bytes_are_equal_and_no_others_are_touched(
    holder: Instance, target: Instance, backend: TransferBackend, remote: list[int], local: list[int]
) -> None:
    ticket = holder.ticket(range(64))
    result = await target.transfer.puller.pull(ticket, list(remote), list(local), timeout_s=30)
    assert result.backend is backend
    assert result.bytes == len(remote) * LAYOUT.block_bytes
    assert np.array_equal(target.memory.blocks[list(local)], holder.memory.blocks[list(remote)])
    untouched = sorted(set(range(64)) - set(local))
    assert not target.memory.blocks[untouched].any()
    await target.transfer.puller.release(ticket, timeout_s=30)
    assert holder.ended == ["owner"]
    assert len(holder.transfer.leases) == 0


async def test_no_blocks(holder: Instance, target: Instance) -> None:
    ticket = holder.ticket([])
    result = await target.transfer.puller.pull(ticket, [], [], timeout_s=30)
    assert result.bytes == 0
    await target.transfer.puller.release(ticket, timeout_s=30)


async def test_tens_of_megabytes(backend: TransferBackend) -> None:
    layout = KvLayout("test", "float32", layers=30, kv_heads=3, head_dim=64, block_tokens=16)
    order = list(np.random.default_rng(1).permutation(100))
    async with (
        running_instance([backend], layout=layout, total_blocks=100) as holder,
        running_instance([backend], memory=HostMemory(layout, 100), instance_id="target") as target,
    ):
        ticket = holder.ticket(range(100))
        result = await target.transfer.puller.pull(ticket, list(range(100)), [int(i) for i in order], timeout_s=60)
        assert result.bytes == 100 * 737_280
        assert np.array_equal(target.memory.blocks[order], holder.memory.blocks)


async def test_concurrent_pulls(holder: Instance, target: Instance) -> None:
    tickets = [holder.ticket(range(8 * i, 8 * i + 8)) for i in range(8)]
    await asyncio.gather(
        *(target.transfer.puller.pull(ticket, ticket.block_ids, ticket.block_ids, timeout_s=30) for ticket in tickets)
    )
    assert np.array_equal(target.memory.blocks, holder.memory.blocks)
    await asyncio.gather(*(target.transfer.puller.release(ticket, timeout_s=30) for ticket in tickets))
    assert len(holder.ended) == 8


@pytest.mark.parametrize("field", ["model_revision", "dtype", "layers", "kv_heads", "head_dim", "block_tokens"])
async def test_a_wrong_layout_names_the_field(holder: Instance, backend: TransferBackend, field: str) -> None:
    other = {"model_revision": "other", "dtype": "bfloat16"}.get(field, 1)
    layout = replace(LAYOUT, **{field: other})
    async with running_instance([backend], layout=layout, total_blocks=4, instance_id="target") as target:
        ticket = holder.ticket(range(4))
        with pytest.raises(LayoutMismatch) as seen:
            await target.transfer.puller.pull(ticket, [0], [0], timeout_s=30)
        assert seen.value.field == field
        # The holder itself says so too, whatever the ticket claimed.
        with pytest.raises(LayoutMismatch) as seen:
            await target.transfer.puller.pull(replace(ticket, layout=layout), [0], [0], timeout_s=30)
        assert seen.value.field == field
        assert str(other) in str(seen.value)


async def test_a_lease_that_is_gone(holder: Instance, target: Instance) -> None:
    ticket = holder.ticket(range(4))
    holder.transfer.revoke("owner")
    with pytest.raises(LeaseLost):
        await target.transfer.puller.pull(ticket, [0], [0], timeout_s=30)
    with pytest.raises(LeaseLost):
        await target.transfer.puller.release(ticket, timeout_s=30)
    assert holder.ended == []


async def test_a_lease_that_expires_after_the_pull_is_lost_at_release(holder: Instance, target: Instance) -> None:
    ticket = holder.ticket(range(4), duration_s=10.0)
    await target.transfer.puller.pull(ticket, [0], [0], timeout_s=30)
    holder.clock.advance(10.0)
    with pytest.raises(LeaseLost):
        await target.transfer.puller.release(ticket, timeout_s=30)

    async def swept() -> None:
        while not holder.ended:
            await asyncio.sleep(0.02)

    await asyncio.wait_for(swept(), 20)
    assert holder.ended == ["owner"]


async def test_blocks_that_the_ticket_does_not_name(holder: Instance, target: Instance) -> None:
    ticket = holder.ticket(range(4))
    for blocks, local in ([[4], [0]], [[1000], [0]], [[-1], [0]], [[0, 1], [0]], [[0, 1], [0, 0]], [[0, 0], [0, 1]]):
        with pytest.raises(TransferError):
            await target.transfer.puller.pull(ticket, blocks, local, timeout_s=30)


async def test_a_ticket_that_names_more_than_the_lease_or_the_pool(holder: Instance, target: Instance) -> None:
    ticket = replace(holder.ticket(range(4)), block_ids=(3, 1000))
    with pytest.raises(TransferError):
        await target.transfer.puller.pull(ticket, [1000], [0], timeout_s=30)


async def test_a_holder_that_is_not_there(target: Instance, holder: Instance) -> None:
    ticket = replace(holder.ticket([0]), address="127.0.0.1:1")
    with pytest.raises(TransferError, match="negotiating with holder"):
        await target.transfer.puller.pull(ticket, [0], [0], timeout_s=30)


async def test_a_cancelled_pull_leaves_the_next_one_working(holder: Instance, target: Instance) -> None:
    ticket = holder.ticket(range(64))
    pull = asyncio.create_task(target.transfer.puller.pull(ticket, range(64), range(64), timeout_s=30))
    await asyncio.sleep(0)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await target.transfer.puller.pull(ticket, range(64), range(64), timeout_s=30)
    assert np.array_equal(target.memory.blocks, holder.memory.blocks)


async def test_a_holder_without_a_backend_of_ours(holder: Instance, backend: TransferBackend) -> None:
    async with grpc.aio.insecure_channel(holder.address) as channel:
        request = transfer_pb2.NegotiateRequest(
            instance_id="target",
            layout=layout_to_pb(LAYOUT),
            backends=[sequence_pb2.TRANSFER_BACKEND_UNSPECIFIED],
        )
        with pytest.raises(grpc.aio.AioRpcError) as seen:
            await transfer_pb2_grpc.TransferServiceStub(channel).Negotiate(request, timeout=30)
        assert seen.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert backend.value in seen.value.details()

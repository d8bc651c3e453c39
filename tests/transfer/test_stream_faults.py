"""The stream backend against a holder, or a network, that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from starmesh.transfer import LeaseLost, TransferError
from starmesh.transfer import stream as stream_backend
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import KvLayout, TransferBackend
from starmesh.v1 import transfer_pb2, transfer_pb2_grpc
from tests.transfer.conftest import Instance, running_instance

# One block is one chunk of 384 KiB.
LAYOUT = KvLayout("test", "float32", layers=16, kv_heads=3, head_dim=64, block_tokens=16)
BLOCKS = 12

Chunk = transfer_pb2.PullBlocksResponse
Fault = Callable[[int, int, Chunk, grpc.aio.ServicerContext[Any, Any]], Any]


class FaultyServicer(transfer_pb2_grpc.TransferServiceServicer):
    """The real servicer, with ``fault(call, index, chunk, context)`` awaited before each chunk: it may change the chunk
    or end the call. Records where each call started."""

    def __init__(self, real: transfer_pb2_grpc.TransferServiceServicer, fault: Fault) -> None:
        self.real = real
        self.fault = fault
        self.starts: list[int] = []
        self.Negotiate = real.Negotiate
        self.RenewLease = real.RenewLease
        self.ReleaseLease = real.ReleaseLease

    Negotiate = RenewLease = ReleaseLease = None  # set on the instance; the base class wants the names

    async def PullBlocks(self, request: Any, context: Any) -> AsyncIterator[Chunk]:  # noqa: N802
        self.starts.append(request.start_byte)
        call, index = len(self.starts), 0
        async for chunk in self.real.PullBlocks(request, context):
            await self.fault(call, index, chunk, context)
            index += 1
            yield chunk


class Pair:
    """A faulty holder and a target."""

    def __init__(self, holder: Instance, target: Instance, faulty: FaultyServicer) -> None:
        self.holder, self.target, self.faulty = holder, target, faulty

    async def pull(self, *, timeout_s: float = 30.0, duration_s: float = 60.0) -> Any:
        self.ticket = self.holder.ticket(range(BLOCKS), duration_s=duration_s)
        return await self.target.transfer.puller.pull(self.ticket, range(BLOCKS), range(BLOCKS), timeout_s=timeout_s)

    def assert_equal(self) -> None:
        assert np.array_equal(self.target.memory.blocks, self.holder.memory.blocks)


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[Fault], Pair]]:
    faulty: list[FaultyServicer] = []

    def wrap(real: Any) -> FaultyServicer:
        faulty.append(FaultyServicer(real, request.getfixturevalue("no_fault")))
        return faulty[0]

    async with (
        running_instance([TransferBackend.STREAM], layout=LAYOUT, total_blocks=BLOCKS, wrap=wrap) as holder,
        running_instance([TransferBackend.STREAM], memory=HostMemory(LAYOUT, BLOCKS), instance_id="target") as target,
    ):

        def make(fault: Fault) -> Pair:
            faulty[0].fault = fault
            return Pair(holder, target, faulty[0])

        yield make


@pytest.fixture
def no_fault() -> Fault:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        pass

    return fault


async def test_a_damaged_chunk_is_asked_for_again(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if call == 1 and index == 4:
            chunk.data = chunk.data[:100] + bytes([chunk.data[100] ^ 1]) + chunk.data[101:]

    both = pair(fault)
    await both.pull()
    both.assert_equal()
    assert both.faulty.starts == [0, 4 * LAYOUT.block_bytes]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_a_broken_stream_goes_on_where_it_broke(pair: Callable[[Fault], Pair], code: grpc.StatusCode) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if call <= 3 and index == 3:
            await context.abort(code, "the test cut it")

    both = pair(fault)
    await both.pull()
    both.assert_equal()
    assert both.faulty.starts == [0, *(3 * k * LAYOUT.block_bytes for k in (1, 2, 3))]


async def test_a_stream_that_ends_early_or_skips_is_not_taken_for_whole(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if call == 1 and index == 2:
            chunk.offset += LAYOUT.block_bytes
        if call == 2 and index == 2:
            chunk.data = b""

    both = pair(fault)
    await both.pull()
    both.assert_equal()
    assert both.faulty.starts == [0, 2 * LAYOUT.block_bytes, 4 * LAYOUT.block_bytes]


async def test_a_holder_that_only_sends_damage_ends_in_an_error(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        chunk.crc32 ^= 1

    both = pair(fault)
    with pytest.raises(TransferError, match=r"gave up at byte 0 .*damaged"):
        await both.pull()
    assert len(both.faulty.starts) == 1 + stream_backend.MAX_RESUMES
    assert not both.target.memory.blocks.any()


async def test_a_holder_that_stalls_ends_in_an_error_in_time(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if index == 2:
            await asyncio.Event().wait()

    both = pair(fault)
    with pytest.raises(TransferError, match="DEADLINE_EXCEEDED"):
        await both.pull(timeout_s=0.5)


async def test_a_lease_that_ends_in_mid_stream_stops_the_stream(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if index == 3:
            both.holder.clock.advance(60.0)
            # What the owner writes from now on must not be sent.
            both.holder.memory.blocks[4:] = 0xEE

    both = pair(fault)
    with pytest.raises(LeaseLost):
        await both.pull()
    assert both.faulty.starts == [0]
    assert not (both.target.memory.blocks[4:] == 0xEE).all(axis=1).any()
    with pytest.raises(LeaseLost):
        await both.target.transfer.puller.release(both.ticket, timeout_s=30)


async def test_a_lease_that_is_revoked_while_the_stream_stalls_ends_the_pull(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        if index == 2:
            both.holder.transfer.revoke("owner")
            await asyncio.Event().wait()

    both = pair(fault)
    with pytest.raises(LeaseLost, match="renewing"):
        await both.pull(duration_s=0.3)


async def test_a_long_pull_keeps_its_lease(pair: Callable[[Fault], Pair]) -> None:
    async def fault(call: int, index: int, chunk: Chunk, context: Any) -> None:
        # The lease's clock passes its duration twice over; the renewals in between come in real time.
        renewed = both.holder.transfer.leases
        held_until = both.holder.clock.now_s() + 0.3
        both.holder.clock.advance(0.2)
        async with asyncio.timeout(20):
            while not renewed.holds(both.ticket.lease_id, now_s=held_until + 0.1):
                await asyncio.sleep(0.01)

    both = pair(fault)
    await both.pull(duration_s=0.3)
    both.assert_equal()
    await both.target.transfer.puller.release(both.ticket, timeout_s=30)


async def test_resumes_start_in_mid_block(pair: Callable[[Fault], Pair], no_fault: Fault) -> None:
    both = pair(no_fault)
    ticket = both.holder.ticket(range(BLOCKS))
    request = transfer_pb2.PullBlocksRequest(
        lease_id=ticket.lease_id,
        block_ids=[5, 1, 7],
        start_byte=LAYOUT.block_bytes + 1000,
        layout=stream_backend.layout_to_pb(LAYOUT),
    )
    expected = both.holder.memory.blocks[[5, 1, 7]].tobytes()[LAYOUT.block_bytes + 1000 :]
    async with grpc.aio.insecure_channel(ticket.address) as channel:
        chunks = [chunk async for chunk in transfer_pb2_grpc.TransferServiceStub(channel).PullBlocks(request)]
    assert b"".join(chunk.data for chunk in chunks) == expected
    assert chunks[0].offset == request.start_byte


@pytest.mark.parametrize(
    ("block_ids", "start_byte", "field"),
    [
        ([BLOCKS], 0, "block_ids"),
        ([0, 0], 0, "block_ids"),
        ([0], LAYOUT.block_bytes + 1, "start_byte"),
        ([0], -1, "start_byte"),
    ],
)
async def test_bad_requests_name_the_field(
    pair: Callable[[Fault], Pair], no_fault: Fault, block_ids: list[int], start_byte: int, field: str
) -> None:
    ticket = pair(no_fault).holder.ticket(range(BLOCKS))
    request = transfer_pb2.PullBlocksRequest(
        lease_id=ticket.lease_id,
        block_ids=block_ids,
        start_byte=start_byte,
        layout=stream_backend.layout_to_pb(LAYOUT),
    )
    async with grpc.aio.insecure_channel(ticket.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=field) as seen:
            await transfer_pb2_grpc.TransferServiceStub(channel).PullBlocks(request).read()
    assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("heads", [1, 3, 64])
def test_chunks_are_even_and_within_the_limit(heads: int) -> None:
    layout = KvLayout("test", "float32", layers=7, kv_heads=heads, head_dim=40, block_tokens=16)
    memory = HostMemory(layout, 20)
    reader = stream_backend.ChunkReader(memory)
    chunks = [
        chunk for offset, blocks in reader.reads(range(20), 0) for chunk in reader.read(offset, blocks, start_byte=0)
    ]
    sizes = [len(chunk.data) for chunk in chunks]
    assert sum(sizes) == memory.blocks.nbytes
    assert max(sizes) <= stream_backend.CHUNK_BYTES
    if layout.block_bytes > stream_backend.CHUNK_BYTES:
        assert min(sizes) > stream_backend.CHUNK_BYTES // 2

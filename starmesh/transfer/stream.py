"""The stream backend: blocks as checksummed chunks of one gRPC response stream, resumed where it broke.

Owns how blocks become chunks (``ChunkReader``, the holder's end) and how chunks become blocks (``StreamPuller``).
Leases are the servicer's business. The stream is the blocks one after another, as bytes; a chunk is a range of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from starmesh.transfer import BlockMemory, TransferError
from starmesh.transfer.wire import layout_to_pb, transfer_error
from starmesh.transfer.worker_thread import in_thread, outlast
from starmesh.types import KvTicket
from starmesh.v1 import transfer_pb2, transfer_pb2_grpc

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 * 1024
"""Bytes of a chunk at most; measured: 256 KiB to 1 MiB stream fastest, and the protocol's limit is 1 MiB."""

MAX_RESUMES = 5
"""How often a pull asks again after a broken stream or a bad chunk."""

RESUME_DELAY_S = 0.05
"""Wait before the first resume; doubles each time, so that all five take 1.5 s of a refusing holder."""

# What may pass: the connection, the holder's overload, a proxy. A deadline is final, and so is what the holder decided.
_RESUMABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
}


class ChunkReader:
    """Cuts blocks of ``memory`` into chunks."""

    def __init__(self, memory: BlockMemory, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._memory = memory
        self._block_bytes = memory.layout.block_bytes
        # Small blocks share a chunk; a large block is split evenly.
        self._blocks_a_read = max(1, chunk_bytes // self._block_bytes)
        self._chunk_bytes = (
            self._blocks_a_read * self._block_bytes
            if self._block_bytes <= chunk_bytes
            else -(-self._block_bytes // -(-self._block_bytes // chunk_bytes))
        )

    def reads(self, block_ids: Sequence[int], start_byte: int) -> Iterator[tuple[int, Sequence[int]]]:
        """Where each read begins in the stream, and the blocks that it takes, from the one with ``start_byte`` on."""
        first = start_byte // self._block_bytes
        for index in range(first, len(block_ids), self._blocks_a_read):
            yield index * self._block_bytes, block_ids[index : index + self._blocks_a_read]

    def read(self, offset: int, block_ids: Sequence[int], start_byte: int) -> list[transfer_pb2.PullBlocksResponse]:
        """Copy whole blocks that begin at ``offset`` of the stream into chunks, from ``start_byte`` on. Blocking."""
        views = [memoryview(self._memory.read_block(block_id)) for block_id in block_ids]
        data = views[0] if len(views) == 1 else memoryview(b"".join(views))
        chunks = []
        for begin in range(max(start_byte - offset, 0), len(data), self._chunk_bytes):
            piece = bytes(data[begin : begin + self._chunk_bytes])
            chunks.append(transfer_pb2.PullBlocksResponse(offset=offset + begin, data=piece, crc32=zlib.crc32(piece)))
        return chunks


@dataclass(slots=True)
class _Pull:
    """One pull under way; ``position`` counts the bytes that are verified and written."""

    ticket: KvTicket
    block_ids: Sequence[int]
    local_block_ids: Sequence[int]
    total_bytes: int
    deadline_s: float
    doing: str
    position: int = 0

    @property
    def remaining_s(self) -> float:
        return max(self.deadline_s - time.monotonic(), 0.0)


class StreamPuller:
    """Pulls leased blocks into ``memory`` over gRPC."""

    def __init__(self, memory: BlockMemory, channel_for: Callable[[str], grpc.aio.Channel]) -> None:
        self._memory = memory
        self._channel_for = channel_for

    async def pull(
        self, ticket: KvTicket, block_ids: Sequence[int], local_block_ids: Sequence[int], *, timeout_s: float
    ) -> None:
        """Copy remote ``block_ids`` into ``local_block_ids``, one to one.

        Raises LeaseLost, LayoutMismatch or another TransferError. Once it has returned or raised, cancelled or not, it
        writes no more.
        """
        pull = _Pull(
            ticket=ticket,
            block_ids=block_ids,
            local_block_ids=local_block_ids,
            total_bytes=len(block_ids) * self._memory.layout.block_bytes,
            deadline_s=time.monotonic() + timeout_s,
            doing=f"pulling {len(block_ids)} KV blocks from {ticket.instance_id} at {ticket.address}",
        )
        resumes = 0
        while (broken := await self._follow(pull)) is not None:
            reached = f"at byte {pull.position} of {pull.total_bytes}: {broken}"
            if resumes == MAX_RESUMES:
                raise TransferError(f"{pull.doing}: gave up {reached}")
            if pull.remaining_s == 0:
                raise TransferError(f"{pull.doing}: {timeout_s:g} s were over {reached}")
            log.warning("%s: resuming %s", pull.doing, reached)
            await asyncio.sleep(min(RESUME_DELAY_S * 2**resumes, pull.remaining_s))
            resumes += 1

    async def _follow(self, pull: _Pull) -> str | None:
        """Follow one stream. Returns what broke it, None when all bytes are here."""
        stub = transfer_pb2_grpc.TransferServiceStub(self._channel_for(pull.ticket.address))
        request = transfer_pb2.PullBlocksRequest(
            lease_id=pull.ticket.lease_id,
            block_ids=pull.block_ids,
            start_byte=pull.position,
            layout=layout_to_pb(self._memory.layout),
        )
        call = stub.PullBlocks(request, timeout=pull.remaining_s)
        # A chunk is verified and written while the next one arrives.
        taking: asyncio.Task[str | None] | None = None
        try:
            async for chunk in call:
                if taking is not None and (flaw := await taking) is not None:
                    return flaw
                taking = asyncio.create_task(in_thread(self._take, pull, chunk))
            if taking is not None and (flaw := await taking) is not None:
                return flaw
        except grpc.aio.AioRpcError as error:
            if error.code() not in _RESUMABLE:
                raise transfer_error(error, pull.doing) from error
            return f"{error.code().name}: {error.details()}"
        finally:
            call.cancel()
            if taking is not None:
                await outlast(taking)
        return None if pull.position == pull.total_bytes else "the stream ended early"

    def _take(self, pull: _Pull, chunk: transfer_pb2.PullBlocksResponse) -> str | None:
        """Verify a chunk, write it into its blocks and move on. Returns what is wrong with it, if anything is."""
        position, data = pull.position, memoryview(chunk.data)
        if chunk.offset != position or not data or position + len(data) > pull.total_bytes:
            return f"a chunk of {len(data)} bytes came for byte {chunk.offset}"
        if zlib.crc32(data) != chunk.crc32:
            return "a chunk is damaged (its CRC-32 differs)"
        block_bytes = self._memory.layout.block_bytes
        while data:
            index, offset = divmod(position, block_bytes)
            piece = data[: block_bytes - offset]
            self._memory.write_block(pull.local_block_ids[index], offset, piece)
            position += len(piece)
            data = data[len(piece) :]
        pull.position = position
        return None

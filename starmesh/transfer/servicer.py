"""The holder's end: settles backends, streams leased blocks, keeps and ends leases.

Owns no memory and frees no block: when a lease ends it tells the blocks' owner (``on_end``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeAlias

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from starmesh.clock import Clock
from starmesh.transfer import BlockMemory, LayoutMismatch, LeaseLost
from starmesh.transfer.lease import LeaseTable
from starmesh.transfer.nixl import NixlAgent
from starmesh.transfer.stream import ChunkReader
from starmesh.transfer.wire import (
    BACKEND_FROM_PB,
    ERROR_DOMAIN,
    abort,
    abort_layout_mismatch,
    check_layouts,
    layout_from_pb,
)
from starmesh.transfer.worker_thread import in_thread, outlast
from starmesh.types import TransferBackend
from starmesh.v1 import sequence_pb2, transfer_pb2, transfer_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

MAX_STREAMS = 8
"""Streams that send at a time: more would share the same memory and network."""

MAX_WAITING_STREAMS = 64
"""Streams that wait for their turn; beyond that a puller is told to come back."""


class TransferServicer(transfer_pb2_grpc.TransferServiceServicer):
    """Serves one instance's blocks. ``nixl`` is None where the instance does not offer NIXL."""

    def __init__(
        self,
        memory: BlockMemory,
        leases: LeaseTable,
        *,
        incarnation: str,
        backends: Sequence[TransferBackend],
        nixl: NixlAgent | None,
        on_end: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._layout = memory.layout
        self._leases = leases
        self._incarnation = incarnation
        self._backends = frozenset(backends)
        self._nixl = nixl
        self._on_end = on_end
        self._clock = clock
        self._chunks = ChunkReader(memory)
        self._turns = asyncio.Semaphore(MAX_STREAMS)
        self._streams = 0

    async def Negotiate(  # noqa: N802, the service's name
        self, request: transfer_pb2.NegotiateRequest, context: Context
    ) -> transfer_pb2.NegotiateResponse:
        await self._check_layout(request.layout, context)
        chosen = next((one for one in request.backends if BACKEND_FROM_PB.get(one) in self._backends), None)
        if chosen is None:
            ours = ", ".join(sorted(backend.value for backend in self._backends))
            await abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"no transfer backend in common; this instance offers {ours}: start both with one of them",
                error_details_pb2.ErrorInfo(reason="NO_COMMON_BACKEND", domain=ERROR_DOMAIN, metadata={"holder": ours}),
            )
        nixl = self._nixl if BACKEND_FROM_PB[chosen] is TransferBackend.NIXL else None
        return transfer_pb2.NegotiateResponse(
            backend=chosen, nixl=nixl.endpoint() if nixl else None, incarnation=self._incarnation
        )

    async def PullBlocks(  # noqa: N802
        self, request: transfer_pb2.PullBlocksRequest, context: Context
    ) -> AsyncIterator[transfer_pb2.PullBlocksResponse]:
        await self._check_layout(request.layout, context)
        await self._check_covered(request, context)
        async with self._turn(context), aclosing(self._read_ahead(request)) as chunks:
            async for chunk in chunks:
                # The bytes were copied before this look at the lease, so what is sent was read under it.
                if not self._leases.holds(request.lease_id, now_s=self._clock.now_s()):
                    await _abort_lost(context, request.lease_id)
                yield chunk

    async def RenewLease(  # noqa: N802
        self, request: transfer_pb2.RenewLeaseRequest, context: Context
    ) -> transfer_pb2.RenewLeaseResponse:
        try:
            duration_s = self._leases.renew(request.lease_id, now_s=self._clock.now_s())
        except LeaseLost:
            await _abort_lost(context, request.lease_id)
        lease_duration = Duration()
        lease_duration.FromNanoseconds(int(duration_s * 1e9))
        return transfer_pb2.RenewLeaseResponse(lease_duration=lease_duration, incarnation=self._incarnation)

    async def ReleaseLease(  # noqa: N802
        self, request: transfer_pb2.ReleaseLeaseRequest, context: Context
    ) -> transfer_pb2.ReleaseLeaseResponse:
        try:
            owner_key = self._leases.release(request.lease_id, now_s=self._clock.now_s())
        except LeaseLost:
            await _abort_lost(context, request.lease_id)
        self._on_end(owner_key)
        return transfer_pb2.ReleaseLeaseResponse()

    async def _read_ahead(
        self, request: transfer_pb2.PullBlocksRequest
    ) -> AsyncGenerator[transfer_pb2.PullBlocksResponse, None]:
        """The chunks of a request; while some are sent, the next are read."""
        ahead: asyncio.Task[list[transfer_pb2.PullBlocksResponse]] | None = None
        try:
            for offset, block_ids in self._chunks.reads(request.block_ids, request.start_byte):
                ready = await ahead if ahead is not None else ()
                ahead = asyncio.create_task(in_thread(self._chunks.read, offset, block_ids, request.start_byte))
                for chunk in ready:
                    yield chunk
            for chunk in await ahead if ahead is not None else ():
                yield chunk
        finally:
            if ahead is not None:
                await outlast(ahead)

    async def _check_layout(self, layout: sequence_pb2.KvLayout, context: Context) -> None:
        try:
            check_layouts(self._layout, layout_from_pb(layout))
        except LayoutMismatch as mismatch:
            await abort_layout_mismatch(context, mismatch)

    async def _check_covered(self, request: transfer_pb2.PullBlocksRequest, context: Context) -> None:
        now_s = self._clock.now_s()
        if not self._leases.holds(request.lease_id, now_s=now_s):
            await _abort_lost(context, request.lease_id)
        if not self._leases.covers(request.lease_id, request.block_ids, now_s=now_s):
            await _abort_bad_field(context, "block_ids", "must all be under the lease; see the ticket")
        if len(set(request.block_ids)) != len(request.block_ids):
            await _abort_bad_field(context, "block_ids", "must not repeat; pull a block once")
        if not 0 <= request.start_byte <= len(request.block_ids) * self._layout.block_bytes:
            await _abort_bad_field(context, "start_byte", "must lie within the blocks")

    @asynccontextmanager
    async def _turn(self, context: Context) -> AsyncIterator[None]:
        """Wait for a turn to send, or end the call when too many wait. The call's deadline bounds the wait."""
        if self._streams >= MAX_STREAMS + MAX_WAITING_STREAMS:
            await abort(
                context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._streams} pulls are under way; try again shortly"
            )
        self._streams += 1
        try:
            async with self._turns:
                yield
        finally:
            self._streams -= 1


async def _abort_lost(context: Context, lease_id: str) -> None:
    await abort(
        context,
        grpc.StatusCode.NOT_FOUND,
        f"lease {lease_id!r} is over; discard what was pulled and ask for a new ticket",
    )


async def _abort_bad_field(context: Context, field: str, description: str) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    await abort(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {description}",
        error_details_pb2.BadRequest(field_violations=[violation]),
    )

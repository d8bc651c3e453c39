"""The puller's end of a transfer: settles a backend with each holder, keeps the lease while it pulls, falls back.

Owns what was settled with whom. Moves no bytes itself (``stream``, ``nixl``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from starmesh.transfer import BlockMemory, LeaseLost, PullResult, TransferError
from starmesh.transfer.nixl import NixlAgent, NixlError
from starmesh.transfer.stream import StreamPuller
from starmesh.transfer.wire import BACKEND_FROM_PB, BACKEND_TO_PB, check_layouts, layout_to_pb, transfer_error
from starmesh.transfer.worker_thread import outlast
from starmesh.types import KvTicket, TransferBackend
from starmesh.v1 import transfer_pb2, transfer_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
"""Deadline of the small calls: Negotiate, RenewLease."""

SECOND_BEST_S = 30.0
"""How long a backend that is not our best, or no longer, is used with a holder before we try for the best again."""

NIXL_SHARE = 0.5
"""Share of a pull's time that NIXL may use up: what it leaves is for the stream."""

MAX_HOLDERS = 1024
"""Holders whose terms are kept; instances come and go with new addresses."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """What was settled with a holder. ``nixl`` is None for the stream."""

    backend: TransferBackend
    nixl: transfer_pb2.NixlEndpoint | None
    incarnation: str
    ends_at_s: float


class NegotiatingPuller:
    """Pulls blocks into ``memory`` by the best backend that both ends have; implements ``Puller``.

    ``backends`` is in order of preference; ``nixl`` is the agent over the same memory, None without NIXL.
    ``channel_for`` gives the channel to an address; it stays the caller's to close.
    """

    def __init__(
        self,
        memory: BlockMemory,
        *,
        instance_id: str,
        backends: Sequence[TransferBackend],
        nixl: NixlAgent | None,
        channel_for: Callable[[str], grpc.aio.Channel],
    ) -> None:
        self._memory = memory
        self._instance_id = instance_id
        self._backends = tuple(backends)
        self._nixl = nixl
        self._channel_for = channel_for
        self._stream = StreamPuller(memory, channel_for)
        self._terms: dict[tuple[str, str], _Terms] = {}

    def __repr__(self) -> str:
        settled = ", ".join(f"{holder} {terms.backend.value}" for (_, holder), terms in self._terms.items())
        return f"<NegotiatingPuller {self._instance_id}: {settled or 'nobody yet'}>"

    async def pull(
        self, ticket: KvTicket, block_ids: Sequence[int], local_block_ids: Sequence[int], *, timeout_s: float
    ) -> PullResult:
        """Copy remote ``block_ids`` (all under ``ticket``'s lease) into ``local_block_ids``, one to one.

        Raises LeaseLost, LayoutMismatch or another TransferError. The lease is renewed meanwhile and goes on; the
        caller ends it with ``release``. Once this has returned or raised, cancelled or not, nothing more is written.
        """
        started_s = time.monotonic()
        deadline_s = started_s + timeout_s
        check_layouts(self._memory.layout, ticket.layout)
        _check_blocks(ticket, block_ids, local_block_ids)
        terms = await self._settle(ticket, deadline_s)
        if await self._renew(ticket, deadline_s) != terms.incarnation:
            await self._drop(ticket)
            terms = await self._settle(ticket, deadline_s)
        moving = self._move(ticket, terms, block_ids, local_block_ids, deadline_s)
        backend = await self._while_renewing(ticket, moving)
        pulled_bytes = len(block_ids) * self._memory.layout.block_bytes
        return PullResult(backend=backend, bytes=pulled_bytes, duration_s=time.monotonic() - started_s)

    async def release(self, ticket: KvTicket, *, timeout_s: float) -> None:
        """End the lease. Raises LeaseLost when it had ended before, or TransferError when nobody can say: then discard
        what was pulled."""
        request = transfer_pb2.ReleaseLeaseRequest(lease_id=ticket.lease_id)
        try:
            await self._stub(ticket).ReleaseLease(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise transfer_error(error, f"releasing a lease of {ticket.instance_id}") from error

    async def close(self) -> None:
        """Disconnect from all holders. Channels and the agent are the caller's."""
        terms, self._terms = list(self._terms.values()), {}
        for settled in terms:
            await self._forget(settled)

    async def _move(
        self,
        ticket: KvTicket,
        terms: _Terms,
        block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        deadline_s: float,
    ) -> TransferBackend:
        if terms.nixl is not None and self._nixl is not None:
            try:
                share_s = NIXL_SHARE * max(deadline_s - time.monotonic(), 0.0)
                await self._nixl.read(terms.nixl, block_ids, local_block_ids, timeout_s=share_s)
                return TransferBackend.NIXL
            except NixlError as error:
                if TransferBackend.STREAM not in self._backends:
                    await self._drop(ticket)
                    raise
                log.warning("pulling from %s by stream: %s", ticket.instance_id, error)
                await self._drop(ticket)
                await self._settle(ticket, deadline_s, without=TransferBackend.NIXL)
        await self._stream.pull(ticket, block_ids, local_block_ids, timeout_s=max(deadline_s - time.monotonic(), 0.0))
        return TransferBackend.STREAM

    async def _settle(self, ticket: KvTicket, deadline_s: float, *, without: TransferBackend | None = None) -> _Terms:
        """The terms with the ticket's holder, negotiated unless they stand."""
        key = (ticket.address, ticket.instance_id)
        now_s = time.monotonic()
        terms = self._terms.get(key)
        if terms is not None and now_s < terms.ends_at_s:
            return terms
        offered = [backend for backend in self._backends if backend is not without]
        request = transfer_pb2.NegotiateRequest(
            instance_id=self._instance_id,
            layout=layout_to_pb(self._memory.layout),
            backends=[BACKEND_TO_PB[backend] for backend in offered],
        )
        doing = f"negotiating with {ticket.instance_id} at {ticket.address}"
        try:
            response = await self._stub(ticket).Negotiate(request, timeout=_call_timeout_s(deadline_s))
        except grpc.aio.AioRpcError as error:
            raise transfer_error(error, doing) from error
        backend = BACKEND_FROM_PB.get(response.backend)
        if backend not in offered:
            raise TransferError(f"{doing}: it chose a backend that was not offered; do both run the same version?")
        best = backend is self._backends[0]
        terms = _Terms(
            backend=backend,
            nixl=response.nixl if backend is TransferBackend.NIXL else None,
            incarnation=response.incarnation,
            ends_at_s=float("inf") if best else now_s + SECOND_BEST_S,
        )
        old = self._terms.pop(key, None)
        self._terms[key] = terms
        if old is not None and old.nixl != terms.nixl:
            await self._forget(old)
        while len(self._terms) > MAX_HOLDERS:
            await self._forget(self._terms.pop(next(iter(self._terms))))
        log.info("KV from %s comes by %s", ticket.instance_id, backend.value)
        return terms

    async def _drop(self, ticket: KvTicket) -> None:
        terms = self._terms.pop((ticket.address, ticket.instance_id), None)
        if terms is not None:
            await self._forget(terms)

    async def _forget(self, terms: _Terms) -> None:
        if terms.nixl is not None and self._nixl is not None:
            await self._nixl.forget(terms.nixl.agent)

    async def _while_renewing(self, ticket: KvTicket, moving: Coroutine[Any, Any, TransferBackend]) -> TransferBackend:
        """Await ``moving`` while the lease is renewed every third of its duration. Raises LeaseLost when it ends."""
        mover = asyncio.ensure_future(moving)
        keeper = asyncio.ensure_future(self._keep(ticket))
        try:
            await asyncio.wait([mover, keeper], return_when=asyncio.FIRST_COMPLETED)
            return await (mover if mover.done() else keeper)
        finally:
            mover.cancel()
            keeper.cancel()
            await outlast(mover, keeper)

    async def _keep(self, ticket: KvTicket) -> TransferBackend:
        """Renew for as long as it goes; ends by raising LeaseLost, or never."""
        while True:
            await asyncio.sleep(ticket.lease_duration_s / 3)
            try:
                await self._renew(ticket, time.monotonic() + ticket.lease_duration_s / 3)
            except LeaseLost:
                raise
            except TransferError as error:  # a holder that is gone fails the pull itself
                log.warning("%s", error)

    async def _renew(self, ticket: KvTicket, deadline_s: float) -> str:
        """Renew the lease. Returns the holder's incarnation. Raises LeaseLost or TransferError."""
        request = transfer_pb2.RenewLeaseRequest(lease_id=ticket.lease_id)
        try:
            response = await self._stub(ticket).RenewLease(request, timeout=_call_timeout_s(deadline_s))
        except grpc.aio.AioRpcError as error:
            raise transfer_error(error, f"renewing a lease of {ticket.instance_id}") from error
        return response.incarnation

    def _stub(self, ticket: KvTicket) -> transfer_pb2_grpc.TransferServiceAsyncStub:
        return transfer_pb2_grpc.TransferServiceStub(self._channel_for(ticket.address))


def _call_timeout_s(deadline_s: float) -> float:
    return min(CALL_TIMEOUT_S, max(deadline_s - time.monotonic(), 0.0))


def _check_blocks(ticket: KvTicket, block_ids: Sequence[int], local_block_ids: Sequence[int]) -> None:
    if len(block_ids) != len(local_block_ids):
        raise TransferError(f"{len(block_ids)} blocks do not fit {len(local_block_ids)} local blocks one to one")
    if len(set(local_block_ids)) != len(local_block_ids) or len(set(block_ids)) != len(block_ids):
        raise TransferError("a block is named twice; each remote block goes into one local block")
    unknown = set(block_ids).difference(ticket.block_ids)
    if unknown:
        raise TransferError(f"blocks {sorted(unknown)[:5]} are not on the ticket of {ticket.instance_id}")

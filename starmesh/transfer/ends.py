"""Both ends of one instance's KV transfer, opened and closed together.

Owns the sweep that ends expired leases. The caller registers ``servicer`` with its gRPC server, hands ``puller`` to
whatever pulls, and grants leases on ``leases``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from starmesh.clock import Clock, WallClock
from starmesh.transfer import BlockMemory
from starmesh.transfer.lease import LeaseTable
from starmesh.transfer.negotiate import NegotiatingPuller
from starmesh.transfer.nixl import NixlAgent, NixlError, load_nixl
from starmesh.transfer.servicer import TransferServicer
from starmesh.types import TransferBackend

log = logging.getLogger(__name__)

PREFERENCE = (TransferBackend.NIXL, TransferBackend.STREAM)
"""The order in which backends are offered unless the operator says otherwise."""

SWEEP_INTERVAL_S = 0.5
"""Time between two looks for expired leases: how much longer than its lease a block may be kept."""


def available_backends() -> tuple[TransferBackend, ...]:
    """What this machine can use, best first. The stream always works; NIXL where a wheel of it is installed."""
    return tuple(backend for backend in PREFERENCE if backend is not TransferBackend.NIXL or load_nixl() is not None)


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """One instance's transfer: the holder's end (``servicer``, ``leases``) and the puller's (``puller``).

    ``backends`` is what it really offers, best first. Time on ``leases`` is ``clock``'s.
    """

    servicer: TransferServicer
    puller: NegotiatingPuller
    leases: LeaseTable
    backends: tuple[TransferBackend, ...]
    clock: Clock
    _nixl: NixlAgent | None
    _sweeper: asyncio.Task[None]

    def grant(self, block_ids: Sequence[int], owner_key: str, *, duration_s: float) -> str:
        """Lease blocks from now on; returns the lease's id. ``on_end(owner_key)`` is called when it is released or
        expires, once. Raises LeaseTableFull."""
        return self.leases.grant(block_ids, owner_key, now_s=self.clock.now_s(), duration_s=duration_s)

    def revoke(self, owner_key: str) -> int:
        """End an owner's leases now, without ``on_end``; returns how many there were. Pulls of its blocks that are
        not confirmed yet never will be, so the blocks may be freed."""
        return len(self.leases.revoke(owner_key))

    async def close(self) -> None:
        """Stop sweeping, disconnect and deregister the memory. Stop the gRPC server before."""
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        await self.puller.close()
        if self._nixl is not None:
            await self._nixl.close()


async def open_transfer(
    memory: BlockMemory,
    *,
    instance_id: str,
    incarnation: str,
    channel_for: Callable[[str], grpc.aio.Channel],
    on_end: Callable[[str], None],
    backends: Sequence[TransferBackend] = PREFERENCE,
    clock: Clock | None = None,
    max_leases: int = 4096,
) -> KvTransfer:
    """Open both ends over ``memory``. ``on_end`` is called on the event loop with the owner key of each lease that
    was released or has expired. A backend of ``backends`` that this machine doesn't have is left out.

    Raises ValueError when none is left.
    """
    clock = clock or WallClock()
    offered, nixl = list(dict.fromkeys(backends)), None
    if TransferBackend.NIXL in offered:
        nixl = await _open_nixl(memory, f"{instance_id}/{incarnation}")
        if nixl is None:
            offered.remove(TransferBackend.NIXL)
    if not offered:
        raise ValueError("no transfer backend is left; add the stream backend, or install nixl-cu12")
    leases = LeaseTable(new_id=secrets.token_hex, max_leases=max_leases)
    servicer = TransferServicer(
        memory, leases, incarnation=incarnation, backends=offered, nixl=nixl, on_end=on_end, clock=clock
    )
    puller = NegotiatingPuller(memory, instance_id=instance_id, backends=offered, nixl=nixl, channel_for=channel_for)
    sweeper = asyncio.create_task(_sweep(leases, clock, on_end), name="sweep leases")
    return KvTransfer(servicer, puller, leases, tuple(offered), clock, nixl, sweeper)


async def _open_nixl(memory: BlockMemory, name: str) -> NixlAgent | None:
    api = await asyncio.to_thread(load_nixl)
    if api is None:
        log.info("NIXL is not installed: KV goes by stream only")
        return None
    try:
        return await NixlAgent.open(api, memory, name)
    except NixlError as error:
        log.warning("KV goes by stream only: %s", error)
        return None


async def _sweep(leases: LeaseTable, clock: Clock, on_end: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        for _, owner_key in leases.expire(clock.now_s()):
            try:
                on_end(owner_key)
            except Exception:
                # One owner's bug must not keep the blocks of all others.
                log.exception("freeing the blocks of an expired lease failed")

"""Moving KV blocks between instances: the side that needs KV pulls described, leased blocks.

This file is the port. ``stream`` (chunked gRPC) and ``nixl`` move bytes; ``negotiate`` chooses between them and is the
``Puller``; ``servicer`` is the holder's end; ``lease`` says which blocks others may read, until when; ``ends`` holds
both ends of an instance. Knows nothing of sequences, models or torch: memory is a ``BlockMemory``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starmesh.types import DeviceRange as DeviceRange
from starmesh.types import KvLayout, KvTicket, TransferBackend


class TransferError(Exception):
    """KV could not be pulled; what was written to the target blocks is not to be used."""


class LeaseLost(TransferError):
    """The lease ended before the pull was confirmed."""


class LayoutMismatch(TransferError):
    """The two ends lay out KV differently; ``field`` names the first difference."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"KV layouts differ in {field}: {ours!r} here, {theirs!r} there")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class BlockMemory(Protocol):
    """The KV pool's bytes. Reads and writes touch only the named blocks and may run on any thread."""

    layout: KvLayout

    @property
    def device_range(self) -> DeviceRange:
        """Where the whole block-major pool lies."""
        ...

    def read_block(self, block_id: int) -> bytes | memoryview:
        """The bytes of a block (a view where the pool is host memory)."""
        ...

    def write_block(self, block_id: int, offset: int, data: bytes | memoryview) -> None:
        """Overwrite part of a block, from ``offset`` bytes on. Raises ValueError past its end."""
        ...


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull moved, how and how long it took."""

    backend: TransferBackend
    bytes: int
    duration_s: float


class Puller(Protocol):
    """Pulls blocks into local memory."""

    async def pull(
        self, ticket: KvTicket, block_ids: Sequence[int], local_block_ids: Sequence[int], *, timeout_s: float
    ) -> PullResult:
        """Copy remote ``block_ids`` (all under ``ticket``'s lease) into ``local_block_ids``, one to one.

        Raises LeaseLost, LayoutMismatch or another TransferError. The lease goes on; the caller ends it with
        ``release``.
        """
        ...

    async def release(self, ticket: KvTicket, *, timeout_s: float) -> None:
        """End the lease. Raises LeaseLost when it had ended before: then discard what was pulled."""
        ...

    async def close(self) -> None:
        """Close connections and deregister memory."""
        ...

"""The source of a migration that computes nothing: whoever takes blocks from it has all other cores to itself.

Owns blocks in this process and the first half of the protocol: it reserves, has one copy round pulled, and aborts.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from benchmarks.migration.processes import Member
from services.decode.target_calls import TargetCalls, Verdict
from starmesh.migration.source_effects import Copy
from starmesh.migration.terms import Cause, Limits, Terms
from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.transfer.ends import KvTransfer, open_transfer
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import KvLayout, KvTicket, MigrationReason
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, transfer_pb2_grpc

NAME = "idle-source"
LEASE_S = 60.0


class IdleSource:
    """``blocks`` blocks to be pulled; made by ``open_idle_source``."""

    def __init__(self, layout: KvLayout, blocks: int, transfer: KvTransfer, address: str) -> None:
        self._layout = layout
        self._block_ids = tuple(range(blocks))
        self._transfer = transfer
        self._address = address
        self._numbers = itertools.count()

    async def copy(self, target: Member, target_address: str) -> tuple[float, float]:
        """Have ``target`` pull all blocks. Returns when it was asked and when they were there, on
        ``time.perf_counter``. Raises RuntimeError when it does not."""
        name = f"{NAME}-{next(self._numbers)}"
        terms = Terms(
            reservation_id=secrets.token_hex(16),
            request_id=name,
            epoch=1,
            source_id=NAME,
            target_id=target.name,
            reason=MigrationReason.OPERATOR,
        )
        calls = TargetCalls(target_address, terms, Limits())
        tokens = len(self._block_ids) * self._layout.block_tokens
        try:
            answer = await calls.reserve(
                len(self._block_ids) + 1,
                max_tokens=tokens + 1,
                layout=self._layout,
                source_address=self._address,
                request_traceparent="",
                traceparent="",
            )
            lease_id = self._transfer.grant(self._block_ids, name, duration_s=LEASE_S)
            ticket = KvTicket(lease_id, NAME, self._address, self._layout, self._block_ids, tokens, LEASE_S)
            start_s = time.perf_counter()
            verdict, _ = await calls.copy(Copy(1, 0, self._block_ids), ticket)
            end_s = time.perf_counter()
        finally:
            self._transfer.revoke(name)
            await calls.close(Cause.CANCELLED)
        if verdict is not Verdict.DONE:
            raise RuntimeError(f"{target.name} did not pull: {answer}, {verdict.name}")
        return start_s, end_s


@asynccontextmanager
async def open_idle_source(target_address: str, tokens: int) -> AsyncIterator[IdleSource]:
    """A source of ``tokens`` tokens' blocks, laid out as those of the instance at ``target_address``."""
    async with open_channel(target_address) as channel:
        stub = cluster_pb2_grpc.InstanceServiceStub(channel)
        found = await stub.GetInstance(cluster_pb2.GetInstanceRequest(), timeout=30)
    layout = convert.layout(found.instance.layout)
    blocks = tokens // layout.block_tokens
    memory = HostMemory(layout, blocks)
    memory.blocks[:] = 1  # written once, as a sequence's blocks are: untouched memory is read for nothing
    transfer = await open_transfer(
        memory,
        instance_id=NAME,
        incarnation=secrets.token_hex(8),
        channel_for=grpc.aio.insecure_channel,
        on_end=lambda owner_key: None,
    )
    server = grpc.aio.server()
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield IdleSource(layout, blocks, transfer, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)
        await transfer.close()

"""NIXL when the peer dies, hangs or is not what it was; and the stream behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import numpy as np
import pytest

from starmesh.transfer import TransferError
from starmesh.transfer.host_memory import HostMemory
from starmesh.transfer.nixl import NixlAgent, NixlError, load_nixl
from starmesh.transfer.wire import layout_to_pb
from starmesh.types import KvLayout, TransferBackend
from starmesh.v1 import sequence_pb2, transfer_pb2, transfer_pb2_grpc
from tests.transfer.conftest import BACKENDS, HolderProcess, Instance, holder_process, running_instance

LAYOUT = KvLayout("test", "float32", layers=30, kv_heads=3, head_dim=64, block_tokens=16)
BLOCKS = 64

STREAM, NIXL = TransferBackend.STREAM, TransferBackend.NIXL
needs_nixl = pytest.mark.skipif(load_nixl() is None, reason="no wheel of NIXL is installed")


async def pull_all(target: Instance, holder: HolderProcess, *, timeout_s: float = 30.0) -> Any:
    ticket = holder.ticket
    return await target.transfer.puller.pull(ticket, ticket.block_ids, ticket.block_ids, timeout_s=timeout_s)


def target_instance(backends: Sequence[TransferBackend]) -> Any:
    return running_instance(backends, memory=HostMemory(LAYOUT, BLOCKS), instance_id="target")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transport", ["default", "tcp"])
async def test_a_holder_killed_in_mid_pull_ends_the_pull_with_an_error(
    backend: TransferBackend, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "tcp":
        # Between hosts without RDMA; the default between two processes of a host reads the other's memory directly.
        monkeypatch.setenv("UCX_TLS", "tcp,self")
    async with target_instance([backend]) as target, holder_process([backend], layout=LAYOUT, blocks=BLOCKS) as holder:
        assert (await pull_all(target, holder)).backend is backend
        assert np.array_equal(target.memory.blocks, holder.memory.blocks)
        target.memory.blocks[:] = 0
        pull = asyncio.create_task(pull_all(target, holder))
        async with asyncio.timeout(20):
            while not target.memory.blocks[:, 0].any() and not pull.done():
                await asyncio.sleep(0)
        holder.signal(signal.SIGKILL)
        if not pull.done():
            with contextlib.suppress(TransferError):
                await asyncio.wait_for(pull, 20)
        with pytest.raises(TransferError):
            await asyncio.wait_for(pull_all(target, holder), 20)
        with pytest.raises(TransferError):
            await target.transfer.puller.release(holder.ticket, timeout_s=5)


@needs_nixl
async def test_the_stream_takes_over_when_nixl_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        target_instance([NIXL, STREAM]) as target,
        holder_process([NIXL, STREAM], layout=LAYOUT, blocks=BLOCKS) as holder,
    ):
        assert (await pull_all(target, holder)).backend is NIXL
        target.memory.blocks[:] = 0

        async def broken(*args: Any, **kwargs: Any) -> None:
            raise NixlError("the test broke it")

        with monkeypatch.context() as patch:
            patch.setattr(NixlAgent, "read", broken)
            with caplog.at_level(logging.WARNING, "starmesh.transfer.negotiate"):
                assert (await pull_all(target, holder)).backend is STREAM
        assert np.array_equal(target.memory.blocks, holder.memory.blocks)
        assert "pulling from holder by stream: the test broke it" in caplog.text
        # NIXL with this holder rests for a while, then gets another chance.
        assert (await pull_all(target, holder)).backend is STREAM
        for key, terms in target.transfer.puller._terms.items():
            target.transfer.puller._terms[key] = replace(terms, ends_at_s=0.0)
        assert (await pull_all(target, holder)).backend is NIXL


@needs_nixl
async def test_a_holder_that_was_replaced_is_negotiated_with_again() -> None:
    async with target_instance([NIXL, STREAM]) as target:
        for pattern in (1, 2):
            memory = HostMemory(LAYOUT, BLOCKS)
            memory.blocks[:] = pattern
            async with running_instance([NIXL, STREAM], memory=memory) as holder:
                ticket = holder.ticket(range(BLOCKS))
                terms = target.transfer.puller._terms
                if pattern == 2:
                    # As if the new process listened where the old one did.
                    ((_, old),) = terms.items()
                    terms.clear()
                    terms[ticket.address, ticket.instance_id] = old
                result = await target.transfer.puller.pull(ticket, range(BLOCKS), range(BLOCKS), timeout_s=30)
                assert result.backend is NIXL
                assert (target.memory.blocks == pattern).all()


@needs_nixl
async def test_one_backend_in_common_is_enough() -> None:
    async with (
        target_instance([NIXL, STREAM]) as target,
        holder_process([STREAM], layout=LAYOUT, blocks=BLOCKS) as holder,
    ):
        assert (await pull_all(target, holder)).backend is STREAM


@needs_nixl
async def test_a_connection_that_hangs_costs_a_pull_little_and_the_next_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A firewall that drops what NIXL sends makes it try for minutes: pulls go by stream meanwhile."""
    api = load_nixl()
    assert api is not None
    let_through = threading.Event()

    class Hanging(api.nixlAgent):  # type: ignore[name-defined,misc]
        def loadRemoteMD(self, metadata: bytes) -> object:  # noqa: N802 - NIXL's name
            assert let_through.wait(60)
            return super().loadRemoteMD(metadata)

    monkeypatch.setattr(
        "starmesh.transfer.ends.load_nixl", lambda: SimpleNamespace(**vars(api) | {"nixlAgent": Hanging})
    )
    monkeypatch.setattr("starmesh.transfer.nixl.CONNECT_TIMEOUT_S", 0.1)
    async with (
        target_instance([NIXL, STREAM]) as target,
        holder_process([NIXL, STREAM], layout=LAYOUT, blocks=BLOCKS) as holder,
        holder_process([NIXL, STREAM], layout=LAYOUT, blocks=BLOCKS) as other,
    ):
        try:
            assert (await pull_all(target, holder)).backend is STREAM
            assert (await pull_all(target, other)).backend is STREAM
        finally:
            let_through.set()
        monkeypatch.setattr("starmesh.transfer.nixl.CONNECT_TIMEOUT_S", 30.0)
        target.transfer.puller._terms.clear()  # as if the time by stream were over
        assert (await pull_all(target, holder)).backend is NIXL


@needs_nixl
@pytest.mark.parametrize("cancel", [False, True])
async def test_nothing_lands_after_a_read_from_a_hung_holder_is_over(
    monkeypatch: pytest.MonkeyPatch, cancel: bool
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    memory = HostMemory(LAYOUT, BLOCKS)
    api = load_nixl()
    assert api is not None
    agent = await NixlAgent.open(api, memory, f"target-{cancel}")
    async with contextlib.AsyncExitStack() as stack:
        holder = await stack.enter_async_context(holder_process([NIXL], layout=LAYOUT, blocks=BLOCKS))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(holder.ticket.address))
        stub = transfer_pb2_grpc.TransferServiceStub(channel)
        request = transfer_pb2.NegotiateRequest(
            instance_id="target", layout=layout_to_pb(LAYOUT), backends=[sequence_pb2.TRANSFER_BACKEND_NIXL]
        )
        peer = (await stub.Negotiate(request, timeout=10)).nixl
        await agent.read(peer, range(BLOCKS), range(BLOCKS), timeout_s=20)
        assert np.array_equal(memory.blocks, holder.memory.blocks)
        memory.blocks[:] = 0
        before = agent.endpoint().agent
        holder.signal(signal.SIGSTOP)
        read = asyncio.create_task(agent.read(peer, range(BLOCKS), range(BLOCKS), timeout_s=60 if cancel else 0.5))
        if cancel:
            await asyncio.sleep(0.1)
            read.cancel()
        with pytest.raises(asyncio.CancelledError if cancel else NixlError):
            await asyncio.wait_for(read, 20)
        assert agent.endpoint().agent != before
        after = memory.blocks.copy()
        holder.signal(signal.SIGCONT)
        # The holder runs again and answers (UCX may have made it abort, which is as good here).
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.RenewLease(transfer_pb2.RenewLeaseRequest(lease_id=holder.ticket.lease_id), timeout=5)
        await asyncio.sleep(0.3)
        assert np.array_equal(memory.blocks, after)
    # The new agent works.
    async with running_instance([NIXL], layout=LAYOUT, total_blocks=BLOCKS) as other:
        assert other.transfer._nixl is not None
        await agent.read(other.transfer._nixl.endpoint(), range(BLOCKS), range(BLOCKS), timeout_s=20)
        assert np.array_equal(memory.blocks, other.memory.blocks)
    await agent.close()


def _runnable_ns() -> dict[str, int]:
    """For each thread of this process, how long it has run or waited to run."""
    return {
        task.name: sum(int(value) for value in (task / "schedstat").read_text().split()[:2])
        for task in Path("/proc/self/task").iterdir()
    }


@needs_nixl
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's scheduler statistics")
async def test_an_idle_agent_does_not_spin() -> None:
    async with running_instance([NIXL]):
        before = _runnable_ns()
        await asyncio.sleep(1.0)
        after = _runnable_ns()
    # A spinning thread is runnable all of the time, however busy the machine is.
    busiest_ns = max(after[thread] - before[thread] for thread in before.keys() & after.keys())
    assert busiest_ns < 0.5e9

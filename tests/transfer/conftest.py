"""Instances for transfer tests: in this process, or in one of their own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from starmesh.clock import VirtualClock
from starmesh.transfer.ends import KvTransfer, open_transfer
from starmesh.transfer.host_memory import HostMemory
from starmesh.transfer.nixl import load_nixl
from starmesh.types import KvLayout, KvTicket, TransferBackend
from starmesh.v1 import transfer_pb2_grpc
from tests.transfer.holder import known_memory

LAYOUT = KvLayout(model_revision="test", dtype="float32", layers=2, kv_heads=3, head_dim=8, block_tokens=16)

BACKENDS = [
    TransferBackend.STREAM,
    pytest.param(
        TransferBackend.NIXL, marks=pytest.mark.skipif(load_nixl() is None, reason="no wheel of NIXL is installed")
    ),
]


class Channels:
    """A channel per address; a test may close one to break what goes over it."""

    def __init__(self) -> None:
        self.open: dict[str, grpc.aio.Channel] = {}

    def __call__(self, address: str) -> grpc.aio.Channel:
        if address not in self.open:
            self.open[address] = grpc.aio.insecure_channel(
                address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
            )
        return self.open[address]

    async def close(self) -> None:
        for channel in self.open.values():
            await channel.close()


@dataclass
class Instance:
    """Both ends of an instance in this process, its leases on a clock that the test owns."""

    memory: HostMemory
    transfer: KvTransfer
    clock: VirtualClock
    address: str
    ended: list[str] = field(default_factory=list)

    def ticket(self, block_ids: Sequence[int], *, duration_s: float = 60.0) -> KvTicket:
        lease_id = self.transfer.grant(block_ids, "owner", duration_s=duration_s)
        return KvTicket(
            lease_id=lease_id,
            instance_id="holder",
            address=self.address,
            layout=self.memory.layout,
            block_ids=tuple(block_ids),
            resident_tokens=len(block_ids) * self.memory.layout.block_tokens,
            lease_duration_s=duration_s,
        )


@asynccontextmanager
async def running_instance(
    backends: Sequence[TransferBackend],
    *,
    layout: KvLayout = LAYOUT,
    memory: HostMemory | None = None,
    total_blocks: int = 64,
    instance_id: str = "holder",
    wrap: Callable[[object], object] = lambda servicer: servicer,
) -> AsyncIterator[Instance]:
    """``wrap`` may put a faulty servicer in front of the real one."""
    memory = memory or known_memory(layout, total_blocks)
    clock, channels, ended = VirtualClock(), Channels(), []
    transfer = await open_transfer(
        memory,
        instance_id=instance_id,
        incarnation=f"{instance_id}-{id(memory)}",
        channel_for=channels,
        on_end=ended.append,
        backends=backends,
        clock=clock,
    )
    assert transfer.backends == tuple(backends)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(wrap(transfer.servicer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Instance(memory, transfer, clock, f"127.0.0.1:{port}", ended)
    finally:
        await channels.close()
        await server.stop(0)
        await transfer.close()


class HolderProcess:
    """``holder.py`` under test control."""

    def __init__(
        self, process: asyncio.subprocess.Process, layout: KvLayout, blocks: int, line: dict[str, str]
    ) -> None:
        self.process = process
        self.memory = known_memory(layout, blocks)
        self.ticket = KvTicket(
            lease_id=line["lease_id"],
            instance_id="holder",
            address=line["address"],
            layout=layout,
            block_ids=tuple(range(blocks)),
            resident_tokens=blocks * layout.block_tokens,
            lease_duration_s=60.0,
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def holder_process(
    backends: Sequence[TransferBackend], *, layout: KvLayout, blocks: int
) -> AsyncIterator[HolderProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.transfer.holder",
        f"--layout={json.dumps(asdict(layout))}",
        f"--blocks={blocks}",
        f"--backends={','.join(backend.value for backend in backends)}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        line = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        yield HolderProcess(process, layout, blocks, line)
    finally:
        if process.returncode is None:
            process.kill()
        # Closes the pipes as well.
        await process.communicate()

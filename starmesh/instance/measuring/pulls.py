"""Times pulls of KV between two processes of this machine, by the transfer that instances use.

Both pools are host memory, also where the engine's is an accelerator's, and nothing leaves the machine: a network
between two machines has to be put into the profile by hand. Run as a module it is the process that holds the KV.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import grpc.aio

from starmesh.instance.measuring import MeasuringFailed
from starmesh.transfer import TransferError
from starmesh.transfer.ends import KvTransfer, open_transfer
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import KvLayout, KvTicket, TransferBackend
from starmesh.v1 import transfer_pb2_grpc

TARGET_BYTES = 48 << 20
"""The larger of the two pulls, if so few blocks are that large."""

MAX_BLOCKS = 1024

ROUNDS = 8
TIMEOUT_S = 60.0
_LEASE_S = 120.0


@dataclass(frozen=True, slots=True)
class MeasuredPulls:
    """A pull and its release take ``setup_s`` and then ``bytes_per_s``; a message there takes ``message_s``."""

    backend: TransferBackend
    size_bytes: int
    setup_s: float
    bytes_per_s: float
    message_s: float


async def measure_pulls(layout: KvLayout, *, rounds: int = ROUNDS) -> MeasuredPulls:
    """Pull one block and some ``TARGET_BYTES`` of them in turn. Raises MeasuringFailed."""
    blocks = min(max(2, TARGET_BYTES // layout.block_bytes), MAX_BLOCKS)
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "starmesh.instance.measuring.pulls", json.dumps(asdict(layout)), str(blocks),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        return await _measure(layout, blocks, rounds, _Holder(holder))
    except (TransferError, TimeoutError, OSError) as error:
        raise MeasuringFailed(f"pulling KV from another process failed: {error or 'no answer'}") from error
    finally:
        if holder.returncode is None:
            holder.kill()
        await holder.communicate()


class _Holder:
    """The other process: answers each line with one of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, line: str = "") -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            self._process.stdin.write(f"{line}\n".encode())
        answer = await asyncio.wait_for(self._process.stdout.readline(), TIMEOUT_S)
        if not answer:
            raise OSError("it has ended")
        return answer.decode().strip()


async def _measure(layout: KvLayout, blocks: int, rounds: int, holder: _Holder) -> MeasuredPulls:
    address = await holder.ask()
    memory = _filled(layout, blocks)
    channel = grpc.aio.insecure_channel(address)
    transfer = await _open(memory, "puller", channel)
    pulls: dict[int, list[float]] = {1: [], blocks: []}
    messages = []
    try:
        for index in range(rounds + 1):
            for count, times in pulls.items():
                lease_id = await holder.ask("lease")
                ids = tuple(range(count))
                ticket = KvTicket(lease_id, "holder", address, layout, ids, count * layout.block_tokens, _LEASE_S)
                started = time.perf_counter()
                result = await transfer.puller.pull(ticket, ids, ids, timeout_s=TIMEOUT_S)
                pulled = time.perf_counter()
                await transfer.puller.release(ticket, timeout_s=TIMEOUT_S)
                ended = time.perf_counter()
                if index > 0:  # the first connects
                    times.append(ended - started)
                    messages.append((ended - pulled) / 2)
    finally:
        await transfer.close()
        await channel.close()
    short_s, long_s = statistics.median(pulls[1]), statistics.median(pulls[blocks])
    # Noise can make the short one the longer; then all is bandwidth.
    block_s = (long_s - short_s) / (blocks - 1) if long_s > short_s else long_s / blocks
    return MeasuredPulls(
        backend=result.backend,
        size_bytes=blocks * layout.block_bytes,
        setup_s=max(0.0, short_s - block_s),
        bytes_per_s=layout.block_bytes / block_s,
        message_s=statistics.median(messages),
    )


async def _open(memory: HostMemory, name: str, channel: grpc.aio.Channel | None = None) -> KvTransfer:
    def channel_for(address: str) -> grpc.aio.Channel:
        return channel or grpc.aio.insecure_channel(address)

    return await open_transfer(
        memory,
        instance_id=name,
        incarnation=str(os.getpid()),
        channel_for=channel_for,
        on_end=lambda owner_key: None,
    )


def _filled(layout: KvLayout, blocks: int) -> HostMemory:
    """Memory whose pages are its own: untouched ones would all be the system's one page of zeros."""
    memory = HostMemory(layout, blocks)
    memory.blocks.fill(1)
    return memory


async def _hold(layout: KvLayout, blocks: int) -> None:
    transfer = await _open(_filled(layout, blocks), "holder")
    server = grpc.aio.server()
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(transfer.grant(range(blocks), "measuring", duration_s=_LEASE_S) + "\n")
        sys.stdout.flush()
    await server.stop(0)
    await transfer.close()


if __name__ == "__main__":
    asyncio.run(_hold(KvLayout(**json.loads(sys.argv[1])), int(sys.argv[2])))

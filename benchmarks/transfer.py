"""How long 1,024 tokens of KV take from one process to another: `python -m benchmarks.transfer [--quick]`.

Two processes, SmolLM2-135M's layout in float32 (47.2 MB in 64 blocks). Each round pulls and releases once by every
backend, over negotiated and warm connections, and copies the same bytes within the process beside it; so all share
whatever else the machine does. A pull's time is from the call of ``pull`` to the confirmed release.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
import numpy as np

from benchmarks import machine
from starmesh.transfer.ends import KvTransfer, available_backends, open_transfer
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import KvLayout, KvTicket, TransferBackend
from starmesh.v1 import transfer_pb2_grpc

LAYOUT = KvLayout("benchmark", "float32", layers=30, kv_heads=3, head_dim=64, block_tokens=16)
BLOCKS = 1024 // LAYOUT.block_tokens
PULLED_BYTES = BLOCKS * LAYOUT.block_bytes


async def open_end(
    memory: HostMemory,
    name: str,
    backends: Sequence[TransferBackend],
    channel_for: Callable[[str], grpc.aio.Channel] = grpc.aio.insecure_channel,
) -> KvTransfer:
    return await open_transfer(
        memory,
        instance_id=name,
        incarnation=str(os.getpid()),
        channel_for=channel_for,
        on_end=lambda owner_key: None,
        backends=backends,
    )


async def serve() -> None:
    """The holder: answers each line on stdin with a fresh lease's id."""
    memory = HostMemory(LAYOUT, BLOCKS)
    memory.blocks[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None] + 1
    transfer = await open_end(memory, "holder", available_backends())
    server = grpc.aio.server()
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(transfer.grant(range(BLOCKS), "benchmark", duration_s=60.0), flush=True)
    await server.stop(0)
    await transfer.close()


async def measure(rounds: int) -> dict[str, Any]:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.transfer", "--serve",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    address = (await holder.stdout.readline()).decode().strip()
    memory = HostMemory(LAYOUT, BLOCKS)
    channel = grpc.aio.insecure_channel(address)
    ends = {
        backend: await open_end(memory, f"puller-{backend.value}", [backend], lambda _: channel)
        for backend in available_backends()
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*(backend.value for backend in ends), "memcpy"]}
    cpu_seconds: dict[str, list[float]] = {backend.value: [] for backend in ends}
    source, destination = np.ones(PULLED_BYTES, np.uint8), np.ones(PULLED_BYTES, np.uint8)
    expected = np.arange(BLOCKS, dtype=np.uint8) + 1
    for index in range(rounds + 2):
        for backend, end in ends.items():
            holder.stdin.write(b"lease\n")
            lease_id = (await holder.stdout.readline()).decode().strip()
            ticket = KvTicket(lease_id, "holder", address, LAYOUT, tuple(range(BLOCKS)), 1024, 60.0)
            memory.blocks[:] = 0
            started, cpu_started = time.perf_counter(), time.process_time()
            await end.puller.pull(ticket, range(BLOCKS), range(BLOCKS), timeout_s=60)
            await end.puller.release(ticket, timeout_s=5)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
            assert (memory.blocks == expected[:, None]).all()
            if index >= 2:  # the first rounds connect, and touch pages for the first time
                seconds[backend.value].append(elapsed)
                cpu_seconds[backend.value].append(cpu)
        started = time.perf_counter()
        np.copyto(destination, source)
        if index >= 2:
            seconds["memcpy"].append(time.perf_counter() - started)
    for end in ends.values():
        await end.close()
    await channel.close()
    holder.stdin.close()
    await holder.communicate()
    return summary(seconds, cpu_seconds)


def summary(seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the spread as [minimum, 10th, 90th percentile, maximum] in ms."""

    def spread_ms(values: list[float]) -> list[float]:
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return [round(1e3 * value, 2) for value in (min(values), deciles[0], deciles[-1], max(values))]

    median = {name: statistics.median(values) for name, values in seconds.items()}
    pulls = [name for name in seconds if name != "memcpy"]
    return {
        "benchmark": "transfer",
        "bytes": PULLED_BYTES,
        "rounds": len(seconds["memcpy"]),
        "pull_ms": {name: round(1e3 * median[name], 2) for name in pulls},
        "mb_per_s": {name: round(PULLED_BYTES / 1e6 / median[name]) for name in pulls},
        "memcpy_ms": round(1e3 * median["memcpy"], 2),
        "memcpy_mb_per_s": round(PULLED_BYTES / 1e6 / median["memcpy"]),
        "puller_cpu_ms": {name: round(1e3 * statistics.median(cpu_seconds[name]), 2) for name in pulls},
        "spread_ms": {name: spread_ms(values) for name, values in seconds.items()},
        "machine": machine.describe(),
        "commit": machine.commit("starmesh/transfer", "protos", "benchmarks/transfer.py"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 rounds instead of 60")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    result = asyncio.run(measure(10 if arguments.quick else 60))
    for name, pull_ms in result["pull_ms"].items():
        print(f"{name:8}{pull_ms:9.1f} ms{result['mb_per_s'][name]:8} MB/s   spread {result['spread_ms'][name]} ms")
    print(f"{'memcpy':8}{result['memcpy_ms']:9.1f} ms{result['memcpy_mb_per_s']:8} MB/s   within one process")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

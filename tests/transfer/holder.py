"""A holder in a process of its own: serves a pool of known bytes, for tests that need two processes or a kill.

Prints its address and one ticket's lease id as a JSON line, then serves until its stdin ends or it is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

import grpc.aio
import numpy as np

from starmesh.transfer.ends import open_transfer
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import KvLayout, TransferBackend
from starmesh.v1 import transfer_pb2_grpc


def known_memory(layout: KvLayout, total_blocks: int) -> HostMemory:
    """A pool whose bytes follow from its shape, no two blocks alike."""
    memory = HostMemory(layout, total_blocks)
    row = np.random.default_rng(0).integers(0, 256, layout.block_bytes, np.uint8)
    np.bitwise_xor(row, np.arange(total_blocks, dtype=np.uint8)[:, None], out=memory.blocks)
    return memory


async def serve(arguments: argparse.Namespace) -> None:
    memory = known_memory(KvLayout(**json.loads(arguments.layout)), arguments.blocks)
    channels: dict[str, grpc.aio.Channel] = {}
    transfer = await open_transfer(
        memory,
        instance_id="holder",
        incarnation=arguments.incarnation,
        channel_for=channels.__getitem__,
        on_end=lambda owner_key: print(json.dumps({"ended": owner_key}), flush=True),
        backends=[TransferBackend(name) for name in arguments.backends.split(",")],
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    transfer_pb2_grpc.add_TransferServiceServicer_to_server(transfer.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    lease_id = transfer.grant(range(arguments.blocks), "the pool", duration_s=60.0)
    print(json.dumps({"address": f"127.0.0.1:{port}", "lease_id": lease_id}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    await transfer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--backends", required=True)
    parser.add_argument("--incarnation", default="holder-1")
    asyncio.run(serve(parser.parse_args()))

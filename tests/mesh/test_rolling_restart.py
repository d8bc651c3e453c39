"""Every service of a cluster is replaced, one at a time, as a rolling update does it: SIGTERM, drain, exit 0, a new
process under the same name, SERVING, next. Sixteen clients ask all the time; no stream fails, no token is missing.

Half of the clients are Python clients that know both routers and go on at the other one when theirs leaves. The others
are plain gRPC clients behind what stands for a balancer: it sends no new stream to a router that is about to leave, and
streams that run there end within its grace.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from starmesh.client import Client
from starmesh.emulation.requests import emulated_request
from starmesh.rpc.channels import open_channel
from starmesh.v1 import inference_pb2, inference_pb2_grpc
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import generate
from tests.mesh.test_emulated import expected_token_ids

CLIENTS = 16
# Steps of 24 ms: sixteen streams take a fifth of a core then, beside which a dozen processes start. On a busy machine
# reports may come late, and nobody dies here: hence the long lease.
EMULATED = (
    *("--engine", "emulated", "--profile", "h100-7b", "--kv-tokens", "40000", "--speed", "0.25"),
    *("--lease-ttl-s", "30"),
)
INSTANCE = (*EMULATED, "--transfer", "stream")
FLAGS = {
    "prefill": INSTANCE,
    "decode": INSTANCE,
    "predictor": (*EMULATED, "--predictor", "oracle"),
    "rescheduler": (*EMULATED, "--round-interval-s", "0.5"),
    # On a busy machine a stream may take longer than the default grace of 10 s.
    "router": (*EMULATED, "--dispatch-policy", "predicted_load", "--grace-s", "60"),
}
SERVICES = (
    *(("prefill", f"prefill-{number}") for number in range(2)),
    *(("decode", f"decode-{number}") for number in range(3)),
    ("predictor", "predictor-0"),
    *(("rescheduler", f"rescheduler-{number}") for number in range(2)),
    *(("router", f"router-{number}") for number in range(2)),
)


@dataclass
class Traffic:
    """Clients that ask again as soon as they are answered, within the context. A stream that fails, or has other tokens
    than it must, fails the test at once."""

    mesh: Mesh
    answered: int = 0
    moved: int = 0
    recovered: int = 0
    leaving: str = ""
    """The router that the balancer sends nothing to."""
    _ended: bool = False
    _clients: list[asyncio.Task[None]] = field(default_factory=list)
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    async def __aenter__(self) -> Traffic:
        routers = [self.mesh.services[name].address for role, name in SERVICES if role == "router"]
        self._channels = {address: open_channel(address) for address in routers}
        self._client = Client(routers)
        ask = (self._ask_client, self._ask_balanced)
        self._clients = [asyncio.create_task(self._run(number, ask[number % 2])) for number in range(CLIENTS)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ended = True
        try:
            await asyncio.gather(*self._clients)
        finally:
            await self._client.close()
            for channel in self._channels.values():
                await channel.close()

    async def until_answered(self, more: int) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + more

        def enough() -> bool:
            for client in self._clients:
                if client.done():
                    client.result()
            return self.answered >= wanted

        await until(enough, "answers to clients", 180)

    async def _run(self, number: int, ask: object) -> None:
        draw = random.Random(number)
        turn = 0
        while not self._ended:
            prompt_tokens, output_tokens = draw.randint(1, 400), draw.randint(20, 150)
            message = emulated_request(prompt_tokens, output_tokens, request_id=f"client-{number}.{turn}")
            token_ids = await ask(message)  # type: ignore[operator]
            assert token_ids == expected_token_ids(prompt_tokens, output_tokens), message.request_id
            self.answered += 1
            turn += 1

    async def _ask_client(self, message: inference_pb2.GenerateRequest) -> list[int]:
        async with self._client.generate(message.token_ids.token_ids, request_id=message.request_id) as stream:
            answer = await stream.whole()
        if answer.usage is not None:
            self.moved += answer.usage.migrations
            self.recovered += answer.usage.recoveries
        return list(answer.token_ids)

    async def _ask_balanced(self, message: inference_pb2.GenerateRequest) -> list[int]:
        address = random.choice([address for address in self._channels if address != self.leaving])
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channels[address]
        )
        answer = await generate(stub, message)
        assert answer.usage is not None
        self.moved += answer.usage.migrations
        self.recovered += answer.usage.recoveries
        return answer.token_ids


@pytest.mark.timeout(900)
async def test_no_stream_fails(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path, forked=True) as mesh:
        await asyncio.gather(*(mesh.start(role, name, *FLAGS[role]) for role, name in SERVICES))
        for _, name in SERVICES:
            await serves(mesh, name)
        async with Traffic(mesh) as traffic:
            await traffic.until_answered(CLIENTS)
            for role, name in SERVICES:
                before = mesh.services[name]
                traffic.leaving = before.address if role == "router" else ""
                before.terminate()
                code = await asyncio.wait_for(before.process.wait(), 180)
                assert code == 0, f"{name} ended with {code}:\n{before.log.read_text()[-3000:]}"
                await mesh.start(role, name, *FLAGS[role], "--listen", before.address)
                await serves(mesh, name)
                traffic.leaving = ""
                await traffic.until_answered(CLIENTS // 2)
                print(f"{name} restarted; {traffic.answered} answers")
        print(f"{traffic.answered} answers, {traffic.moved} moves, {traffic.recovered} recoveries")
        assert traffic.moved, "instances that left had nothing to move"


async def serves(mesh: Mesh, name: str) -> None:
    """Wait until its health says SERVING."""
    async with open_channel(mesh.services[name].address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def serving() -> bool:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        await until(serving, f"{name} to serve", 180)

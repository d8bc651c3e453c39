"""``starmesh drain`` with an API key that may ask less often than it would."""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from rich.console import Console

from starmesh.cli import drain as command
from starmesh.cli.login import Login
from starmesh.cli.router import connect
from starmesh.cli.run import CliError
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.rpc.server import RpcServer
from starmesh.rpc.status import StatusError, retry_later
from starmesh.telemetry.metrics import open_metrics
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc
from tests.router.conftest import TIMEOUT_S, Mesh, SwitchableLedger
from tests.telemetry.pages import Seen, scrape

Answer = cluster_pb2.DrainResponse | StatusError
DRAINING, DRAINED = cluster_pb2.INSTANCE_STATE_DRAINING, cluster_pb2.INSTANCE_STATE_DRAINED


def draining(sequences: int) -> cluster_pb2.DrainResponse:
    return cluster_pb2.DrainResponse(state=DRAINING, remaining_sequences=sequences)


def too_many(delay_s: float) -> StatusError:
    return retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 1 requests/s with this API key", delay_s)


class ScriptedRouter(cluster_pb2_grpc.ClusterServiceServicer):
    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self.answers = deque(answers)

    async def Drain(self, request: Any, context: Any) -> cluster_pb2.DrainResponse:  # noqa: N802 - gRPC's name
        answer = self.answers.popleft()
        if isinstance(answer, StatusError):
            raise answer
        return answer


@asynccontextmanager
async def router_that_says(*answers: Answer) -> AsyncIterator[str]:
    """Its address. It has said all of it by the end."""
    servicer = ScriptedRouter(answers)
    server = RpcServer(listen="127.0.0.1:0")
    service = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, servicer, service)
    try:
        yield await server.start()
        assert not servicer.answers
    finally:
        await server.stop(0)


async def drain(address: str, output: io.StringIO, *, key: str = "", wait: bool = True, timeout_s: float = 60) -> None:
    async with connect(address, Login(api_key=key)) as router:
        await command.drain(router, "decode-0", Console(file=output, width=100), wait=wait, timeout_s=timeout_s)


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed, by a command that does not wait long between two looks."""
    monkeypatch.setattr(command, "_POLL_S", 0.01)
    return io.StringIO()


async def test_a_key_that_may_not_ask_so_often_is_given_its_time(output: io.StringIO) -> None:
    drained = cluster_pb2.DrainResponse(state=DRAINED)
    async with router_that_says(too_many(0.02), draining(2), too_many(0.01), too_many(0), draining(2), drained) as at:
        await drain(at, output)
    assert output.getvalue().splitlines() == [
        "decode-0 is draining, 2 sequences left",
        "decode-0 has drained; it may be stopped",
    ]


async def test_it_begins_also_where_nobody_waits_for_its_end(output: io.StringIO) -> None:
    async with router_that_says(too_many(0.01), draining(1)) as address:
        await drain(address, output, wait=False)
    assert output.getvalue() == "decode-0 is draining, 1 sequence left\n"


async def test_no_more_time_is_given_than_there_is(output: io.StringIO) -> None:
    async with router_that_says(too_many(1000)) as address:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await drain(address, output)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with router_that_says(draining(3), too_many(1000)) as address:
        with pytest.raises(CliError, match="decode-0 still has 3 sequences after 60 s; it goes on draining"):
            await drain(address, output)


@pytest.mark.parametrize(
    "failure",
    [
        retry_later(grpc.StatusCode.UNAVAILABLE, "decode-0 does not answer; try again", 0.01),
        StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "for ever"),
    ],
    ids=lambda failure: failure.code.name,
)
async def test_other_failures_end_it(output: io.StringIO, failure: StatusError) -> None:
    async with router_that_says(failure) as address:
        with pytest.raises(grpc.aio.AioRpcError, match=failure.message):
            await drain(address, output)


async def test_with_a_real_key(tmp_path: Path) -> None:
    """One request in two seconds, where the command looks twice a second."""
    secret = new_secret()
    key = ApiKey(key_id="slow", sha256=digest_of(secret), scopes=frozenset({Scope.OPERATE}), requests_per_s=0.5)
    write_keys(tmp_path / "keys", (key,))
    metrics, output = open_metrics("router", "r0", listen="127.0.0.1:0"), io.StringIO()

    async def refused_calls() -> float:
        seen = Seen()
        seen.add(await asyncio.to_thread(scrape, f"http://{metrics.address}/metrics"))
        return seen.total("starmesh_refused_calls_total", error_type="RESOURCE_EXHAUSTED")

    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, metrics.close)
        mesh = Mesh(stack, SwitchableLedger())
        await mesh.start(api_keys=tmp_path / "keys", metrics=metrics)
        async with asyncio.timeout(TIMEOUT_S):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(drain(mesh.process.address, output, key=secret))
                while not await refused_calls():
                    await asyncio.sleep(0.02)
                membership = mesh.decodes[0].membership
                assert membership is not None
                await membership.stop()
    assert output.getvalue().splitlines() == ["decode-0 is draining, 0 sequences left", "decode-0 has gone"]

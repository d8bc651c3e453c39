"""The container's health check against real servers: one that serves, one that does not, none, and one that hangs."""

from __future__ import annotations

import asyncio
import socket

import pytest

from starmesh.rpc.probe import main
from starmesh.rpc.server import RpcServer


async def probe(address: str, *options: str) -> int:
    # In a thread: the servers run on this event loop.
    return await asyncio.to_thread(main, [address, *options])


async def test_a_service_is_healthy_while_it_serves(capsys: pytest.CaptureFixture[str]) -> None:
    server = RpcServer(listen="127.0.0.1:0")
    address = await server.start()
    try:
        assert await probe(address) == 1
        await server.set_serving(True)
        assert await probe(address) == 0
        await server.set_serving(False)
        assert await probe(address) == 1
    finally:
        await server.stop(0)
    said = [f"{address}: {status}" for status in ("NOT_SERVING", "SERVING", "NOT_SERVING")]
    assert capsys.readouterr().out.splitlines() == said


async def test_nobody_there_is_unhealthy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:  # bound, not listening: connecting is refused
        unused.bind(("127.0.0.1", 0))
        assert await probe(f"127.0.0.1:{unused.getsockname()[1]}") == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


async def test_a_process_that_hangs_is_unhealthy_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects, nobody ever answers
        assert await probe(f"127.0.0.1:{silent.getsockname()[1]}", "--timeout-s", "0.3") == 1
    assert capsys.readouterr().out

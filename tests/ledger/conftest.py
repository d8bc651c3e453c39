"""A real server for the whole run, and a cluster of its own for each test."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer

WAIT_S = 20.0
# Ample: nothing here measures time, and the machine may be busy.
TIMEOUT_S = 10.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition outside this process."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    running = asyncio.run(EmbeddedServer.start())
    yield running
    asyncio.run(running.stop())


@pytest.fixture
def cluster() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
async def redis_ledger(server: EmbeddedServer, cluster: str) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger.connect(server.url, cluster=cluster, timeout_s=TIMEOUT_S)
    yield ledger
    await ledger.close()

"""The router with a real ledger, which dies under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer
from starmesh.types import Ownership
from tests.router.conftest import TIMEOUT_S, Mesh, check_answer, until


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with await EmbeddedServer.start() as running:
        yield running


async def test_a_real_ledger_and_its_death(server: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        ledger = RedisLedger.connect(server.url, cluster="router", timeout_s=TIMEOUT_S)
        stack.push_async_callback(ledger.close)
        mesh = Mesh(stack, ledger)
        await mesh.start(decodes=2)

        async def one(number: int) -> None:
            text = f"prompt {number}"
            check_answer([message async for message in mesh.generate(text)], text, 20)

        await asyncio.gather(*(one(number) for number in range(16)))
        for decode in mesh.decodes:
            decode.pause_after = 5
        held = asyncio.create_task(_collect(mesh, "held"))
        await until(lambda: any(decode.sequences for decode in mesh.decodes))
        owner = await ledger.owner("held")
        holder = next(decode for decode in mesh.decodes if decode.sequences)
        assert owner == Ownership(holder.instance_id, 1)
        view = await ledger.view()
        assert {item.request_id for at in view.instances for item in at.reservations} <= {"held"}

        await server.stop()
        await until(lambda: not mesh.process.watch.available)
        for decode in mesh.decodes:
            decode.pause_after = None
        await asyncio.gather(*(one(number) for number in range(8)))
        await holder.kill()
        await held
        async with asyncio.timeout(TIMEOUT_S):
            await mesh.process.router.idle.wait()


async def _collect(mesh: Mesh, request_id: str) -> None:
    check_answer([message async for message in mesh.generate(request_id=request_id)], "hello", 20)

"""Clients of routers in this process, over connections that a test can break."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from services.router.config import RouterSettings
from services.router.serving import RouterProcess
from starmesh.client import Client, FinishReason, Piece, RetryPolicy
from tests.client.relay import Relay
from tests.router.conftest import TIMEOUT_S, Mesh, letters_model, mesh, text_of, tokens_after
from tests.router.peers import TTL_S

__all__ = ["Surroundings", "check_pieces", "mesh", "read", "surroundings"]

PATIENT = RetryPolicy(max_retries=40, first_delay_s=0.01, max_delay_s=0.1)


class Surroundings:
    """What a test makes beside the mesh; ends with it."""

    def __init__(self, mesh: Mesh, stack: AsyncExitStack) -> None:
        self._mesh = mesh
        self._stack = stack

    async def relay(self, target: str = "") -> Relay:
        """To the mesh's router unless told otherwise."""
        return await self._stack.enter_async_context(Relay(target or self._mesh.process.address))

    async def client(self, *addresses: str, **options: Any) -> Client:
        """Of the mesh's router unless told otherwise, with short delays."""
        defaults: dict[str, Any] = {"retries": PATIENT, "timeout_s": TIMEOUT_S}
        opened = Client(addresses or [self._mesh.process.address], **(defaults | options))
        return await self._stack.enter_async_context(opened)

    async def router(self, **settings: Any) -> RouterProcess:
        """Another one of the same mesh."""
        defaults: dict[str, Any] = {"view_interval_s": 0.02, "lease_ttl_s": TTL_S, "report_interval_s": 0.05}
        config = RouterSettings(
            _cli_parse_args=False, **(defaults | {"grace_s": 0.5, "instance_id": "another-router"} | settings)
        )
        process = await self._stack.enter_async_context(RouterProcess(config, self._mesh.ledger, letters_model()))
        await process.watch.ready.wait()
        return process


@pytest.fixture
async def surroundings(mesh: Mesh) -> AsyncIterator[Surroundings]:
    async with AsyncExitStack() as stack:
        yield Surroundings(mesh, stack)


async def read(stream: Any, tokens: int) -> list[Piece]:
    """The pieces up to that many tokens."""
    pieces: list[Piece] = []
    while sum(len(piece.token_ids) for piece in pieces) < tokens:
        pieces.append(await anext(stream))
    return pieces


def check_pieces(pieces: list[Piece], text: str, count: int) -> None:
    """Demand the tokens and text of an undisturbed run, each once and in order, and one end."""
    token_ids: list[int] = []
    for piece in pieces:
        assert piece.offset == len(token_ids)
        token_ids += piece.token_ids
    assert token_ids == tokens_after(text, count)
    assert "".join(piece.text for piece in pieces) == text_of(token_ids)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [FinishReason.LENGTH]
    assert pieces[-1].usage is not None
    assert (pieces[-1].usage.output_tokens, pieces[-1].usage.prompt_tokens) == (count, len(text))

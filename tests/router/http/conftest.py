"""A router in this process that serves HTTP too, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from tests.router.conftest import TIMEOUT_S, Mesh, SwitchableLedger, text_of, tokens_after

MODEL = "letters"


class HttpMesh(Mesh):
    """The mesh with clients of its front door, from ``start`` on."""

    client: openai.AsyncOpenAI
    http: httpx2.AsyncClient

    @property
    def url(self) -> str:
        return self.process.http_url

    @property
    def server(self) -> uvicorn.Server:
        """uvicorn's."""
        assert self.process._http is not None
        return self.process._http._server

    async def start(self, **settings: Any) -> None:
        await super().start(**({"http_listen": "127.0.0.1:0"} | settings))
        self.client = self.connect()
        self.http = await self._stack.enter_async_context(httpx2.AsyncClient(base_url=self.url, timeout=TIMEOUT_S))

    def connect(self, **options: Any) -> openai.AsyncOpenAI:
        """A client that tries once; all end with the test."""
        defaults: dict[str, Any] = {"api_key": "sm-none", "max_retries": 0, "timeout": TIMEOUT_S}
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", **(defaults | options))
        self._stack.push_async_callback(client.close)
        return client

    async def chat(self, text: str = "hello", *, tokens: int = 20, **fields: Any) -> Any:
        """A chat completion of one message."""
        messages: Any = [{"role": "user", "content": text}]
        return await self.client.chat.completions.create(
            **({"model": MODEL, "messages": messages, "max_tokens": tokens} | fields)
        )

    async def complete(self, text: str = "hello", *, tokens: int = 20, **fields: Any) -> Any:
        """A completion of one text."""
        return await self.client.completions.create(**({"model": MODEL, "prompt": text, "max_tokens": tokens} | fields))

    async def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx2.Response:
        """A request as it stands."""
        return await self.http.post(path, json=body)


@pytest.fixture
async def front() -> AsyncIterator[HttpMesh]:
    async with AsyncExitStack() as stack:
        yield HttpMesh(stack, SwitchableLedger())


def chat_prompt(text: str) -> str:
    """What the template of the tests' model makes of one message."""
    return f"user:{text};"


def answer_to(prompt: str, count: int) -> str:
    """What the peers say."""
    return text_of(tokens_after(prompt, count))

"""Bytes that are no request: refused, never a 500, never a traceback, and never the end of the server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.router.http.chat_request import ChatRequest
from services.router.http.completion_request import CompletionRequest
from tests.router.conftest import TIMEOUT_S, SwitchableLedger
from tests.router.http.conftest import HttpMesh

PATHS = ("/v1/chat/completions", "/v1/completions")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted(set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)))
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": st.text() | JSON})
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, max_size=3), "prompt": st.text() | JSON},
        optional={"max_tokens": st.integers(-2, 20) | JSON, "stream": st.booleans(), "stop": JSON, "seed": JSON},
    ).flatmap(
        lambda known: st.dictionaries(FIELDS, JSON, max_size=2).map(
            lambda odd: json.dumps({**odd, **known}).encode("utf-8", "surrogatepass")
        )
    ),
)
LINES = st.lists(st.binary(max_size=30) | st.sampled_from([b"host: 127.0.0.1", b"content-length: 3"]), max_size=5)


@pytest.fixture
def served() -> Iterator[tuple[asyncio.Runner, HttpMesh]]:
    """One mesh for all examples of a test, on a loop that they run on."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def begin() -> HttpMesh:
            front = HttpMesh(stack, SwitchableLedger())
            await front.start()
            return front

        front = runner.run(begin())
        yield runner, front
        runner.run(stack.aclose())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), content=BODIES)
def test_any_body(
    served: tuple[asyncio.Runner, HttpMesh], caplog: pytest.LogCaptureFixture, path: str, content: bytes
) -> None:
    runner, front = served

    async def post() -> Any:
        return await front.http.post(path, content=content, headers={"content-type": "application/json"})

    response = runner.run(post())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert _errors(caplog) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    first=st.sampled_from([b"POST /v1/completions HTTP/1.1", b"GET /healthz HTTP/1.1"]) | st.binary(max_size=40),
    lines=LINES,
    rest=st.binary(max_size=60),
)
def test_any_bytes(
    served: tuple[asyncio.Runner, HttpMesh],
    caplog: pytest.LogCaptureFixture,
    first: bytes,
    lines: list[bytes],
    rest: bytes,
) -> None:
    runner, front = served
    host, _, port = front.url.removeprefix("http://").rpartition(":")

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\r\n".join([first, *lines, b"", rest]))
        writer.write_eof()
        async with asyncio.timeout(TIMEOUT_S):
            try:
                answer = await reader.read(-1)
            except ConnectionError:
                answer = b""
        writer.close()
        return answer

    answer = runner.run(talk())
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert b"Traceback" not in answer
    assert _errors(caplog) == []


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    caplog.clear()
    return found

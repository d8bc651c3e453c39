"""What a client may do to the server: bodies, headers and connections beyond their bounds, and slow ones."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.router.http import body, connection
from services.router.http.body import MAX_BODY_BYTES, BodyReader
from services.router.http.fields import GenerationFields
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.v1 import inference_pb2
from tests.router.conftest import TIMEOUT_S, until
from tests.router.http.conftest import HttpMesh, answer_to, chat_prompt

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


async def connect(front: HttpMesh) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = front.url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def read_error(reader: asyncio.StreamReader, status: int) -> dict[str, Any]:
    """The error of the next response."""
    async with asyncio.timeout(TIMEOUT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        assert lines[0].startswith(f"http/1.1 {status} "), lines
        (length,) = [int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")]
        error: dict[str, Any] = json.loads(await reader.readexactly(length))["error"]
    return error


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait until the server has closed the connection."""
    async with asyncio.timeout(TIMEOUT_S):
        try:
            return await reader.read(1) == b""
        except ConnectionError:
            return True


async def test_a_body_that_says_it_is_too_long_is_not_read(front: HttpMesh) -> None:
    await front.start()
    reader, writer = await connect(front)
    writer.write(HEAD + f"content-length: {MAX_BODY_BYTES + 1}\r\nexpect: 100-continue\r\n\r\n".encode())
    assert (await read_error(reader, 413))["code"] == "body_too_large"
    writer.close()


async def test_a_body_that_turns_out_too_long_is_refused_while_it_comes(front: HttpMesh) -> None:
    await front.start()
    reader, writer = await connect(front)
    writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    refused = asyncio.create_task(read_error(reader, 413))
    sent = 0
    while not refused.done():
        assert sent <= MAX_BODY_BYTES + 32 * 2**20, "the server reads on and on"
        writer.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        sent += 0x100000
        await writer.drain()
        await asyncio.sleep(0)
    assert (await refused)["code"] == "body_too_large"
    writer.close()


async def test_a_long_prompt_within_the_bounds_is_read(front: HttpMesh) -> None:
    await front.start()
    front.http.timeout = 60.0  # a slow machine takes seconds to count its tokens
    response = await front.post("/v1/completions", prompt="\n" * (MAX_BODY_BYTES // 2 - 100))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_a_body_that_does_not_come_is_not_waited_for(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BodyReader.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(BodyReader.__init__.__kwdefaults__, "max_body_s", 0.1)
    await front.start()
    reader, writer = await connect(front)
    writer.write(HEAD + b"content-length: 10\r\n\r\n{")
    assert (await read_error(reader, 408))["code"] == "body_timeout"
    writer.close()


async def test_the_memory_for_bodies_is_bounded(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BodyReader.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(BodyReader.__init__.__kwdefaults__, "max_held_bytes", 1000)
    await front.start()
    readers: list[BodyReader] = []
    read = BodyReader.read

    async def noted(self: BodyReader, *arguments: Any) -> Any:
        readers.append(self)
        return await read(self, *arguments)

    monkeypatch.setattr(BodyReader, "read", noted)
    _, writer = await connect(front)
    writer.write(HEAD + b"content-length: 900\r\n\r\n" + b" " * 800)
    await until(lambda: readers and readers[0].held_bytes == 800)
    response = await front.post(messages=[{"role": "user", "content": "x" * 300}])
    assert response.status_code == 429
    assert "retry-after" in response.headers
    writer.close()
    await until(lambda: readers[0].held_bytes == 0)
    response = await front.post(messages=[{"role": "user", "content": "x" * 300}])
    assert response.status_code == 200


async def test_a_head_that_does_not_come_ends_the_connection(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.BoundedConnection, "head_s", 0.3)
    await front.start()
    silent, silent_writer = await connect(front)
    slow, slow_writer = await connect(front)
    slow_writer.write(HEAD)
    again, again_writer = await connect(front)
    again_writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    assert await again.readuntil(b'{"status":"serving"}')
    again_writer.write(b"GET /heal")
    for reader in (silent, slow, again):
        assert await is_closed(reader)
    for writer in (silent_writer, slow_writer, again_writer):
        writer.close()


async def test_an_answer_may_take_longer_than_a_head(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.BoundedConnection, "head_s", 0.05)
    await front.start()
    front.decodes[0].pause_after = 3
    stream = await front.chat(stream=True)
    await asyncio.sleep(0.1)
    front.decodes[0].resume()
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer_to(chat_prompt("hello"), 20)


async def test_long_headers_are_refused(front: HttpMesh) -> None:
    await front.start()
    reader, writer = await connect(front)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"x" * 40_000 + b"\r\n\r\n")
    assert (await read_error(reader, 400))["code"] == "bad_http"
    assert await is_closed(reader)
    writer.close()


async def test_a_long_body_may_come_with_its_head(front: HttpMesh) -> None:
    await front.start()
    reader, writer = await connect(front)
    content = json.dumps({"prompt": "x" * 100_000}).encode()
    head = HEAD.replace(b"/chat", b"") + f"content-length: {len(content)}\r\n\r\n".encode()
    writer.write(head + content)
    assert (await read_error(reader, 400))["code"] == "context_length_exceeded"
    writer.close()


async def test_connections_are_bounded(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.BoundedConnection, "max_connections", 2)
    await front.start()
    first, second = await connect(front), await connect(front)
    await until(lambda: len(front.server.server_state.connections) == 2)
    reader, writer = await connect(front)
    assert (await read_error(reader, 503))["code"] == "unavailable"
    assert await is_closed(reader)
    writer.close()
    first[1].close()
    await until(lambda: len(front.server.server_state.connections) == 1)
    assert (await front.http.get("/healthz")).status_code == 200
    second[1].close()


async def test_pipelined_requests_are_answered_in_turn(front: HttpMesh) -> None:
    await front.start()
    reader, writer = await connect(front)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 3)
    for _ in range(3):
        assert await asyncio.wait_for(reader.readuntil(b'{"status":"serving"}'), TIMEOUT_S)
    writer.close()


async def test_a_long_prompt_is_not_copied_for_more_answers_than_there_may_be(
    front: HttpMesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither beyond our bound nor beyond that of the key."""
    secret = new_secret()
    limited = ApiKey(key_id="few", sha256=digest_of(secret), scopes=frozenset({Scope.GENERATE}), max_requests=2)
    write_keys(tmp_path / "keys", (limited,))
    await front.start(api_keys=tmp_path / "keys")
    made: list[int] = []
    make = GenerationFields.base_request

    def counted(fields: GenerationFields, **options: Any) -> inference_pb2.GenerateRequest:
        made.append(1)
        return make(fields, **options)

    monkeypatch.setattr(GenerationFields, "base_request", counted)
    text = "x" * 1_000_000

    async def status(path: str, **fields: Any) -> int:
        headers = {"authorization": f"Bearer {secret}"}
        return (await front.http.post(f"/v1/{path}", json=fields, headers=headers)).status_code

    messages = [{"role": "user", "content": text}]
    assert await status("chat/completions", messages=messages, n=17) == 400
    assert await status("completions", prompt=text, n=17) == 400
    assert await status("completions", prompt=[text, "y"], n=9) == 400
    assert await status("chat/completions", messages=messages, n=3) == 429
    assert await status("completions", prompt=[text, "y"], n=2) == 429
    assert not made
    assert await status("completions", prompt="y", n=2, max_tokens=5) == 200
    assert len(made) == 2
    await front.nothing_left()


def test_the_bounds_fit_each_other() -> None:
    assert MAX_BODY_BYTES < body.MAX_HELD_BYTES / 16

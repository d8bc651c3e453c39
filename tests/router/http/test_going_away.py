"""Clients that go away, do not read, or stay while the router stops."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx2
import openai
import pytest

from services.router.http import choices as choices_module
from services.router.http import sse
from services.router.http.server import HttpServer
from tests.router.conftest import TIMEOUT_S, until
from tests.router.http.conftest import HttpMesh, answer_to, chat_prompt

MESSAGES = [{"role": "user", "content": "hello"}]


async def send(
    front: HttpMesh, path: str = "/v1/chat/completions", connection: socket.socket | None = None, **body: Any
) -> tuple[Any, asyncio.StreamWriter]:
    """A request by hand, on a connection of its own."""
    host, _, port = front.url.removeprefix("http://").rpartition(":")
    connection = connection or socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    writer.write(head.encode() + b"\r\n\r\n" + content)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_the_engine_at_once(front: HttpMesh, stream: bool) -> None:
    await front.start()
    decode = front.decodes[0]
    decode.pause_after = 5
    _, writer = await send(front, messages=MESSAGES, stream=stream, request_id="r", max_tokens=400)
    await until(lambda: decode.running and len(decode.running["r"].token_ids) == 5)
    writer.close()
    # It stays paused: nothing but the cancel can end it.
    await until(lambda: [request_id for request_id, _ in decode.cancelled] == ["r"])
    assert decode.running == {}
    await front.nothing_left()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_before_the_first_token(front: HttpMesh, stream: bool) -> None:
    await front.start()
    front.prefills[0].gate.clear()
    _, writer = await send(front, messages=MESSAGES, stream=stream, request_id="r")
    await until(lambda: front.prefills[0].specs)
    writer.close()
    await until(lambda: front.prefills[0].cancelled == ["r"])
    await front.nothing_left()


async def test_a_client_that_goes_away_ends_all_its_choices(front: HttpMesh) -> None:
    await front.start()
    decode = front.decodes[0]
    decode.pause_after = 5
    _, writer = await send(front, messages=MESSAGES, stream=True, request_id="r", n=4, max_tokens=400)
    await until(lambda: len(decode.running) == 4)
    writer.transport.abort()
    await until(lambda: sorted(request_id for request_id, _ in decode.cancelled) == [f"r.{n}" for n in range(4)])
    await front.nothing_left()


async def test_a_client_that_closes_its_stream(front: HttpMesh) -> None:
    """As people do with OpenAI's client: they leave the loop."""
    await front.start()
    decode = front.decodes[0]
    decode.pause_after = 5
    stream = await front.chat(stream=True, tokens=400)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await until(lambda: decode.cancelled)
    await front.nothing_left()


async def test_one_choice_that_fails_ends_the_others(front: HttpMesh) -> None:
    await front.start()
    decode = front.decodes[0]
    decode.pause_after = 5
    answer = asyncio.create_task(front.post(messages=MESSAGES, n=3, request_id="r", max_tokens=400))
    await until(lambda: len(decode.running) == 3)
    front.process.router.cancel("r.1")
    assert (await answer).status_code == 499
    await until(lambda: len(decode.cancelled) == 3)
    await front.nothing_left()


async def unread(front: HttpMesh) -> tuple[Any, asyncio.StreamWriter]:
    """A stream of some 1.3 MB that nobody reads, with buffers that hold little of it."""
    for listening in front.server.servers[0].sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return await send(front, "/v1/completions", connection, prompt="hello", n=16, max_tokens=480, stream=True)


async def test_tokens_wait_for_a_client_that_does_not_read(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go out together when it does: nothing queues but the answer itself."""
    sizes: list[int] = []
    events = sse.EventStream._events

    async def watched(self: sse.EventStream, choices: choices_module.Choices) -> Any:
        async for event in events(self, choices):
            sizes.append(len(event))
            yield event

    monkeypatch.setattr(sse.EventStream, "_events", watched)
    await front.start()
    reader, writer = await unread(front)
    await until(lambda: len(front.decodes[0].specs) == 16 and not front.decodes[0].running)
    held = sum(sizes)
    data = await asyncio.wait_for(_rest(reader), TIMEOUT_S)
    writer.close()
    answers: dict[int, str] = {}
    for line in data.decode().splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            answers[choice["index"]] = answers.get(choice["index"], "") + choice["text"]
    assert answers == dict.fromkeys(range(16), answer_to("hello", 480))
    assert held < 400_000, "written before anything was read"
    assert len(sizes) < 16 * 480 / 2
    await front.nothing_left()


async def test_a_client_that_never_reads_is_cut_off(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HttpServer.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(HttpServer.__init__.__kwdefaults__, "unread_s", 0.5)
    await front.start()
    _, writer = await unread(front)
    await until(lambda: len(front.decodes[0].specs) == 16)
    await until(lambda: not front.server.server_state.connections)
    await front.nothing_left()
    writer.transport.abort()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """A response's body without its chunks' sizes, to the last chunk."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += await reader.read(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body


async def test_silence_is_broken_by_comments(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sse.EventStream.__init__.__kwdefaults__, "silence_s", 0.05)
    await front.start()
    front.prefills[0].gate.clear()
    async with front.http.stream(
        "POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "max_tokens": 3}
    ) as response:
        lines = response.aiter_lines()
        assert await anext(lines) == ": still at work"
        front.prefills[0].gate.set()
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]
    # OpenAI's client takes no notice.
    front.prefills[0].gate.clear()
    stream = asyncio.create_task(front.chat(stream=True))
    await asyncio.wait_for(stream, TIMEOUT_S)  # its headers come with the first comment
    front.prefills[0].gate.set()
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream.result()])
    assert text == answer_to(chat_prompt("hello"), 20)


async def test_streams_end_within_the_grace_of_a_stop(front: HttpMesh) -> None:
    await front.start(grace_s=TIMEOUT_S)
    decode = front.decodes[0]
    decode.pause_after = 5
    stream = asyncio.create_task(_read(front))
    whole = asyncio.create_task(front.chat())
    await until(lambda: len(decode.running) == 2)
    stop = asyncio.create_task(front.process.__aexit__(None, None, None))
    await until(front.process.router.stopping.is_set)
    with pytest.raises(openai.InternalServerError) as caught:
        await front.chat()
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert (await front.http.get("/healthz")).status_code == 503
    decode.resume()
    assert await stream == answer_to(chat_prompt("hello"), 20)
    assert (await whole).choices[0].message.content == answer_to(chat_prompt("hello"), 20)
    await asyncio.wait_for(stop, TIMEOUT_S)
    with pytest.raises(httpx2.ConnectError):
        await front.http.get("/healthz")


async def test_streams_that_do_not_end_within_the_grace_are_told(front: HttpMesh) -> None:
    await front.start(grace_s=0.05)
    front.decodes[0].pause_after = 5
    stream = asyncio.create_task(_read(front))
    await until(lambda: front.decodes[0].running)
    await front.process.__aexit__(None, None, None)
    with pytest.raises(openai.APIError) as caught:
        await stream
    assert caught.value.code == "unavailable"


async def test_a_client_that_reads_nothing_does_not_hold_a_stop_up(front: HttpMesh) -> None:
    await front.start(grace_s=0.05)
    _, writer = await unread(front)
    await until(lambda: len(front.decodes[0].specs) == 16)
    async with asyncio.timeout(TIMEOUT_S):
        await front.process.__aexit__(None, None, None)
    assert not front.server.server_state.connections
    writer.transport.abort()


async def _read(front: HttpMesh) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in await front.chat(stream=True)])

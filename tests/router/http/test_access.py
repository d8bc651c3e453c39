"""Who is let in: API keys, TLS, web pages of other origins, names that are rebound."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.router.http.front_door import front_door
from services.router.http.parts import HttpParts
from starmesh.rpc.credentials import LOOK_INTERVAL_S, MESH_NAME, Credentials
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.telemetry import names
from tests.router.conftest import until
from tests.router.http.conftest import MODEL, HttpMesh, answer_to, chat_prompt
from tests.rpc.pki import Pki

MESSAGES: Any = [{"role": "user", "content": "hello"}]


def key(secret: str, key_id: str, scope: Scope = Scope.GENERATE, **limits: Any) -> ApiKey:
    return ApiKey(key_id=key_id, sha256=digest_of(secret), scopes=frozenset({scope}), **limits)


async def ask(front: HttpMesh, api_key: str, **fields: Any) -> Any:
    client = front.connect(api_key=api_key)
    return await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, **fields)


async def test_every_route_but_health_needs_a_key(front: HttpMesh, tmp_path: Path) -> None:
    good, operator, old, few = (new_secret() for _ in range(4))
    keys = (
        key(good, "good"),
        key(operator, "operator", Scope.OPERATE),
        key(old, "old", expires=datetime.now(UTC) - timedelta(seconds=1)),
        key(few, "few", max_requests=2),
    )
    write_keys(tmp_path / "keys", keys)
    await front.start(api_keys=tmp_path / "keys")
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
        response = await front.http.request(method, path)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert (await front.http.get("/healthz")).status_code == 200
    for wrong in (new_secret(), old, "nonsense"):
        with pytest.raises(openai.AuthenticationError):
            await ask(front, wrong)
    with pytest.raises(openai.PermissionDeniedError):
        await ask(front, operator)
    assert (await ask(front, good)).choices[0].message.content == answer_to(chat_prompt("hello"), 20)

    # A request counts until its last byte is sent, and each choice is one.
    front.decodes[0].pause_after = 3
    stream = asyncio.create_task(ask(front, few, stream=True, n=2))
    await until(lambda: len(front.decodes[0].running) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(front, few)
    assert "retry-after" in caught.value.response.headers
    front.decodes[0].resume()
    said = ["", ""]
    async for chunk in await stream:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == [answer_to(chat_prompt("hello"), 20)] * 2
    with pytest.raises(openai.RateLimitError):
        await ask(front, few, n=3)
    assert (await ask(front, few, n=2)).usage.completion_tokens == 40
    await front.nothing_left()


async def test_a_body_is_not_read_before_the_key(front: HttpMesh, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", (key(new_secret(), "any"),))
    await front.start(api_keys=tmp_path / "keys")
    reader, writer = await asyncio.open_connection(*front.url.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_https_follows_its_certificate(front: HttpMesh, tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    names = (MESH_NAME, "127.0.0.1")
    credentials = Credentials(pki.issue(names=names), clock=pki.clock)
    await front.start()
    process = front.process
    parts = HttpParts(
        settings=process._settings,
        router=process.router,
        model=process._model,
        watch=process.watch,
        frames=process.frames,
        metrics=process._metrics,
    )
    server = front_door(parts, credentials)
    address = await server.start()
    trusted = ssl.create_default_context(cafile=pki.ca)
    try:
        first = await _serial(address, trusted)
        async with httpx2.AsyncClient(verify=trusted) as http:
            assert (await http.get(f"https://{address}/healthz")).json() == {"status": "serving"}
            pki.issue(names=names)
            pki.clock.advance(LOOK_INTERVAL_S)
            assert await _serial(address, trusted) != first
            # The old connection goes on.
            assert (await http.get(f"https://{address}/healthz")).status_code == 200
        async with httpx2.AsyncClient() as stranger:
            with pytest.raises(httpx2.ConnectError):
                await stranger.get(f"https://{address}/healthz")
    finally:
        await server.stop(0)


async def _serial(address: str, trusted: ssl.SSLContext) -> str:
    """Which certificate a new connection is shown."""
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=trusted)
    serial = str(writer.get_extra_info("peercert")["serialNumber"])
    writer.close()
    await writer.wait_closed()
    return serial


async def test_pages_of_other_origins_are_let_in_by_name_only(front: HttpMesh) -> None:
    await front.start(http_allow_origins="https://chat.example.org, https://other.example.org")
    ask_first = {
        "origin": "https://chat.example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
    }
    response = await front.http.options("/v1/chat/completions", headers=ask_first)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    response = await front.http.get("/v1/models", headers={"origin": "https://other.example.org"})
    assert response.headers["access-control-allow-origin"] == "https://other.example.org"
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    response = await front.http.options("/v1/models", headers=ask_first | {"origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in response.headers


async def test_no_page_of_another_origin_is_let_in_by_default(front: HttpMesh) -> None:
    await front.start()
    response = await front.http.get("/v1/models", headers={"origin": "https://chat.example.org"})
    assert not any(name.startswith("access-control") for name in response.headers)
    # What a page may post without asking first.
    response = await front.http.post(
        "/v1/completions", content='{"prompt": "x"}', headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8000"])
async def test_loopback_has_its_names(front: HttpMesh, host: str) -> None:
    await front.start()
    assert (await front.http.get("/healthz", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:80", "127.0.0.1.example.org", "", "10.0.0.1"])
async def test_and_no_others(front: HttpMesh, host: str) -> None:
    await front.start()
    response = await front.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


async def test_with_keys_any_name_will_do(front: HttpMesh, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", (key(new_secret(), "any"),))
    await front.start(api_keys=tmp_path / "keys")
    assert (await front.http.get("/healthz", headers={"host": "api.example.org"})).status_code == 200


async def test_plain_http_is_for_loopback_or_asked_for(front: HttpMesh) -> None:
    with pytest.raises(ValueError, match="not a loopback address"):
        await front.start(http_listen="0.0.0.0:0")
    await front.start(http_listen="0.0.0.0:0", allow_plaintext=True)
    assert front.url.startswith("http://0.0.0.0:")


async def test_a_port_that_is_taken_is_told(front: HttpMesh) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        await front.start(http_listen=f"127.0.0.1:{port}")
    taken.close()


async def test_the_description_is_complete(front: HttpMesh) -> None:
    await front.start()
    schema = (await front.http.get("/openapi.json")).json()
    names = set(schema["components"]["schemas"])
    references: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                references.add(node["$ref"].removeprefix("#/components/schemas/"))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
    assert references <= names
    assert {"ChatRequest", "CompletionRequest", "ChatCompletion", "ChatCompletionChunk", "ErrorBody"} <= references
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/healthz",
    }
    generate = schema["paths"]["/v1/chat/completions"]["post"]
    assert set(generate["responses"]) >= {"200", "400", "401", "429", "503", "504"}
    assert set(generate["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "messages" in schema["components"]["schemas"]["ChatRequest"]["properties"]


async def test_a_page_to_try_it_is_served_where_it_is_asked_for(front: HttpMesh) -> None:
    await front.start(http_docs=True)
    assert (await front.http.get("/docs")).status_code == 200


async def test_a_clients_trace_goes_on(front: HttpMesh) -> None:
    """Seen at the instance: the router's span is in the client's trace where tracing is on; off, it is handed on."""
    await front.start()
    trace = "0af7651916cd43dd8448eb211c80319c"
    header = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    response = await front.http.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5}, headers=header
    )
    assert response.status_code == 200
    assert [parent.split("-")[1] for parent in front.decodes[0].traceparents] == [trace]


async def test_a_request_over_http_is_one_trace_of_ours(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The web framework would add spans of its own wherever a tracer is installed for the process."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    monkeypatch.setattr("starmesh.telemetry.setup._TRACER", provider.get_tracer("test"))
    await front.start()
    assert (await ask(front, "none")).choices[0].message.content == answer_to(chat_prompt("hello"), 20)
    await front.nothing_left()
    spans = exporter.get_finished_spans()
    assert {span.name for span in spans} == {names.SPAN_GENERATE, names.SPAN_DISPATCH}
    assert len({span.context.trace_id for span in spans if span.context is not None}) == 1

"""What a router counts of calls that it keeps out, and of requests whose client is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.telemetry.metrics import Metrics, open_metrics
from starmesh.v1 import cluster_pb2, inference_pb2
from tests.router.conftest import TIMEOUT_S, Mesh, check_answer, generate_request, until
from tests.router.http.conftest import HttpMesh, front
from tests.telemetry.pages import Seen, scrape

__all__ = ["front"]

WINDOW = Duration(seconds=60)


@pytest.fixture
async def metrics() -> AsyncIterator[Metrics]:
    """With a page."""
    metrics = open_metrics("router", "r0", listen="127.0.0.1:0")
    yield metrics
    await asyncio.to_thread(metrics.close)


async def page(metrics: Metrics) -> Seen:
    seen = Seen()
    seen.add(await asyncio.to_thread(scrape, f"http://{metrics.address}/metrics"))
    return seen


async def refused(metrics: Metrics) -> dict[str, float]:
    """Calls kept out, by what they were told."""
    samples = (await page(metrics)).values["starmesh_refused_calls_total"]
    return {labels["error_type"]: value for labels, value in samples}


async def ended(metrics: Metrics) -> dict[str, float]:
    """Requests, by how they ended."""
    samples = (await page(metrics)).values["starmesh_requests_total"]
    return {labels["starmesh_outcome"]: value for labels, value in samples}


def write(directory: Path) -> dict[str, str]:
    """A file of keys. Returns the secret of each."""
    secrets = {"good": new_secret(), "busy": new_secret(), "old": new_secret()}
    generate = frozenset({Scope.GENERATE})
    special: dict[str, dict[str, Any]] = {
        "good": {"scopes": generate},
        "busy": {"scopes": frozenset(Scope), "max_requests": 1},
        "old": {"scopes": generate, "expires": datetime.now(UTC) - timedelta(1)},
    }
    write_keys(
        directory / "keys",
        tuple(ApiKey(key_id=name, sha256=digest_of(secret), **special[name]) for name, secret in secrets.items()),
    )
    return secrets


def sent(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_calls_that_their_key_keeps_out_are_counted(mesh: Mesh, metrics: Metrics, tmp_path: Path) -> None:
    """Each once, and among no requests: one client beyond its limit is no sign of a cluster without room."""
    secrets = write(tmp_path)
    await mesh.start(metrics=metrics, api_keys=tmp_path / "keys")
    model = inference_pb2.GetModelRequest()
    assert await code_of(mesh.inference.GetModel(model)) is grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(mesh.inference.GetModel(model, metadata=sent(secrets["old"]))) is (
        grpc.StatusCode.UNAUTHENTICATED
    )
    drain = mesh.cluster.Drain(cluster_pb2.DrainRequest(instance_id="decode-0"), metadata=sent(secrets["good"]))
    assert await code_of(drain) is grpc.StatusCode.PERMISSION_DENIED
    mesh.decodes[0].pause_after = 3
    busy = sent(secrets["busy"])
    running = mesh.inference.Generate(generate_request(), timeout=TIMEOUT_S, metadata=busy)
    messages = aiter(running)
    first = await anext(messages)
    assert (await mesh.inference.GetModel(model, metadata=busy)).model, "asking for the model costs nothing"
    instances = mesh.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), metadata=busy)
    assert await code_of(instances) is grpc.StatusCode.RESOURCE_EXHAUSTED
    another = mesh.inference.Generate(generate_request(), timeout=TIMEOUT_S, metadata=busy)
    assert await code_of(another.read()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    mesh.decodes[0].resume()
    check_answer([first, *[message async for message in messages]], "hello", 20)
    await mesh.nothing_left()
    assert await refused(metrics) == {"UNAUTHENTICATED": 2, "PERMISSION_DENIED": 1, "RESOURCE_EXHAUSTED": 2}
    assert await ended(metrics) == {"length": 1}


async def test_http_that_is_refused_as_it_comes_is_counted(front: HttpMesh, metrics: Metrics, tmp_path: Path) -> None:
    """By status; and not what the router refuses, which is among its requests."""
    secrets = write(tmp_path)
    await front.start(metrics=metrics, api_keys=tmp_path / "keys")
    path, message = "/v1/chat/completions", {"role": "user", "content": "hello"}
    good = {"authorization": f"Bearer {secrets['good']}"}

    async def post(headers: dict[str, str], body: object) -> int:
        return (await front.http.post(path, json=body, headers=headers)).status_code

    assert await post({}, {"messages": [message]}) == 401
    assert await post(good, {"messages": []}) == 400
    assert await post(good, {"messages": [message], "n": 17}) == 400
    assert await post({"authorization": f"Bearer {secrets['busy']}"}, {"messages": [message], "n": 2}) == 429
    assert (await front.http.get("/nothing")).status_code == 404
    assert (await front.http.get(path)).status_code == 405
    assert await refused(metrics) == {"401": 1, "400": 2, "429": 1, "404": 1, "405": 1}
    assert await ended(metrics) == {}
    assert await post(good, {"messages": [message], "temperature": 3.0}) == 400
    assert await post(good, {"messages": [message], "max_tokens": 5}) == 200
    await front.nothing_left()
    assert (await refused(metrics))["400"] == 2
    assert await ended(metrics) == {"INVALID_ARGUMENT": 1, "length": 1}


async def test_a_name_that_is_not_loopbacks_is_counted(front: HttpMesh, metrics: Metrics) -> None:
    await front.start(metrics=metrics)
    assert (await front.http.get("/v1/models", headers={"host": "evil.example.org"})).status_code == 403
    assert await refused(metrics) == {"403": 1}


async def test_what_is_no_http_is_counted(front: HttpMesh, metrics: Metrics) -> None:
    await front.start(metrics=metrics)
    reader, writer = await asyncio.open_connection(*front.url.removeprefix("http://").split(":"))
    writer.write(b"what is no HTTP\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), TIMEOUT_S)).startswith(b"HTTP/1.1 400 ")
    writer.close()
    assert await refused(metrics) == {"400": 1}


async def test_requests_whose_client_is_away_are_shown(mesh: Mesh, metrics: Metrics) -> None:
    await mesh.start(metrics=metrics)
    mesh.decodes[0].pause_after = 3

    async def detached() -> tuple[float, float]:
        """Running, complete."""
        seen = await page(metrics)
        return (
            seen.total("starmesh_requests_detached", starmesh_state="running"),
            seen.total("starmesh_requests_detached", starmesh_state="complete"),
        )

    calls = [mesh.generate(request_id=name, resume_window=WINDOW) for name in ("a", "b")]
    for call in calls:
        await call.read()
    assert await detached() == (0, 0)
    for call in calls:
        call.cancel()
    await until(lambda: len(mesh.process.router.away) == 2)
    assert await detached() == (2, 0)
    mesh.decodes[0].resume()
    await until(lambda: mesh.process.router.away.kept == 2)
    assert await detached() == (0, 2)
    resumed = mesh.inference.Resume(inference_pb2.ResumeRequest(request_id="a"), timeout=TIMEOUT_S)
    check_answer([message async for message in resumed], "hello", 20)
    mesh.process.router.away.clear()
    assert await detached() == (0, 0)

"""The live page's routes: what is sent to whom, how many may look on, and when it ends."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from services.router.http.live_events import MAX_CLIENTS, LiveEvents
from services.router.http.live_page import PAGE, PAGE_HEADERS
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from tests.router.conftest import TIMEOUT_S, generate_request, until
from tests.router.http.conftest import HttpMesh


async def events(front: HttpMesh, **headers: str) -> AsyncIterator[dict[str, Any]]:
    """The frames of one stream, to its end."""
    async with asyncio.timeout(TIMEOUT_S), front.http.stream("GET", "/live/events", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        kind = "message"
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: ") and kind == "message":
                yield json.loads(line.removeprefix("data: "))
        assert kind == "end", "a stream says that it is over"


async def test_frames_are_those_of_watch_cluster(front: HttpMesh) -> None:
    await front.start(decodes=2)
    front.decodes[0].pause_after = front.decodes[1].pause_after = 3
    answer = front.inference.Generate(generate_request(request_id="r"), timeout=TIMEOUT_S)
    async with aclosing(events(front)) as frames:
        async for frame in frames:
            listed = {item["instance_id"]: item for item in frame["instances"]}
            sequences = [one for item in listed.values() for one in item.get("load", {}).get("sequences", [])]
            if sequences:
                break
    assert {"prefill-0", "decode-0", "decode-1"} < listed.keys()
    assert sequences[0]["request_id"] == "r"
    assert frame["active_requests"] == 1 and frame["ledger_available"] and frame["router_id"].startswith("router-")
    assert frame["activity"]["ttft"]["count"] == "1"
    answer.cancel()


async def test_only_who_looks_on_is_worked_for(front: HttpMesh) -> None:
    await front.start()
    live = LiveEvents(front.process.frames, interval_s=0.01)
    assert live._making is None
    places = [live.join() for _ in range(2)]
    making = live._making
    streams = [place.events() for place in places]
    first, second = [await anext(stream) for stream in streams]
    assert first == second and first.startswith(b"data: {")
    # One that is slow gets the newest, not all that it has missed.
    seen = live._number
    await until(lambda: live._number > seen + 3)
    newest = live._newest
    assert await anext(streams[0]) >= newest
    for place in places:
        place.close()
        place.close()
    assert live.clients == 0 and live._making is None
    assert making is not None
    await asyncio.wait({making})
    # Who comes later gets no frame of that time.
    live._newest = b"aged"
    later = live.join()
    streams.append(later.events())
    assert (await anext(streams[-1])).startswith(b"data: {")
    later.close()
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined] # an async generator


async def test_a_client_that_leaves_gives_its_place_back(front: HttpMesh) -> None:
    await front.start()
    live = LiveEvents(front.process.frames)
    for _ in range(MAX_CLIENTS):
        live.join()
    with pytest.raises(Exception, match="clients look on already"):
        live.join()
    for place in list(live._places):
        place.close()
    for _ in range(3):
        async with aclosing(events(front)) as frames:
            await anext(frames)


async def test_streams_end_when_the_router_stops(front: HttpMesh) -> None:
    await front.start()
    seen = 0
    async for _ in events(front):
        seen += 1
        front.process.router.stopping.set()
    assert seen >= 1
    refused = await front.http.get("/live/events")
    assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]


async def test_a_frame_that_fails_is_not_the_last(front: HttpMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    await front.start()
    real, failed = front.process.frames.frame, asyncio.Event()

    async def failing(**fields: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("a bug")
        return await real(**fields)

    monkeypatch.setattr(front.process.frames, "frame", failing)
    async with aclosing(events(front)) as frames:
        assert (await anext(frames))["instances"]
    assert failed.is_set()


async def test_looking_on_takes_a_key_of_an_operator(front: HttpMesh, tmp_path: Path) -> None:
    client, operator = new_secret(), new_secret()
    keys = [(client, "client", {Scope.GENERATE}), (operator, "operator", {Scope.OPERATE})]
    write_keys(
        tmp_path / "keys",
        tuple(
            ApiKey(
                key_id=name,
                sha256=digest_of(secret),
                scopes=frozenset(scopes),
                requests_per_s=None,
                max_requests=1,
                expires=None,
            )
            for secret, name, scopes in keys
        ),
    )
    await front.start(api_keys=tmp_path / "keys")
    assert (await front.http.get("/live")).status_code == 200, "the page itself says nothing of the cluster"
    for secret, status in (("", 401), (new_secret(), 401), (client, 403)):
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        refused = await front.http.get("/live/events", headers=headers)
        assert (refused.status_code, "instances" in refused.text) == (status, False)
    # As often as one likes: the key's one place is given back each time.
    for _ in range(3):
        async with aclosing(events(front, authorization=f"Bearer {operator}")) as frames:
            assert (await anext(frames))["instances"]
            busy = await front.http.get("/live/events", headers={"authorization": f"Bearer {operator}"})
            assert busy.status_code == 429
        await until(lambda: not front.process.keys or not any(u.in_flight for u in front.process.keys._usages.values()))


@pytest.mark.fast
def test_the_page_is_one_document_that_runs_only_its_own_script() -> None:
    policy = dict(part.partition(" ")[::2] for part in PAGE_HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(
        r"(src|href|action)=\"(?!data:)|https?://(?!www\.w3\.org/2000/svg)|\son[a-z]+=\"|style=\"", PAGE
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", PAGE)
    assert "/* s" not in PAGE and len(PAGE) < 80_000


async def test_both_paths_have_the_page_and_other_methods_do_not(front: HttpMesh) -> None:
    await front.start()
    for path in ("/", "/live"):
        response = await front.http.get(path)
        assert (response.status_code, response.text) == (200, PAGE)
        for name, value in PAGE_HEADERS.items():
            assert response.headers[name] == value
    assert (await front.http.post("/live")).status_code == 405
    assert "/live" not in (await front.http.get("/openapi.json")).json()["paths"]

"""Failures as OpenAI's clients know them: HTTP status, shape, param, code, and when to come again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import openai
import pytest

from services.router.http.errors import from_status
from services.router.serving import RouterProcess
from starmesh.rpc.status import StatusError, bad_field, retry_later
from tests.router.conftest import until
from tests.router.http.conftest import HttpMesh, answer_to, chat_prompt


@pytest.mark.fast
@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.FAILED_PRECONDITION, 400),
        (grpc.StatusCode.UNAUTHENTICATED, 401),
        (grpc.StatusCode.PERMISSION_DENIED, 403),
        (grpc.StatusCode.NOT_FOUND, 404),
        (grpc.StatusCode.ALREADY_EXISTS, 409),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (grpc.StatusCode.CANCELLED, 499),
        (grpc.StatusCode.INTERNAL, 500),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    ],
)
async def test_every_status_has_its_own(code: grpc.StatusCode, status: int) -> None:
    refused = from_status(retry_later(code, "what to do", 1.25))
    assert refused.status == status
    assert refused.body.error.message == "what to do"
    assert refused.headers["retry-after"] == "2"
    assert refused.headers["retry-after-ms"] == "1250"
    assert ("www-authenticate" in refused.headers) == (status == 401)


@pytest.mark.fast
async def test_no_status_is_without_one() -> None:
    for code in grpc.StatusCode:
        assert 400 <= from_status(StatusError(code, "x")).status < 600


@pytest.mark.fast
async def test_a_field_is_named_as_the_client_names_it() -> None:
    refused = from_status(bad_field("sampling.top_p", "is odd"), lambda field: field.upper())
    assert refused.body.error.param == "SAMPLING.TOP_P"
    assert refused.body.error.message == "SAMPLING.TOP_P: is odd"


def check_shape(response: Any, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error of a response in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert code is None or error["code"] == code
    return error


MESSAGES = [{"role": "user", "content": "hello"}]


async def test_what_http_itself_refuses(front: HttpMesh) -> None:
    await front.start()
    http = front.http
    check_shape(await http.get("/v1/nothing"), 404, code="unknown_url")
    response = await http.get("/v1/chat/completions")
    check_shape(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    path = "/v1/chat/completions"
    check_shape(await http.post(path, content="{}", headers={"content-type": "text/plain"}), 415)
    gzip = {"content-type": "application/json", "content-encoding": "gzip"}
    check_shape(await http.post(path, content=b"\x1f\x8b", headers=gzip), 415)
    header = {"content-type": "application/json"}
    check_shape(await http.post(path, content="{", headers=header), 400, code="invalid_json")
    check_shape(await http.post(path, content="[" * 100_000, headers=header), 400, code="invalid_json")
    check_shape(await http.post(path, content=b"\xff", headers=header), 400, code="invalid_json")
    check_shape(await front.post(messages=3), 400, param="messages", code="invalid_type")
    response = await http.post(path, json={"messages": MESSAGES}, headers={"x-request-id": "a b"})
    check_shape(response, 400, param="X-Request-Id")
    check_shape(await front.post(messages=MESSAGES, request_id="a/b"), 400, param="request_id")
    assert (await http.get("/docs")).status_code == 404
    assert front.prefills[0].specs == []


async def test_what_the_router_refuses(front: HttpMesh) -> None:
    await front.start()
    check_shape(await front.post(messages=MESSAGES, model="other"), 404, param="model", code="model_not_found")
    for stream in (False, True):
        check_shape(await front.post(messages=MESSAGES, stream=stream, temperature=3), 400, param="temperature")
        check_shape(await front.post(messages=MESSAGES, stream=stream, stop=["x", ""]), 400, param="stop[1]")
    check_shape(await front.post(messages=MESSAGES, top_p=0), 400, param="top_p")
    check_shape(await front.post(messages=MESSAGES, priority=101), 400, param="priority")
    check_shape(await front.post(messages=[{"role": "user", "content": ""}]), 400, param="messages")
    long = [{"role": "user", "content": "x" * 600}]
    code = "context_length_exceeded"
    for stream in (False, True):  # the status is its own: nothing has been sent yet
        check_shape(await front.post(messages=long, stream=stream), 400, param="messages", code=code)
        fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 505, "stream": stream}
        check_shape(await front.post(**fields), 400, param="max_tokens", code=code)
    response = await front.post("/v1/completions", prompt=[1, 128], max_tokens=5)
    check_shape(response, 400, param="prompt[1]")
    response = await front.post("/v1/completions", prompt=[1] * 600, max_tokens=5)
    check_shape(response, 400, param="prompt", code=code)
    await front.nothing_left()


async def test_an_id_in_flight_is_a_conflict(front: HttpMesh) -> None:
    await front.start()
    front.decodes[0].pause_after = 2
    first = asyncio.create_task(front.chat(extra_body={"request_id": "r"}))
    await until(lambda: front.decodes[0].running)
    response = await front.post(messages=MESSAGES, request_id="r")
    check_shape(response, 409, param="request_id", code="already_exists")
    assert response.headers["x-request-id"] == "r"
    front.decodes[0].resume()
    await first


async def test_a_request_cancelled_by_its_id(front: HttpMesh) -> None:
    await front.start()
    front.decodes[0].pause_after = 2
    whole = asyncio.create_task(front.post(messages=MESSAGES, request_id="whole"))
    stream = asyncio.create_task(front.post(messages=MESSAGES, request_id="stream", stream=True))
    await until(lambda: len(front.decodes[0].running) == 2)
    assert front.process.router.cancel("whole")
    assert front.process.router.cancel("stream")
    check_shape(await whole, 499, code="cancelled")
    response = await stream
    assert response.status_code == 200
    assert response.text.endswith("\n\n")
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    await front.nothing_left()


async def test_no_instance_says_when_to_come_again(front: HttpMesh) -> None:
    await front.start(prefills=0, decodes=0, absent_timeout_s=0.05)
    for stream in (False, True):
        response = await front.post(messages=MESSAGES, stream=stream)
        check_shape(response, 503, code="unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["connection"] == "close"
    response = await front.http.get("/healthz")
    assert (response.status_code, response.json()) == (503, {"status": "not_serving"})
    await front.nothing_left()


async def test_a_deadline_passes(front: HttpMesh) -> None:
    """The router's own: nobody waits longer than ``max_duration_s``."""
    await front.start(max_duration_s=1.0)
    front.decodes[0].pause_after = 3
    check_shape(await front.post(messages=MESSAGES), 504, code="deadline_exceeded")
    with pytest.raises(openai.APIError) as caught:
        text = ""
        async for chunk in await front.chat(stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == answer_to(chat_prompt("hello"), 3)
    assert caught.value.code == "deadline_exceeded"
    assert caught.value.type == "timeout_error"
    await front.nothing_left()


async def test_a_stream_that_fails_in_the_middle_says_so(front: HttpMesh) -> None:
    await front.start(max_recoveries=0)
    front.decodes[0].pause_after = 5
    stream = await front.chat(stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if len(text) == 5:
                await front.decodes[0].kill()
    assert text == answer_to(chat_prompt("hello"), 5)
    assert caught.value.code == "unavailable"
    await front.nothing_left()


async def test_a_fault_of_ours_shows_nothing_of_itself(
    front: HttpMesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await front.start()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    assert isinstance(front.process, RouterProcess)
    monkeypatch.setattr(front.process.router, "open", fail)
    error = check_shape(await front.post(messages=MESSAGES), 500, code="internal_error")
    assert "secret" not in error["message"]
    reference = error["message"].rpartition(" ")[2]
    assert any(reference in record.message for record in caplog.records)

"""GenerateMany: many answers over one stream, each as if it were alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry.context import Context

from services.router.access import Caller
from services.router.many import ManyRequests
from starmesh.rpc.status import from_sequence_status
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.router.conftest import TIMEOUT_S, Mesh, check_answer, generate_request, tokens_after, until


class Many:
    """A GenerateMany call and what came of it, by request."""

    def __init__(self, mesh: Mesh) -> None:
        self.call = mesh.inference.GenerateMany(timeout=TIMEOUT_S)
        self.pieces: dict[str, list[inference_pb2.GenerateResponse]] = defaultdict(list)
        self.failures: dict[str, Any] = {}
        self.messages = 0
        self.done = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while isinstance(message := await self.call.read(), inference_pb2.GenerateManyResponse):
            self.messages += 1
            assert message.responses or message.failures
            for piece in message.responses:
                self.pieces[piece.request_id].append(piece)
            for failure in message.failures:
                self.failures[failure.request_id] = from_sequence_status(failure.status)

    async def generate(self, request_id: str, text: str = "hello", *, timeout: float = 0, **fields: Any) -> None:
        request = inference_pb2.GenerateManyRequest(generate=generate_request(text, request_id=request_id, **fields))
        if timeout:
            request.timeout.FromNanoseconds(int(timeout * 1e9))
        await self.call.write(request)

    async def cancel(self, request_id: str) -> None:
        await self.call.write(inference_pb2.GenerateManyRequest(cancel_request_id=request_id))

    async def finish(self) -> None:
        await self.call.done_writing()
        await self.done


async def test_answers_share_messages_and_the_stream_ends_with_the_last(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    mesh.prefills[0].gate.clear()  # none ends before all have begun
    many = Many(mesh)
    for number in range(32):
        await many.generate(f"r{number}", f"prompt {number}", tokens=40)
    await until(lambda: len(mesh.prefills[0].specs) == 32)
    mesh.prefills[0].gate.set()
    await many.finish()
    assert many.failures == {}
    for number in range(32):
        check_answer(many.pieces[f"r{number}"], f"prompt {number}", 40)
    assert many.messages < sum(len(pieces) for pieces in many.pieces.values()) / 2
    await mesh.nothing_left()


async def test_failures_are_of_one_request_and_the_others_go_on(mesh: Mesh) -> None:
    await mesh.start(max_stream_requests=3)
    mesh.decodes[0].pause_after = 3
    many = Many(mesh)
    await many.generate("good")
    await until(lambda: many.pieces["good"])
    await many.generate("")
    await many.generate("bad", text="")
    await many.generate("long", text="x" * 600)
    await many.generate("other", model="other")
    await many.call.write(inference_pb2.GenerateManyRequest())
    await until(lambda: len(many.failures) == 4)
    assert many.failures["bad"].fields == ["text"]
    assert many.failures["long"].fields == ["text"]
    assert many.failures["other"].code is grpc.StatusCode.NOT_FOUND
    assert many.failures[""].fields in (["generate.request_id"], ["action"])
    await many.generate("late", timeout=1.0)
    await until(lambda: "late" in many.failures)
    assert many.failures["late"].code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert [token for piece in many.pieces["late"] for token in piece.token_ids] == tokens_after("hello", 3)
    await many.generate("second")
    await many.generate("third")
    await many.generate("fourth")
    await until(lambda: "fourth" in many.failures)
    assert many.failures["fourth"].code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert many.failures["fourth"].retry_delay_s is not None
    mesh.decodes[0].resume()
    await many.finish()
    for request_id in ("good", "second", "third"):
        check_answer(many.pieces[request_id], "hello", 20)
    await mesh.nothing_left()


async def test_a_client_that_does_not_read_its_failures_is_not_read_from(mesh: Mesh) -> None:
    await mesh.start()
    sent = 0

    async def requests() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
        nonlocal sent
        for _ in range(5000):
            sent += 1
            yield inference_pb2.GenerateManyRequest()

    many = ManyRequests(
        mesh.process.router, Caller(None, (), mesh.process._metrics), max_requests=4, timeout_s=None, parent=Context()
    )
    told = 0
    async with many:
        async for response in many.run(requests()):
            told += len(response.failures)
            assert len(response.failures) <= 1024 and sent - told <= 1
    assert told == sent == 5000


async def test_nothing_begins_once_the_client_has_left(mesh: Mesh) -> None:
    await mesh.start()

    async def requests() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
        yield inference_pb2.GenerateManyRequest(generate=generate_request(request_id="late"))

    many = ManyRequests(
        mesh.process.router, Caller(None, (), mesh.process._metrics), max_requests=4, timeout_s=None, parent=Context()
    )
    many.close()
    assert [response async for response in many.run(requests())] == []
    assert mesh.process.router.active_requests == 0
    await mesh.nothing_left()


async def test_an_id_in_flight_is_taken(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    many = Many(mesh)
    await many.generate("same")
    await until(lambda: many.pieces["same"])
    other = Many(mesh)
    await other.generate("same")
    await until(lambda: other.failures)
    assert other.failures["same"].code is grpc.StatusCode.ALREADY_EXISTS
    mesh.decodes[0].resume()
    await many.finish()
    await other.finish()
    check_answer(many.pieces["same"], "hello", 20)


async def test_cancel_ends_one_and_unknown_ones_are_ignored(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    many = Many(mesh)
    for request_id in ("a", "b"):
        await many.generate(request_id)
    await until(lambda: len(mesh.decodes[0].sequences) == 2)
    await many.cancel("a")
    await many.cancel("nobody")
    await until(lambda: many.pieces["a"][-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED)
    await until(lambda: mesh.decodes[0].cancelled == [("a", 1)])
    mesh.decodes[0].resume()
    await many.finish()
    check_answer(many.pieces["b"], "hello", 20)
    assert many.failures == {}
    await mesh.nothing_left()


async def test_a_client_that_goes_away_cancels_all_its_requests(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    many = Many(mesh)
    for number in range(4):
        await many.generate(f"r{number}")
    await until(lambda: len(mesh.decodes[0].sequences) == 4)
    many.call.cancel()
    await until(lambda: len(mesh.decodes[0].cancelled) == 4)
    with pytest.raises(asyncio.CancelledError):
        await many.done
    await mesh.nothing_left()


async def test_windows_hold_each_request_by_itself(mesh: Mesh) -> None:
    await mesh.start()
    many = Many(mesh)
    await many.generate("held", tokens=100, coalesce_window=Duration(seconds=1))
    await many.generate("free", tokens=100)
    await many.finish()
    check_answer(many.pieces["held"], "hello", 100)
    check_answer(many.pieces["free"], "hello", 100)
    assert len(many.pieces["held"]) <= 4


async def test_a_death_disturbs_no_answer(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 6
    many = Many(mesh)
    for number in range(8):
        await many.generate(f"r{number}", f"prompt {number}")
    await until(lambda: sum(len(decode.sequences) for decode in mesh.decodes) == 8)
    await mesh.decodes[0].kill()
    mesh.decodes[1].resume()
    await many.finish()
    for number in range(8):
        check_answer(many.pieces[f"r{number}"], f"prompt {number}", 20)
    await mesh.nothing_left()


async def test_a_router_that_stops_ends_the_stream_with_its_last_answer(mesh: Mesh) -> None:
    await mesh.start(grace_s=20)
    mesh.decodes[0].pause_after = 5
    many = Many(mesh)
    await many.generate("old")
    await until(lambda: mesh.decodes[0].sequences)
    leaving = asyncio.create_task(mesh.process.__aexit__(None, None, None))
    await until(mesh.process.router.stopping.is_set)
    await many.generate("new")
    await until(lambda: many.failures)
    assert many.failures["new"].code is grpc.StatusCode.UNAVAILABLE
    mesh.decodes[0].resume()
    await many.done  # without a half-close from this side
    check_answer(many.pieces["old"], "hello", 20)
    await leaving

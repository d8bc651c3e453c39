"""Resume: what a client that comes back gets, who gets it, and what is left of one that does not come back."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from services.router.away import Away, Entry
from services.router.flight import Flight
from starmesh.rpc.channels import open_channel
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, write_keys
from starmesh.rpc.status import from_rpc_error
from starmesh.types import FinishReason
from starmesh.v1 import inference_pb2, inference_pb2_grpc, sequence_pb2
from tests.router.conftest import Mesh, check_answer, generate_request, text_of, tokens_after, until

WINDOW = Duration(seconds=60)
REFUSED = grpc.StatusCode.INVALID_ARGUMENT
SHORT_WINDOW = Duration(nanos=200_000_000)


def resume(mesh: Mesh, request_id: str, offset: int, *, timeout: float = 20.0) -> Any:
    request = inference_pb2.ResumeRequest(request_id=request_id, offset=offset)
    return mesh.inference.Resume(request, timeout=timeout)


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code()


def key_file(directory: Path, *key_ids: str) -> Path:
    """Keys for one request at a time each; ``sent`` is what their holders send."""
    path = directory / "keys"
    scopes = frozenset({Scope.GENERATE})
    keys = [
        ApiKey(key_id=key_id, sha256=digest_of(f"sm-{key_id}"), scopes=scopes, max_requests=1) for key_id in key_ids
    ]
    write_keys(path, tuple(keys))
    return path


def sent(key_id: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer sm-{key_id}"),)


async def read_until(call: Any, tokens: int) -> list[inference_pb2.GenerateResponse]:
    """The messages up to that many tokens."""
    messages: list[inference_pb2.GenerateResponse] = []
    while not messages or messages[-1].offset + len(messages[-1].token_ids) < tokens:
        messages.append(await call.read())
    return messages


async def rest_of(call: Any) -> list[Any]:
    """What is left of a call that has been read from."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def test_a_broken_stream_is_resumed_where_it_broke(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 7
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    messages = await read_until(call, 7)
    call.cancel()
    await until(lambda: len(mesh.process.router.away) == 1)
    assert mesh.process.router.active_requests == 1
    mesh.decodes[0].resume()
    messages += [message async for message in resume(mesh, "r", 7)]
    check_answer(messages, "hello", 20)
    assert mesh.decodes[0].cancelled == []
    await mesh.nothing_left()


@pytest.mark.parametrize("break_at", [0, 1, 5, 19])
async def test_what_came_while_nobody_read_is_there(mesh: Mesh, break_at: int) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = max(break_at, 1)
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    messages = await read_until(call, break_at) if break_at else []
    await until(lambda: mesh.process.router.active_requests == 1)
    call.cancel()
    mesh.decodes[0].resume()
    await mesh.nothing_left()  # complete, and kept
    messages += [message async for message in resume(mesh, "r", break_at)]
    check_answer(messages, "hello", 20)
    await mesh.nothing_left()


async def test_an_answer_that_has_ended_is_kept_for_the_window(mesh: Mesh) -> None:
    await mesh.start()
    check_answer([message async for message in mesh.generate(request_id="r", resume_window=WINDOW)], "hello", 20)
    await until(lambda: len(mesh.process.router.away) == 1)
    for offset in (0, 11, 20):
        messages = [message async for message in resume(mesh, "r", offset)]
        assert [token for message in messages for token in message.token_ids] == tokens_after("hello", 20)[offset:]
        assert "".join(message.text for message in messages) == text_of(tokens_after("hello", 20)[offset:])
        assert messages[-1].usage.output_tokens == 20
        assert messages[-1].finish_reason == sequence_pb2.FINISH_REASON_LENGTH
    await mesh.nothing_left()


async def test_the_end_of_the_window_cancels_the_engine(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    call = mesh.generate(request_id="r", resume_window=SHORT_WINDOW)
    await read_until(call, 3)
    call.cancel()
    await until(lambda: mesh.decodes[0].cancelled == [("r", 1)])
    await mesh.nothing_left()
    assert len(mesh.process.router.away) == 0
    assert await code_of(resume(mesh, "r", 3)) is grpc.StatusCode.NOT_FOUND


async def test_the_end_of_the_window_frees_a_complete_answer(mesh: Mesh) -> None:
    await mesh.start()
    assert [message async for message in mesh.generate(request_id="r", resume_window=SHORT_WINDOW)]
    router = mesh.process.router
    await until(lambda: len(router.away) == 0 and router.idle.is_set())
    assert router.away.kept_tokens == 0
    assert await code_of(resume(mesh, "r", 20)) is grpc.StatusCode.NOT_FOUND
    await mesh.nothing_left()


async def test_the_newest_stream_has_the_answer(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    first = mesh.generate(request_id="r", resume_window=WINDOW)
    await read_until(first, 4)
    second = resume(mesh, "r", 2)
    assert (await second.read()).offset == 2
    assert await code_of(first) is grpc.StatusCode.ABORTED
    third = resume(mesh, "r", 0)
    messages = [await third.read()]
    assert await code_of(second) is grpc.StatusCode.ABORTED
    mesh.decodes[0].resume()
    messages += await rest_of(third)
    check_answer(messages, "hello", 20)
    await mesh.nothing_left()


async def test_many_resumes_at_once_leave_one_reader(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    await read_until(mesh.generate(request_id="r", resume_window=WINDOW), 4)
    calls = [resume(mesh, "r", 0) for _ in range(8)]

    async def read(call: Any) -> grpc.StatusCode | list[int]:
        try:
            return [token async for message in call for token in message.token_ids]
        except grpc.aio.AioRpcError as error:
            return error.code()

    reads = [asyncio.create_task(read(call)) for call in calls]
    await until(lambda: sum(task.done() for task in reads) == 7)
    mesh.decodes[0].resume()
    results = await asyncio.gather(*reads)
    assert results.count(grpc.StatusCode.ABORTED) == 7
    assert tokens_after("hello", 20) in results
    await mesh.nothing_left()


async def test_what_cannot_be_resumed(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    await read_until(mesh.generate(request_id="plain"), 4)
    assert await code_of(resume(mesh, "plain", 4)) is grpc.StatusCode.NOT_FOUND
    assert await code_of(resume(mesh, "unknown", 0)) is grpc.StatusCode.NOT_FOUND
    await read_until(mesh.generate(request_id="r", resume_window=WINDOW), 4)
    for offset in (-1, 5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resume(mesh, "r", offset).read()
        status = from_rpc_error(caught.value)
        assert (status.code, status.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["offset"])
    assert await code_of(mesh.generate(resume_window=Duration(seconds=301))) is grpc.StatusCode.INVALID_ARGUMENT


async def test_cancel_reaches_a_request_whose_client_is_away(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    await read_until(call, 4)
    call.cancel()
    await until(lambda: len(mesh.process.router.away) == 1)
    await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=10)
    await until(lambda: mesh.decodes[0].cancelled == [("r", 1)])
    await mesh.nothing_left()
    assert len(mesh.process.router.away) == 0
    assert await code_of(resume(mesh, "r", 4)) is grpc.StatusCode.NOT_FOUND


async def test_a_cancelled_request_is_not_kept(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    await read_until(call, 4)
    await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=10)
    assert [message.finish_reason for message in await rest_of(call)] == [sequence_pb2.FINISH_REASON_CANCELLED]
    await mesh.nothing_left()
    assert len(mesh.process.router.away) == 0


async def test_the_deadline_is_the_requests(mesh: Mesh) -> None:
    await mesh.start(max_duration_s=1.5)
    mesh.decodes[0].pause_after = 4
    call = mesh.generate(request_id="r", timeout=None, resume_window=WINDOW)
    await read_until(call, 4)
    call.cancel()
    await until(lambda: mesh.decodes[0].cancelled == [("r", 1)])
    # What there is, and how it ended.
    late = resume(mesh, "r", 1)
    assert list((await late.read()).token_ids) == tokens_after("hello", 4)[1:]
    assert await code_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    await mesh.nothing_left()


async def test_the_deadline_of_a_resume_is_its_own(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 4
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    messages = await read_until(call, 4)
    call.cancel()
    again = resume(mesh, "r", 4, timeout=0.2)
    assert await code_of(again) is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(mesh.process.router.away) == 1)
    mesh.decodes[0].resume()
    messages += [message async for message in resume(mesh, "r", 4)]
    check_answer(messages, "hello", 20)
    await mesh.nothing_left()


async def test_only_so_many_go_on_alone(mesh: Mesh) -> None:
    await mesh.start(max_detached_requests=2)
    mesh.decodes[0].pause_after = 2
    calls = [mesh.generate(request_id=f"r{number}", resume_window=WINDOW) for number in range(3)]
    for call in calls:
        request_id = (await read_until(call, 2))[-1].request_id
        call.cancel()
        await until(functools.partial(mesh.process.router.away.find, request_id))
    await until(lambda: mesh.decodes[0].cancelled == [("r0", 1)])
    assert await code_of(resume(mesh, "r0", 2)) is grpc.StatusCode.NOT_FOUND
    mesh.decodes[0].resume()
    for request_id in ("r1", "r2"):
        tokens = [token async for message in resume(mesh, request_id, 0) for token in message.token_ids]
        assert tokens == tokens_after("hello", 20)
    await mesh.nothing_left()


async def test_only_so_many_tokens_are_kept(mesh: Mesh) -> None:
    await mesh.start(max_kept_tokens=2 * (64 + 20))
    for number in range(4):
        assert [message async for message in mesh.generate(request_id=f"r{number}", resume_window=WINDOW)]
    router = mesh.process.router
    await until(lambda: router.idle.is_set() and len(router.away) == 2)
    assert router.away.kept_tokens == 2 * (64 + 20)
    assert await code_of(resume(mesh, "r1", 0)) is grpc.StatusCode.NOT_FOUND
    assert [message async for message in resume(mesh, "r2", 20)]
    await mesh.nothing_left()


async def test_an_answer_that_is_complete_is_not_of_those_that_go_on() -> None:
    given_up: list[Entry] = []
    away = Away(max_running=1, max_kept_tokens=100, give_up=given_up.append)

    def entry(request_id: str) -> Entry:
        flight = Flight(
            request_id, deadline_s=0.0, coalesce_window_s=0.0, resume_window_s=60.0, on_ready=lambda _: None
        )
        return Entry(flight, asyncio.create_task(asyncio.sleep(0)))

    running, ended = entry("running"), entry("ended")
    away.wait(running)
    ended.flight.end(FinishReason.STOP)
    away.wait(ended)  # its life cleans up yet
    away.ended(ended)
    assert given_up == [] and away.find("running") is running and away.find("ended") is ended
    assert away.kept_tokens == 64
    for waiting in (running, ended):
        away.leave_off(waiting)
    assert len(away) == away.kept_tokens == 0
    await asyncio.wait([running.task, ended.task])


async def test_a_failure_that_is_kept_holds_no_prompt(mesh: Mesh) -> None:
    await mesh.start()
    assert await code_of(mesh.generate("x" * 600, request_id="r", resume_window=WINDOW)) is REFUSED
    assert await code_of(resume(mesh, "r", 0)) is REFUSED
    entry = mesh.process.router.away.find("r")
    assert entry is not None
    error = entry.flight.error
    assert error is not None and error.__traceback__ is None and error.__context__ is None


async def test_an_id_is_free_once_its_answer_is_complete(mesh: Mesh) -> None:
    await mesh.start()
    assert [message async for message in mesh.generate(request_id="r", resume_window=WINDOW)]
    check_answer([message async for message in mesh.generate("other", request_id="r")], "other", 20)
    assert await code_of(resume(mesh, "r", 20)) is grpc.StatusCode.NOT_FOUND
    mesh.decodes[0].pause_after = 2
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    await read_until(call, 2)
    call.cancel()
    await until(lambda: len(mesh.process.router.away) == 1)
    assert await code_of(mesh.generate(request_id="r")) is grpc.StatusCode.ALREADY_EXISTS


async def test_a_connection_that_breaks_under_many_streams(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 6
    channel = open_channel(mesh.process.address)
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
    requests = [
        generate_request(f"prompt {number}", request_id=f"r{number}", resume_window=WINDOW) for number in range(16)
    ]
    calls = [stub.Generate(request, timeout=20) for request in requests]
    received = [await read_until(call, 1 + number % 6) for number, call in enumerate(calls)]
    await channel.close()
    for decode in mesh.decodes:
        decode.resume()

    async def go_on(number: int) -> None:
        messages = received[number]
        offset = messages[-1].offset + len(messages[-1].token_ids)
        messages += [message async for message in resume(mesh, f"r{number}", offset)]
        check_answer(messages, f"prompt {number}", 20)

    await asyncio.gather(*(go_on(number) for number in range(16)))
    await mesh.nothing_left()


async def test_requests_of_a_broken_multiplexed_stream_are_resumed_one_by_one(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    call: Any = mesh.inference.GenerateMany(timeout=20)
    for request_id in ("a", "b"):
        generate = generate_request(request_id, request_id=request_id, resume_window=WINDOW)
        await call.write(inference_pb2.GenerateManyRequest(generate=generate))
    counts = {"a": 0, "b": 0}
    while set(counts.values()) != {5}:
        for response in (await call.read()).responses:
            counts[response.request_id] += len(response.token_ids)
    # One is taken from the stream that lives, the other outlives it.
    taken = resume(mesh, "a", 0)
    assert (await taken.read()).token_ids == tokens_after("a", 5)
    failures = (await call.read()).failures
    assert [(failure.request_id, failure.status.code) for failure in failures] == [
        ("a", grpc.StatusCode.ABORTED.value[0])
    ]
    call.cancel()
    await until(lambda: mesh.process.router.away.find("b") is not None)
    mesh.decodes[0].resume()
    tokens = [token async for message in resume(mesh, "b", 5) for token in message.token_ids]
    assert tokens == tokens_after("b", 20)[5:]
    assert [token for message in await rest_of(taken) for token in message.token_ids] == tokens_after("a", 20)[5:]
    await mesh.nothing_left()


async def test_a_stopping_router_waits_for_a_client_that_is_away(mesh: Mesh) -> None:
    await mesh.start(grace_s=10)
    mesh.decodes[0].pause_after = 5
    call = mesh.generate(request_id="r", resume_window=WINDOW)
    messages = await read_until(call, 5)
    call.cancel()
    await until(lambda: len(mesh.process.router.away) == 1)
    mesh.process.router.stopping.set()
    mesh.decodes[0].resume()
    messages += [message async for message in resume(mesh, "r", 5)]
    check_answer(messages, "hello", 20)
    await mesh.nothing_left()


async def test_the_router_goes_on_from_tokens_that_a_client_brings(mesh: Mesh) -> None:
    await mesh.start()
    whole = tokens_after("hello", 20)
    for brought in (1, 7, 19):
        messages = [message async for message in mesh.generate(output_token_ids=whole[:brought])]
        assert messages[0].offset == brought
        assert [token for message in messages for token in message.token_ids] == whole[brought:]
        assert "".join(message.text for message in messages) == text_of(whole[brought:])
        assert messages[-1].usage.output_tokens == 20
        assert messages[-1].usage.cached_tokens == 3
    await mesh.nothing_left()


async def test_tokens_that_are_the_whole_answer_bring_its_end(mesh: Mesh) -> None:
    await mesh.start()
    whole = tokens_after("hello", 20)
    (message,) = [message async for message in mesh.generate(output_token_ids=whole)]
    assert (message.offset, list(message.token_ids), message.text) == (20, [], "")
    assert message.finish_reason == sequence_pb2.FINISH_REASON_LENGTH
    stopped = generate_request(output_token_ids=whole[:12])
    stopped.sampling.stop_strings.append(text_of(whole[8:12]))
    (message,) = [message async for message in mesh.inference.Generate(stopped, timeout=20)]
    assert (message.text, message.finish_reason) == ("", sequence_pb2.FINISH_REASON_STOP)
    assert mesh.prefills[0].specs == []
    await mesh.nothing_left()


async def test_a_request_with_brought_tokens_is_resumed_too(mesh: Mesh) -> None:
    await mesh.start()
    whole = tokens_after("hello", 20)
    mesh.decodes[0].pause_after = 9
    call = mesh.generate(request_id="r", output_token_ids=whole[:6], resume_window=WINDOW)
    await read_until(call, 9)
    call.cancel()
    assert await code_of(resume(mesh, "r", 5)) is grpc.StatusCode.INVALID_ARGUMENT
    mesh.decodes[0].resume()
    tokens = [token async for message in resume(mesh, "r", 6) for token in message.token_ids]
    assert tokens == whole[6:]
    await mesh.nothing_left()


async def test_brought_tokens_are_checked(mesh: Mesh) -> None:
    await mesh.start()
    for token_ids in ([128], [-1], [97] * 21, [97] * 512):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(output_token_ids=token_ids).read()
        status = from_rpc_error(caught.value)
        assert status.code is grpc.StatusCode.INVALID_ARGUMENT
        assert status.fields[0].startswith("output_token_ids")
    await mesh.nothing_left()


async def test_a_request_is_its_api_keys(mesh: Mesh, tmp_path: Path) -> None:
    await mesh.start(api_keys=key_file(tmp_path, "alice", "bob"))
    mesh.decodes[0].pause_after = 4
    call = mesh.inference.Generate(
        generate_request(request_id="r", resume_window=WINDOW), timeout=20, metadata=sent("alice")
    )
    await read_until(call, 4)
    again = inference_pb2.ResumeRequest(request_id="r", offset=4)
    cancel = inference_pb2.CancelRequest(request_id="r")
    assert await code_of(mesh.inference.Resume(again, metadata=sent("bob"))) is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.inference.Cancel(cancel, metadata=sent("bob"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    call.cancel()
    await until(lambda: len(mesh.process.router.away) == 1)
    # It counts while nobody reads, but does not keep its own client from it.
    other = generate_request(request_id="s")
    refused = mesh.inference.Generate(other, timeout=20, metadata=sent("alice"))
    assert await code_of(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED
    mesh.decodes[0].resume()
    resumed = mesh.inference.Resume(again, timeout=20, metadata=sent("alice"))
    assert [token async for message in resumed for token in message.token_ids] == tokens_after("hello", 20)[4:]
    await mesh.nothing_left()
    assert [message async for message in mesh.inference.Generate(other, timeout=20, metadata=sent("alice"))]
    await mesh.nothing_left()


async def test_an_answer_is_kept_from_other_keys_that_use_its_id(mesh: Mesh, tmp_path: Path) -> None:
    await mesh.start(api_keys=key_file(tmp_path, "alice", "bob"))
    request = generate_request(request_id="r", resume_window=WINDOW)
    assert [message async for message in mesh.inference.Generate(request, timeout=20, metadata=sent("alice"))]
    await until(mesh.process.router.idle.is_set)
    taken = mesh.inference.Generate(request, timeout=20, metadata=sent("bob"))
    assert await code_of(taken) is grpc.StatusCode.ALREADY_EXISTS
    again = inference_pb2.ResumeRequest(request_id="r", offset=20)
    assert [message async for message in mesh.inference.Resume(again, timeout=20, metadata=sent("alice"))]
    await mesh.nothing_left()


async def test_each_of_many_requests_counts(mesh: Mesh, tmp_path: Path) -> None:
    await mesh.start(api_keys=key_file(tmp_path, "alice"))
    mesh.decodes[0].pause_after = 4
    call: Any = mesh.inference.GenerateMany(timeout=20, metadata=sent("alice"))
    for request_id in ("a", "b"):
        await call.write(inference_pb2.GenerateManyRequest(generate=generate_request(request_id=request_id)))
    failures: list[Any] = []
    while not failures:
        failures += (await call.read()).failures
    assert [(failure.request_id, failure.status.code) for failure in failures] == [
        ("b", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    ]
    await call.write(inference_pb2.GenerateManyRequest(cancel_request_id="a"))
    await call.done_writing()
    responses = [response for message in await rest_of(call) for response in message.responses]
    assert responses[-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    await mesh.nothing_left()

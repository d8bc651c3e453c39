"""Generate, from end to end over real sockets, when all is well and when the client misbehaves."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.router.conftest import Mesh, check_answer, generate_request, text_of, tokens_after, until


async def test_an_answer_comes_whole_and_in_order(mesh: Mesh) -> None:
    await mesh.start()
    messages = [message async for message in mesh.generate(request_id="r-1")]
    check_answer(messages, "hello", 20)
    assert {message.request_id for message in messages} == {"r-1"}
    assert messages[0].token_ids == tokens_after("hello", 1)  # at once, from the prefill
    assert messages[-1].usage.cached_tokens == 3
    assert messages[-1].usage.recoveries == 0
    await mesh.nothing_left()


async def test_an_answer_of_one_token_never_reaches_a_decode_instance(mesh: Mesh) -> None:
    await mesh.start()
    check_answer([message async for message in mesh.generate(tokens=1)], "hello", 1)
    assert mesh.decodes[0].specs == []
    await mesh.nothing_left()


async def test_many_answers_at_once_share_one_stream(mesh: Mesh) -> None:
    await mesh.start(decodes=2)

    async def one(number: int) -> None:
        text = f"prompt {number}"
        check_answer([message async for message in mesh.generate(text, tokens=5 + number)], text, 5 + number)

    mesh.prefills[0].gate.clear()  # none ends before all have their places
    calls = [asyncio.create_task(one(number)) for number in range(32)]
    await until(lambda: len(mesh.prefills[0].specs) == 32)
    mesh.prefills[0].gate.set()
    await asyncio.gather(*calls)
    assert [decode.streams for decode in mesh.decodes] == [1, 1]
    assert all(len(decode.specs) > 4 for decode in mesh.decodes)
    await mesh.nothing_left()


async def test_chat_and_token_ids(mesh: Mesh) -> None:
    await mesh.start()
    sampling = sequence_pb2.SamplingParams(max_output_tokens=4, temperature=0)
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    call = mesh.inference.Generate(inference_pb2.GenerateRequest(chat=chat, sampling=sampling), timeout=20)
    check_answer([message async for message in call], "user:hi;", 4)
    token_ids = inference_pb2.TokenIds(token_ids=[104, 105])
    call = mesh.inference.Generate(inference_pb2.GenerateRequest(token_ids=token_ids, sampling=sampling), timeout=20)
    check_answer([message async for message in call], "hi", 4)


async def test_an_unset_limit_means_as_many_as_fit(mesh: Mesh) -> None:
    await mesh.start()
    call = mesh.inference.Generate(inference_pb2.GenerateRequest(text="x" * 500), timeout=20)
    check_answer([message async for message in call], "x" * 500, 12)


async def test_a_stop_string_ends_the_answer(mesh: Mesh) -> None:
    await mesh.start()
    text = text_of(tokens_after("hello", 40))
    stop = text[10:13]
    request = generate_request(tokens=40)
    request.sampling.stop_strings.append(stop)
    messages = [message async for message in mesh.inference.Generate(request, timeout=20)]
    assert "".join(message.text for message in messages) == text[: text.index(stop)]
    assert messages[-1].finish_reason == sequence_pb2.FINISH_REASON_STOP
    await mesh.nothing_left()


async def test_a_window_gathers_tokens_but_not_the_first(mesh: Mesh) -> None:
    await mesh.start()
    messages = [message async for message in mesh.generate(tokens=200, coalesce_window=Duration(seconds=1))]
    check_answer(messages, "hello", 200)
    assert messages[0].token_ids == tokens_after("hello", 1)
    assert len(messages) <= 5


async def test_large_prompts_are_tokenised_too(mesh: Mesh) -> None:
    await mesh.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate("y" * 100_000).read()
    status = from_rpc_error(caught.value)
    assert (status.code, status.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])
    assert "100000 tokens" in status.message
    await mesh.nothing_left()


async def test_a_client_that_goes_away_is_cancelled_on_the_instance(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    call = mesh.generate(request_id="gone")
    async for message in call:
        if message.offset >= 2:
            break
    call.cancel()
    await until(lambda: mesh.decodes[0].cancelled == [("gone", 1)])
    await mesh.nothing_left()


async def test_a_client_that_goes_away_during_prefill_cancels_it(mesh: Mesh) -> None:
    await mesh.start()
    mesh.prefills[0].gate.clear()
    call = mesh.generate(request_id="gone")
    await until(lambda: mesh.prefills[0].specs)
    call.cancel()
    await until(lambda: mesh.prefills[0].cancelled == ["gone"])
    await mesh.nothing_left()


async def test_cancel_ends_the_stream_with_its_tokens(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    call = mesh.generate(request_id="c")
    messages = []
    async for message in call:
        messages.append(message)
        if message.offset + len(message.token_ids) == 5 and not message.finish_reason:
            await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="c"), timeout=10)
    assert messages[-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    assert messages[-1].usage.output_tokens == 5
    await until(lambda: mesh.decodes[0].cancelled == [("c", 1)])
    await mesh.nothing_left()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="c"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_deadline_cancels_the_engine(mesh: Mesh) -> None:
    await mesh.start(max_duration_s=1.5)
    mesh.decodes[0].pause_after = 5
    # Without a deadline of its own the router's limit holds.
    call = mesh.generate(request_id="late", timeout=None)
    token_ids: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in call:
            token_ids += message.token_ids
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert token_ids == tokens_after("hello", 5)
    await until(lambda: mesh.decodes[0].cancelled == [("late", 1)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in mesh.generate(request_id="later", timeout=1.0):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: mesh.decodes[0].cancelled[1:] == [("later", 1)])
    await mesh.nothing_left()


async def test_an_id_in_flight_is_taken_and_free_afterwards(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 2
    first = mesh.generate(request_id="same")
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(request_id="same").read()
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert from_rpc_error(caught.value).fields == ["request_id"]
    first.cancel()
    await mesh.nothing_left()
    mesh.decodes[0].pause_after = None
    for _ in range(5):  # at once, without a look at what is still being cleaned up
        check_answer([message async for message in mesh.generate(request_id="same")], "hello", 20)
    await mesh.nothing_left()


async def test_an_id_in_flight_at_another_router_is_taken(mesh: Mesh) -> None:
    await mesh.start()
    await mesh.ledger.claim("theirs", "decode-0", expected=None, epoch=1, ttl_s=30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(request_id="theirs").read()
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    owner = await mesh.ledger.owner("theirs")
    assert owner is not None
    assert owner.epoch == 1


async def test_a_client_that_does_not_read_blocks_nobody_and_misses_nothing(mesh: Mesh) -> None:
    await mesh.start()
    slow = mesh.generate("z" * 100, tokens=400)
    for number in range(4):
        check_answer([message async for message in mesh.generate(f"quick {number}")], f"quick {number}", 20)
    check_answer([message async for message in slow], "z" * 100, 400)


async def test_raw_bytes_that_are_no_request(mesh: Mesh) -> None:
    await mesh.start()
    raw: Any = mesh.channel.unary_stream("/starmesh.v1.InferenceService/Generate")

    async def status_of(data: bytes) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(data, timeout=20).read()
        return from_rpc_error(caught.value)

    invalid_text = b"\x1a\x03a\xffb"  # field 3, text
    status = await status_of(invalid_text)
    assert (status.code, status.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])
    status = await status_of(b"\x0a\xff")
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    check_answer([message async for message in mesh.generate()], "hello", 20)


async def test_a_message_of_100_megabytes_is_refused(mesh: Mesh) -> None:
    await mesh.start()
    # A channel with no limit of its own: the server's is what is tested.
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(mesh.process.address, options=options) as channel:
        raw: Any = channel.unary_stream("/starmesh.v1.InferenceService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(bytes(100_000_000), timeout=60).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check_answer([message async for message in mesh.generate()], "hello", 20)


@pytest.mark.parametrize(
    ("request_", "code", "fields"),
    [
        (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, ["input"]),
        (generate_request("x" * 512), grpc.StatusCode.INVALID_ARGUMENT, ["text"]),
        (generate_request(tokens=508), grpc.StatusCode.INVALID_ARGUMENT, ["sampling.max_output_tokens"]),
        (generate_request(tokens=0), grpc.StatusCode.INVALID_ARGUMENT, ["sampling.max_output_tokens"]),
        (generate_request(model="other"), grpc.StatusCode.NOT_FOUND, ["model"]),
        (generate_request(request_id="no spaces"), grpc.StatusCode.INVALID_ARGUMENT, ["request_id"]),
    ],
)
async def test_bad_requests_name_the_field(
    mesh: Mesh, request_: inference_pb2.GenerateRequest, code: grpc.StatusCode, fields: list[str]
) -> None:
    await mesh.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.inference.Generate(request_, timeout=20).read()
    status = from_rpc_error(caught.value)
    assert (status.code, status.fields) == (code, fields)
    await mesh.nothing_left()


async def test_the_model_is_described(mesh: Mesh) -> None:
    await mesh.start()
    model = await mesh.inference.GetModel(inference_pb2.GetModelRequest(), timeout=10)
    assert (model.model, model.revision, model.context_tokens) == ("letters", "rev", 512)
    assert (model.vocabulary_tokens, list(model.eos_token_ids), model.has_chat_template) == (128, [2], True)

"""The asyncio client when all is well, and how it ends early."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest

from starmesh.client import Client, ClientError, FinishReason
from tests.client.conftest import Surroundings, check_pieces, read
from tests.router.conftest import Mesh, text_of, tokens_after, until


async def test_an_answer_comes_in_pieces(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    client = await surroundings.client()
    check_pieces([piece async for piece in client.generate("hello", max_output_tokens=20)], "hello", 20)
    tokens = [ord(character) for character in "hello"]
    check_pieces([piece async for piece in client.generate(tokens, max_output_tokens=20)], "hello", 20)
    chat = client.chat([{"role": "user", "content": "hi"}], max_output_tokens=20)
    check_pieces([piece async for piece in chat], "user:hi;", 20)
    await mesh.nothing_left()


async def test_the_whole_answer_in_one(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    client = await surroundings.client()
    expected = text_of(tokens_after("hello", 20))
    assert await client.text("hello", max_output_tokens=20) == expected
    assert await client.text("hello", max_output_tokens=20, stop=[expected[5:8]]) == expected[:5]
    answer = await client.generate("hello", max_output_tokens=20).whole()
    assert (answer.text, answer.finish_reason) == (expected, FinishReason.LENGTH)
    assert answer.token_ids == tuple(tokens_after("hello", 20))
    text = await client.text([{"role": "user", "content": "hi"}], max_output_tokens=5)
    assert text == text_of(tokens_after("user:hi;", 5))
    stream = client.generate("hello", max_output_tokens=3)
    await stream.whole()
    with pytest.raises(RuntimeError, match="ask again"):
        await stream.whole()
    await mesh.nothing_left()


async def test_options_reach_the_router(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    client = await surroundings.client()
    stream = client.generate(
        "hello",
        request_id="mine",
        max_output_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        repetition_penalty=1.5,
        stop=["zz"],
        seed=11,
        ignore_eos=True,
        priority=3,
        coalesce_window_s=0.01,
    )
    assert stream.request_id == "mine"
    await stream.whole()
    (spec,) = mesh.prefills[0].specs
    assert (spec.request_id, spec.priority, spec.sampling.seed, spec.sampling.top_k) == ("mine", 3, 11, 7)
    assert (spec.sampling.temperature, spec.sampling.stop_strings) == (0.5, ("zz",))
    assert spec.sampling.ignore_eos
    assert spec.sampling.repetition_penalty == 1.5
    assert spec.sampling.top_p == pytest.approx(0.9)


async def test_what_is_wrong_with_a_request_is_named(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    client = await surroundings.client()
    with pytest.raises(ClientError) as caught:
        await client.text("hello", temperature=3.0)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.fields == ("sampling.temperature",)
    assert caught.value.retry_delay_s is None
    assert "must be 0 to 2" in str(caught.value)
    with pytest.raises(ClientError) as caught:
        await client.text("hello", model="other")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    with pytest.raises(ValueError, match="HOST:PORT"):
        Client(" , ")
    await mesh.nothing_left()


async def test_cancel_ends_the_stream_with_its_tokens(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    client = await surroundings.client()
    stream = client.generate("hello", request_id="c", max_output_tokens=20)
    pieces = await read(stream, 5)
    await stream.cancel()
    pieces += [piece async for piece in stream]
    assert pieces[-1].finish_reason is FinishReason.CANCELLED
    assert [token for piece in pieces for token in piece.token_ids] == tokens_after("hello", 5)
    await until(lambda: mesh.decodes[0].cancelled == [("c", 1)])
    await mesh.nothing_left()


async def test_cancel_before_anything(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.prefills[0].gate.clear()
    client = await surroundings.client()
    never_sent = client.generate("hello")
    await never_sent.cancel()
    assert [piece.finish_reason async for piece in never_sent] == [FinishReason.CANCELLED]
    assert mesh.prefills[0].specs == []
    waiting = client.generate("hello", request_id="w")
    first = asyncio.create_task(anext(waiting))
    await until(lambda: mesh.prefills[0].specs)
    await waiting.cancel()
    assert (await first).finish_reason is FinishReason.CANCELLED
    await until(lambda: mesh.prefills[0].cancelled == ["w"])
    await mesh.nothing_left()


@pytest.mark.parametrize("way", ["block", "close", "let go", "task"])
async def test_whoever_leaves_early_cancels_the_request(mesh: Mesh, surroundings: Surroundings, way: str) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    client = await surroundings.client()
    stream = client.generate("hello", request_id="gone", max_output_tokens=20)
    await read(stream, 5)
    if way == "block":
        async with stream:
            pass
    elif way == "close":
        await stream.aclose()
    elif way == "let go":
        del stream
        gc.collect()
    else:
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    await until(lambda: mesh.decodes[0].cancelled == [("gone", 1)])
    await mesh.nothing_left()
    assert len(mesh.process.router.away) == 0


async def test_the_deadline_bounds_all(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    client = await surroundings.client(timeout_s=0.3)
    for options in ({}, {"timeout_s": 0.2}):
        with pytest.raises(ClientError) as caught:
            await client.text("hello", **options)  # type: ignore[arg-type] # one of Options
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await mesh.nothing_left()
    await until(lambda: mesh.decodes[0].running == {})


async def test_a_closed_client_ends_its_streams(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    client = await surroundings.client(resume_window_s=0)
    stream = client.generate("hello", request_id="r", max_output_tokens=20)
    await read(stream, 5)
    unread = client.generate("hello")
    reading = asyncio.create_task(stream.whole())
    await asyncio.sleep(0)
    await client.close()
    for ended in (reading, unread.whole()):
        with pytest.raises(ClientError, match="closed"):
            await ended
    await until(lambda: mesh.decodes[0].cancelled == [("r", 1)])
    await mesh.nothing_left()
    # And begins anew where it is used again.
    mesh.decodes[0].resume()
    assert await client.text("hello", max_output_tokens=20) == text_of(tokens_after("hello", 20))

"""What the client makes of connections that break and routers that end: each token and character once."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from starmesh.client import ClientError, FinishReason, RetryPolicy
from starmesh.rpc.status import retry_later
from starmesh.v1 import inference_pb2
from tests.client.conftest import Surroundings, check_pieces, read
from tests.router.conftest import Mesh, text_of, tokens_after, until

HASTY = RetryPolicy(max_retries=2, first_delay_s=0.01, max_delay_s=0.01)


@pytest.mark.parametrize("window_s", [30.0, 0.0], ids=["resumed", "begun anew"])
async def test_a_connection_may_break_at_any_byte(mesh: Mesh, surroundings: Surroundings, window_s: float) -> None:
    await mesh.start()
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address, resume_window_s=window_s)
    draw = random.Random(7)
    for number in range(40):
        relay.cut_after = draw.randrange(1, 800)
        text = f"prompt {number}"
        pieces = [piece async for piece in client.generate(text, max_output_tokens=20)]
        check_pieces(pieces, text, 20)
    assert relay.cuts >= 10  # the fewer messages an answer comes in, the fewer bytes it has
    await mesh.nothing_left()


async def test_many_streams_over_a_connection_that_breaks_again_and_again(
    mesh: Mesh, surroundings: Surroundings
) -> None:
    await mesh.start(decodes=2)
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address)
    done = asyncio.Event()

    async def cut() -> None:
        draw = random.Random(3)
        while not done.is_set():
            relay.cut_after = draw.randrange(200, 2500)
            await until(lambda: relay.cut_after is None or done.is_set())

    async def one(number: int) -> None:
        text = f"prompt {number}"
        check_pieces([piece async for piece in client.generate(text, max_output_tokens=150)], text, 150)

    cutter = asyncio.create_task(cut())
    await asyncio.gather(*(one(number) for number in range(16)))
    done.set()
    await cutter
    assert relay.cuts >= 5
    await mesh.nothing_left()


async def test_stop_strings_survive_a_break(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    expected = text_of(tokens_after("hello", 60))
    stop = expected[40:44]
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address)
    for broken_at in range(36, 44):
        mesh.decodes[0].pause_after = broken_at
        stream = client.generate("hello", max_output_tokens=60, stop=[stop])
        text = "".join(piece.text for piece in await read(stream, broken_at))
        relay.cut()
        mesh.decodes[0].resume()
        answer = await stream.whole()
        assert text + answer.text == expected[: expected.index(stop)]
        assert answer.finish_reason is FinishReason.STOP
    await mesh.nothing_left()


async def test_a_stream_that_stalls_goes_on(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address)
    stream = client.generate("hello", max_output_tokens=20)
    pieces = await read(stream, 5)
    relay.stall()
    mesh.decodes[0].resume()
    await until(lambda: mesh.process.router.idle.is_set() or not mesh.decodes[0].running)
    relay.cut()
    relay.flow()
    pieces += [piece async for piece in stream]
    check_pieces(pieces, "hello", 20)
    await mesh.nothing_left()


async def test_a_reader_that_loses_its_answer_to_another_is_told(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    client = await surroundings.client()
    stream = client.generate("hello", request_id="r", max_output_tokens=20)
    await read(stream, 5)
    taken = mesh.inference.Resume(inference_pb2.ResumeRequest(request_id="r", offset=0), timeout=20)
    with pytest.raises(ClientError) as caught:
        await anext(stream)
    assert caught.value.code is grpc.StatusCode.ABORTED
    mesh.decodes[0].resume()
    assert [token async for message in taken for token in message.token_ids] == tokens_after("hello", 20)
    await mesh.nothing_left()


async def test_the_router_is_asked_again_when_it_says_so(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start(prefills=0, decodes=0, absent_timeout_s=0.05)
    client = await surroundings.client()
    answer = asyncio.create_task(client.text("hello", max_output_tokens=20))
    await asyncio.sleep(0)
    await mesh.add_prefill()
    await mesh.add_decode()
    assert await answer == text_of(tokens_after("hello", 20))
    await mesh.nothing_left()


async def test_retries_end(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start(prefills=0, decodes=0, absent_timeout_s=0.0)
    client = await surroundings.client(retries=RetryPolicy(max_retries=0))
    with pytest.raises(ClientError) as caught:
        await client.text("hello")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay_s == 1.0
    # Nor is there a wait that would end after the deadline.
    client = await surroundings.client(timeout_s=0.8)
    with pytest.raises(ClientError) as caught:
        await client.text("hello")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    await mesh.nothing_left()


async def test_nobody_at_the_address(surroundings: Surroundings) -> None:
    client = await surroundings.client("127.0.0.1:1", retries=HASTY)
    with pytest.raises(ClientError) as caught:
        await client.text("hello")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_instances_without_room_are_the_routers_business(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    full = retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "no KV blocks", 0.01)
    mesh.prefills[0].script.extend([full, full])
    mesh.decodes[0].script.extend([full, full])
    client = await surroundings.client()
    check_pieces([piece async for piece in client.generate("hello", max_output_tokens=20)], "hello", 20)
    await mesh.nothing_left()


async def test_a_router_that_forgot_the_request_is_asked_anew(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address)
    stream = client.generate("hello", request_id="r", max_output_tokens=20)
    pieces = await read(stream, 5)
    mesh.process.router.away._max_running = 0  # as if it had been restarted
    relay.cut()
    mesh.decodes[0].resume()
    pieces += [piece async for piece in stream]
    check_pieces(pieces, "hello", 20)
    assert stream.request_id.startswith("r.")
    assert mesh.prefills[0].specs[-1].output_token_ids == tuple(tokens_after("hello", 5))
    await mesh.nothing_left()


async def test_another_router_goes_on_with_the_answer(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 6
    other = await surroundings.router()
    relays = [await surroundings.relay(), await surroundings.relay(other.address)]
    client = await surroundings.client(*(relay.address for relay in relays), resume_window_s=0.2)
    streams = [client.generate(f"prompt {number}", max_output_tokens=20) for number in range(8)]
    pieces = [await read(stream, 1 + number % 6) for number, stream in enumerate(streams)]
    relays[0].refusing = True
    relays[0].cut()
    for decode in mesh.decodes:
        decode.resume()
    for number, stream in enumerate(streams):
        pieces[number] += [piece async for piece in stream]
        check_pieces(pieces[number], f"prompt {number}", 20)
    assert len({spec.request_id for spec in mesh.prefills[0].specs}) == 8 + 4
    await until(other.router.idle.is_set)
    await mesh.nothing_left()


async def test_a_router_that_stops_sends_its_clients_on(mesh: Mesh, surroundings: Surroundings) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    other = await surroundings.router()
    client = await surroundings.client(mesh.process.address, other.address)
    streams = [client.generate(f"prompt {number}", max_output_tokens=20) for number in range(4)]
    pieces = [await read(stream, 5) for stream in streams]
    await other.router.stop()
    mesh.decodes[0].resume()
    for number, stream in enumerate(streams):
        pieces[number] += [piece async for piece in stream]
        check_pieces(pieces[number], f"prompt {number}", 20)
    check_pieces([piece async for piece in client.generate("more", max_output_tokens=20)], "more", 20)
    await mesh.nothing_left()

"""Sequences that move while they run: whatever of a move is lost, late or refused, the client gets the tokens of an
undisturbed run, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.router.flight import Flight
from services.router.owners import OFFLINE_STEP
from starmesh.rpc.status import StatusError, retry_later
from starmesh.telemetry import names
from starmesh.types import FinishReason, Ownership
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.router.conftest import Mesh, check_answer, tokens_after, until
from tests.router.decode_peer import DecodePeer

Answer = asyncio.Task[list[inference_pb2.GenerateResponse]]


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


async def running(mesh: Mesh, *, decodes: int = 2, pause_after: int = 5, **settings: Any) -> tuple[Answer, DecodePeer]:
    """A request ``r`` that pauses at its instance, and that instance. The other instances let it run on."""
    await mesh.start(decodes=decodes, **settings)
    for decode in mesh.decodes:
        decode.pause_after = pause_after
    answer = asyncio.create_task(collect(mesh.generate(request_id="r")))
    await until(lambda: any(decode.running for decode in mesh.decodes))
    source = next(decode for decode in mesh.decodes if decode.running)
    await until(lambda: len(flight_of(mesh).stream.token_ids) == max(pause_after, 1))
    for decode in mesh.decodes:
        if decode is not source:
            decode.pause_after = None
    return answer, source


def flight_of(mesh: Mesh, request_id: str = "r") -> Flight:
    return mesh.process.router._entries[request_id].flight


def others(mesh: Mesh, source: DecodePeer) -> list[DecodePeer]:
    return [decode for decode in mesh.decodes if decode is not source]


def counts(messages: list[inference_pb2.GenerateResponse]) -> tuple[int, int]:
    """Migrations and recoveries."""
    return messages[-1].usage.migrations, messages[-1].usage.recoveries


async def test_a_sequence_moves_and_its_tokens_go_on(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    target.pause_after = 9
    await source.move("r", target)
    await until(lambda: len(flight_of(mesh).stream.token_ids) == 9)
    assert target.attached == [("r", 2, 5)]
    links = mesh.process.links._links
    assert (links[source.instance_id].requests, links[target.instance_id].requests) == (0, 1)
    assert mesh.process._owners._owned["r"] == Ownership(target.instance_id, 2)
    target.resume()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 0)
    assert len(mesh.prefills[0].specs) == 1
    assert source.cancelled == target.cancelled == []
    await mesh.nothing_left()


async def test_a_sequence_moves_many_times_and_back(mesh: Mesh) -> None:
    answer, source = await running(mesh, decodes=3)
    first, second = others(mesh, source)
    at = source
    for length, target in enumerate([first, source, second, first, second, source], start=6):
        target.pause_after = length
        await at.move("r", target)
        await until(lambda length=length: len(flight_of(mesh).stream.token_ids) == length)  # type: ignore[misc]
        at = target
    at.resume()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (6, 0)
    asked = sorted(asked for decode in mesh.decodes for asked in decode.attached)
    assert asked == [("r", epoch, 3 + epoch) for epoch in range(2, 8)]
    await mesh.nothing_left()


async def test_moves_one_after_the_other_without_a_token_between(mesh: Mesh) -> None:
    answer, source = await running(mesh, decodes=3)
    first, second = others(mesh, source)
    first.pause_after = 5
    await source.move("r", first)
    await until(lambda: first.attached)
    await first.move("r", second)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (2, 0)
    assert (first.attached, second.attached) == ([("r", 2, 5)], [("r", 3, 5)])
    await mesh.nothing_left()


async def test_tokens_lost_on_the_way_from_the_source_come_from_the_target(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 12
        decode.tamper = lambda output: [output] if output.offset < 6 or output.epoch > 1 else []
    answer = asyncio.create_task(collect(mesh.generate(request_id="r")))
    await until(lambda: any(len(at.token_ids) == 12 for decode in mesh.decodes for at in decode.running.values()))
    source = next(decode for decode in mesh.decodes if decode.running)
    (target,) = others(mesh, source)
    target.pause_after = None
    await source.move("r", target)
    check_answer(await answer, "hello", 20)
    assert target.attached == [("r", 2, 6)]
    await mesh.nothing_left()


async def test_a_sequence_that_ends_before_its_router_comes(mesh: Mesh) -> None:
    """The target has all tokens by then: one output brings the rest and, after it, the end."""
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    source.running["r"].token_ids[:] = tokens_after("hello", 20)

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        output.finish_reason = sequence_pb2.FINISH_REASON_LENGTH
        return [output]

    target.tamper = tamper
    await source.move("r", target)
    check_answer(await answer, "hello", 20)
    await mesh.nothing_left()


async def test_word_of_a_move_that_is_over_ends_it_at_its_target(mesh: Mesh) -> None:
    answer, source = await running(mesh, decodes=3)
    target, stale = others(mesh, source)
    target.pause_after = 9
    await source.move("r", target)
    await until(lambda: len(flight_of(mesh).stream.token_ids) == 9)
    for epoch in (1, 2):
        target.tell(target.word_of_move("r", epoch, stale))
    await until(lambda: stale.cancelled == [("r", 1), ("r", 2)])
    target.resume()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 0)
    await mesh.nothing_left()


async def test_a_move_of_a_cancelled_request_ends_at_its_target(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    outbox = source.running["r"].outbox
    assert outbox is not None
    await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=10)
    assert (await answer)[-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    await until(lambda: source.cancelled == [("r", 1)])
    outbox.put_nowait(source.word_of_move("r", 2, target))
    await until(lambda: target.cancelled == [("r", 2)])
    await mesh.nothing_left()


async def test_a_cancel_that_meets_word_of_a_move_goes_to_the_target(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    # In one turn of the loop: the request has heard of its move and has not acted on it.
    assert flight_of(mesh).moved(source.word_of_move("r", 2, target))
    assert mesh.process.router.cancel("r")
    await until(lambda: target.cancelled == [("r", 2)])
    assert (await answer)[-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    assert source.cancelled == target.attached == []
    await mesh.nothing_left()


async def test_an_end_that_meets_word_of_a_move_ends_it_at_the_target(mesh: Mesh) -> None:
    """The text has come to a stop string that the instances have not seen."""
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    flight = flight_of(mesh)
    assert flight.moved(source.word_of_move("r", 2, target))
    flight.end(FinishReason.STOP)
    assert (await answer)[-1].finish_reason == sequence_pb2.FINISH_REASON_STOP
    await until(lambda: target.cancelled == [("r", 2)])
    assert target.attached == []
    await mesh.nothing_left()


async def test_a_client_that_leaves_after_a_move_cancels_at_the_target(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 5
    call = mesh.generate(request_id="r")
    await until(lambda: any(decode.running for decode in mesh.decodes))
    source = next(decode for decode in mesh.decodes if decode.running)
    (target,) = others(mesh, source)
    await source.move("r", target)
    await until(lambda: target.attached)
    call.cancel()
    await until(lambda: target.cancelled == [("r", 2)])
    assert not target.running
    await mesh.nothing_left()


async def test_a_source_that_dies_before_it_tells_is_followed_by_the_ledgers_word(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    await source.move("r", target, tell=False)
    await source.kill()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 0)
    assert len(mesh.prefills[0].specs) == 1
    assert target.attached == [("r", 2, 5)]
    await mesh.nothing_left()


async def test_a_source_that_dies_after_it_has_told_does_not_matter(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    await source.move("r", target)
    await source.kill()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 0)
    await mesh.nothing_left()


async def test_a_move_that_the_ledger_does_not_know_is_recovered_from(mesh: Mesh) -> None:
    """Neither end could say who owns it: the target has given up."""
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    source.pause_after = None  # for the recovery
    await source.move("r", target, claim=False, arrive=False)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (0, 1)
    assert target.attached == [("r", 2, 5)]
    assert [(spec.epoch, len(spec.output_token_ids)) for spec in mesh.prefills[0].specs] == [(1, 0), (5, 5)]
    await mesh.nothing_left()


async def test_a_target_that_dies_before_its_router_comes_is_recovered_from(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    await target.kill()
    source.pause_after = None  # for the recovery
    await source.move("r", target, arrive=False)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 1)
    assert [(spec.epoch, len(spec.output_token_ids)) for spec in mesh.prefills[0].specs] == [(1, 0), (5, 5)]
    await mesh.nothing_left()


async def test_a_target_that_dies_later_is_recovered_from(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    target.pause_after = 9
    await source.move("r", target)
    await until(lambda: len(flight_of(mesh).stream.token_ids) == 9)
    source.resume()
    await target.kill()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 1)
    assert [(spec.epoch, len(spec.output_token_ids)) for spec in mesh.prefills[0].specs] == [(1, 0), (5, 9)]
    await mesh.nothing_left()


@pytest.mark.parametrize(
    "failure",
    [
        retry_later(grpc.StatusCode.UNAVAILABLE, "draining", 0.1),
        StatusError(grpc.StatusCode.ABORTED, "its engine failed"),
    ],
)
async def test_a_target_that_gives_a_sequence_up_is_recovered_from(mesh: Mesh, failure: StatusError) -> None:
    """Its first ticket was spent by the source: there is nothing to start another instance from."""
    answer, source = await running(mesh, pause_after=1)
    (target,) = others(mesh, source)

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        if output.epoch == 2:
            target.running.pop("r", None)
            output = sequence_pb2.SequenceOutput(
                request_id="r", epoch=2, offset=output.offset, failure=failure.to_sequence_status()
            )
        return [output]

    target.tamper = tamper
    source.resume()
    await source.move("r", target)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 1)
    assert [(spec.epoch, len(spec.output_token_ids)) for spec in mesh.prefills[0].specs] == [(1, 0), (5, 1)]
    await mesh.nothing_left()


async def test_without_a_ledger_a_lost_source_is_recovered_from_far_ahead(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    mesh.ledger.down = True
    await until(lambda: not mesh.process.watch.available)
    await source.kill()
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (0, 1)
    assert [spec.epoch for spec in target.specs] == [1 + 3 + OFFLINE_STEP]
    mesh.ledger.down = False


async def test_a_source_that_took_the_sequence_back_is_believed(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    await source.take_back("r")
    source.pause_after = 9
    source._resumed.set()
    await until(lambda: len(flight_of(mesh).stream.token_ids) == 9)
    assert mesh.process._owners._owned["r"] == Ownership(source.instance_id, 3)
    await mesh.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=10)
    assert (await answer)[-1].finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    await until(lambda: source.cancelled == [("r", 3)])
    assert not source.running
    await mesh.nothing_left()


async def test_a_sequence_moves_again_after_the_ledger_has_lost_its_entry(mesh: Mesh) -> None:
    answer, source = await running(mesh, owner_ttl_s=3.0)
    (target,) = others(mesh, source)
    mesh.ledger.restart_empty()
    await until(lambda: "r" in mesh.ledger._owners)
    assert await mesh.ledger.owner("r") == Ownership(source.instance_id, 1)
    await source.move("r", target)
    messages = await answer
    check_answer(messages, "hello", 20)
    assert counts(messages) == (1, 0)
    await mesh.nothing_left()


async def test_a_move_to_an_instance_that_no_view_has_shown_yet(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    newcomer = DecodePeer(mesh.ledger, "newcomer")
    async with newcomer:
        assert newcomer.membership is not None
        await newcomer.vanish()
        await mesh.ledger.deregister("newcomer", newcomer.info.incarnation)
        await until(lambda: mesh.process.watch.find("newcomer") is None)
        newcomer.pause_after = 9
        await source.move("r", newcomer)
        await until(lambda: len(flight_of(mesh).stream.token_ids) == 9)
        await mesh.ledger.register(newcomer.info, ttl_s=60)
        await until(lambda: mesh.process.watch.find("newcomer") is not None)
        # The same process, now by its full name: its stream stays.
        link = mesh.process.links.get(newcomer.info)
        assert (link.requests, newcomer.streams) == (1, 1)
        newcomer.resume()
        messages = await answer
        check_answer(messages, "hello", 20)
        assert counts(messages) == (1, 0)
        await mesh.nothing_left()


async def test_a_move_is_an_event_of_the_requests_span(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("starmesh.telemetry.setup._TRACER", provider.get_tracer("test"))
    answer, source = await running(mesh)
    (target,) = others(mesh, source)
    await source.move("r", target)
    await answer
    await mesh.nothing_left()
    (span,) = [span for span in exporter.get_finished_spans() if span.name == names.SPAN_GENERATE]
    (event,) = [event for event in span.events if event.name == names.EVENT_MOVED]
    assert dict(event.attributes or {}) == {
        names.SOURCE_INSTANCE: source.instance_id,
        names.TARGET_INSTANCE: target.instance_id,
        names.EPOCH: 2,
        names.OUTPUT_TOKENS: 5,
    }
    assert (span.attributes or {})[names.MIGRATIONS] == 1


@pytest.mark.parametrize("seed", range(3))
async def test_many_sequences_move_at_random(mesh: Mesh, seed: int) -> None:
    """Some sources do not tell before they die, some targets are not reached: no token twice, none missing."""
    draw = random.Random(seed)
    await mesh.start(decodes=4)
    answers = [
        asyncio.create_task(collect(mesh.generate(f"prompt {n}", tokens=250, request_id=f"r{n}"))) for n in range(12)
    ]
    moves = 0
    alive = list(mesh.decodes)
    while not all(answer.done() for answer in answers):
        await asyncio.sleep(0)
        source, target = draw.sample(alive, 2)
        listened = [request_id for request_id, at in source.running.items() if at.outbox is not None]
        if listened and draw.random() < 0.2:
            moves += 1
            await source.move(draw.choice(listened), target, arrive=draw.random() < 0.95)
        if moves == 30 and len(alive) == 4:
            alive.remove(source)
            for request_id in list(source.running):
                if source.running[request_id].outbox is not None and draw.random() < 0.5:
                    await source.move(request_id, target, tell=False)
            await source.kill()
    migrations = 0
    for number, answer in enumerate(answers):
        messages = await answer
        check_answer(messages, f"prompt {number}", 250)
        migrations += counts(messages)[0]
    print(f"seed {seed}: {moves} moves, {migrations} followed")
    assert migrations > 12
    await mesh.nothing_left()

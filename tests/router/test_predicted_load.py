"""Dispatch by predicted load on real connections: the predictor is asked after the first token, its answer may change
the decode instance, and whatever it does the client gets the same tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from services.router import predictions
from starmesh.ledger import ReservationRefused
from starmesh.rpc.status import StatusError, retry_later
from starmesh.types import RemainingEstimate, SequenceLoad
from starmesh.v1 import sequence_pb2
from tests.router.conftest import Mesh, check_answer, generate_request, until
from tests.router.decode_peer import DecodePeer
from tests.router.peers import HIDDEN_LAYOUT
from tests.router.predictor_peer import PredictorPeer

MATCHES_NOT = StatusError(grpc.StatusCode.FAILED_PRECONDITION, "other layers")
FLOODED = retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", 0.1)
SHORT = RemainingEstimate(0, 5, 9)


async def collect(call: Any) -> list[Any]:
    return [message async for message in call]


async def start(mesh: Mesh, *, decodes: int = 1, **settings: Any) -> None:
    """A router that has patience with predictors, and prefill instances that keep hidden states."""
    defaults: dict[str, Any] = {"dispatch_policy": "predicted_load", "predictor_timeout_s": 10.0}
    await mesh.start(decodes=decodes, **(defaults | settings))
    for prefill in mesh.prefills:
        prefill.hidden_state = b"\x01\x02"


async def add_predictor(mesh: Mesh) -> PredictorPeer:
    predictor = await mesh.add_predictor()
    await until(lambda: mesh.process.watch.find_predictor() is not None)
    return predictor


async def load_unevenly(mesh: Mesh) -> tuple[DecodePeer, DecodePeer]:
    """Two instances, of which the first is less loaded over 100 tokens, and the second over the next few."""
    ending, lasting = mesh.decodes
    ending.sequences["ends"] = SequenceLoad("ends", 1, 299, 1, 300, 500, 60, 60, 0)
    lasting.sequences["lasts"] = SequenceLoad("lasts", 1, 249, 1, 250, 500, 499, 499, 0)

    def seen() -> bool:
        loads = (view.load for view in mesh.process.watch.view.instances)
        return sum(len(load.sequences) for load in loads if load is not None) == 2

    await until(seen)
    return ending, lasting


async def test_the_first_token_does_not_wait_for_the_predictor(mesh: Mesh) -> None:
    await start(mesh)
    predictor = await add_predictor(mesh)
    predictor.gate.clear()
    messages = mesh.generate(request_id="r").__aiter__()
    first = await anext(messages)
    await until(lambda: predictor.asked)
    assert mesh.decodes[0].started == []
    predictor.gate.set()
    check_answer([first, *await collect(messages)], "hello", 20)
    (request,), (begun,) = predictor.asked, mesh.decodes[0].started
    assert request.instance_id == mesh.process.router._parts.settings.instance_id
    assert request.layout == HIDDEN_LAYOUT
    (sample,) = request.samples
    assert (sample.request_id, sample.prompt_tokens, sample.output_tokens) == ("r", 5, 0)
    assert sample.hidden_state == begun.hidden_state == b"\x01\x02"
    assert begun.hidden_layout == HIDDEN_LAYOUT
    assert begun.estimate == sequence_pb2.RemainingEstimate(
        output_tokens=0, remaining_tokens=5, remaining_tokens_upper=9
    )
    await mesh.nothing_left()


async def test_a_better_place_is_taken(mesh: Mesh) -> None:
    await start(mesh, decodes=2)
    ending, lasting = await load_unevenly(mesh)
    check_answer(await collect(mesh.generate(tokens=100)), "hello", 100)
    assert [len(peer.specs) for peer in (ending, lasting)] == [1, 0], "the first choice"
    predictor = await add_predictor(mesh)
    predictor.gate.clear()
    call = mesh.generate(tokens=100)
    await until(lambda: predictor.asked)
    reserved = {view.info.instance_id for view in (await mesh.ledger.view()).instances for _ in view.reservations}
    assert reserved == {"decode-0"}
    predictor.gate.set()
    check_answer(await collect(call), "hello", 100)
    assert [len(peer.specs) for peer in (ending, lasting)] == [1, 1], "the second choice"
    # Another owner, another epoch.
    assert [spec.epoch for spec in (mesh.prefills[0].specs[-1], lasting.specs[0])] == [1, 4]
    predictor.says = lambda sample: RemainingEstimate(sample.output_tokens, 90, 95)
    check_answer(await collect(mesh.generate(tokens=100)), "hello", 100)
    assert [len(peer.specs) for peer in (ending, lasting)] == [2, 1], "no gain"
    assert ending.specs[-1].epoch == 1
    await mesh.nothing_left()


async def test_a_place_that_is_refused_leaves_the_first(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    await start(mesh, decodes=2)
    ending, _ = await load_unevenly(mesh)
    await add_predictor(mesh)
    reserve = mesh.ledger.reserve
    refused = []

    async def full(request_id: str, instance_id: str, tokens: int, **limits: Any) -> None:
        if instance_id == "decode-1":
            refused.append(request_id)
            raise ReservationRefused(instance_id, "no room")
        await reserve(request_id, instance_id, tokens, **limits)

    monkeypatch.setattr(mesh.ledger, "reserve", full)
    check_answer(await collect(mesh.generate(tokens=100, request_id="r")), "hello", 100)
    assert refused == ["r"]
    assert [spec.epoch for spec in ending.specs] == [1]
    assert ending.started[0].HasField("estimate")
    await mesh.nothing_left()


async def test_a_better_place_needs_no_ledger(mesh: Mesh) -> None:
    await start(mesh, decodes=2)
    _, lasting = await load_unevenly(mesh)
    predictor = await add_predictor(mesh)
    predictor.gate.clear()
    call = mesh.generate(tokens=100)
    await until(lambda: predictor.asked)
    mesh.ledger.down = True
    await until(lambda: not mesh.process.watch.available)
    predictor.gate.set()
    check_answer(await collect(call), "hello", 100)
    assert len(lasting.specs) == 1
    assert mesh.process.dispatcher._reservations._places == {}


async def test_a_late_predictor_is_not_waited_for(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "_REST_S", 600.0)
    await start(mesh, predictor_timeout_s=1.0)
    predictor = await add_predictor(mesh)
    predictor.gate.clear()
    for _ in range(3):
        check_answer(await collect(mesh.generate()), "hello", 20)
    # The others knew.
    assert len(predictor.asked) == 1
    assert not any(begun.HasField("estimate") for begun in mesh.decodes[0].started)
    # Another in its place is asked at once.
    await predictor.kill()
    await mesh.ledger.deregister(predictor.instance_id, predictor.info.incarnation)
    successor = await mesh.add_predictor(instance_id="predictor-0")
    await until(lambda: mesh.process.watch.find_predictor() == successor.info)
    check_answer(await collect(mesh.generate()), "hello", 20)
    await until(lambda: len(successor.asked) == 1)
    await mesh.nothing_left()


@pytest.mark.parametrize("refusal", [MATCHES_NOT, FLOODED])
async def test_a_predictor_that_refuses_is_asked_again_after_a_rest(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, refusal: StatusError, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predictions, "_REST_S", 0.0)
    await start(mesh)
    predictor = await add_predictor(mesh)
    predictor.script += [refusal, refusal]
    caplog.set_level("INFO", logger="services.router.predictions")
    for _ in range(4):
        check_answer(await collect(mesh.generate()), "hello", 20)
    assert [begun.HasField("estimate") for begun in mesh.decodes[0].started] == [False, False, True, True]
    # Once for each change.
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    await mesh.nothing_left()


@pytest.mark.parametrize("says", [None, RemainingEstimate(7, 5, 9)])
async def test_an_answer_without_the_sample_is_none(mesh: Mesh, says: RemainingEstimate | None) -> None:
    await start(mesh)
    predictor = await add_predictor(mesh)
    predictor.says = lambda sample: says
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert not mesh.decodes[0].started[0].HasField("estimate")
    predictor.says = lambda sample: SHORT
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert mesh.decodes[0].started[1].HasField("estimate"), "it did not fail"


async def test_a_predictor_that_is_gone_or_never_was(mesh: Mesh) -> None:
    await start(mesh)
    check_answer(await collect(mesh.generate()), "hello", 20)
    predictor = await add_predictor(mesh)
    await predictor.kill()
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert [begun.hidden_state for begun in mesh.decodes[0].started] == [b"\x01\x02"] * 2
    await mesh.nothing_left()


async def test_who_is_not_asked(mesh: Mesh) -> None:
    await start(mesh)
    predictor = await add_predictor(mesh)
    endless = generate_request()
    endless.sampling.ignore_eos = True
    check_answer(await collect(mesh.inference.Generate(endless, timeout=20)), "hello", 20)
    check_answer(await collect(mesh.generate(tokens=1)), "hello", 1)
    mesh.prefills[0].hidden_state = b""
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert predictor.asked == []


async def test_other_policies_pass_the_hidden_state_on_and_ask_nobody(mesh: Mesh) -> None:
    await start(mesh, dispatch_policy="least_tokens")
    predictor = await add_predictor(mesh)
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert predictor.asked == []
    (begun,) = mesh.decodes[0].started
    assert begun.hidden_state == b"\x01\x02"
    assert not begun.HasField("estimate")


async def test_a_client_that_leaves_meanwhile_leaves_nothing(mesh: Mesh) -> None:
    await start(mesh, decodes=2)
    predictor = await add_predictor(mesh)
    predictor.gate.clear()
    call = mesh.generate(request_id="r")
    await call.read()
    await until(lambda: predictor.asked)
    call.cancel()
    await until(lambda: mesh.prefills[0].released == ["r/1"])
    await mesh.nothing_left()
    assert mesh.decodes[0].started == mesh.decodes[1].started == []


async def test_a_client_that_leaves_while_the_place_changes_leaves_nothing(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(mesh, decodes=2)
    await load_unevenly(mesh)
    await add_predictor(mesh)
    release, hanging = mesh.ledger.release, asyncio.Event()

    async def hang_once(request_id: str, instance_id: str) -> None:
        if not hanging.is_set():
            hanging.set()
            await asyncio.Event().wait()
        await release(request_id, instance_id)

    monkeypatch.setattr(mesh.ledger, "release", hang_once)
    call = mesh.generate(tokens=100)
    await hanging.wait()
    assert len(await mesh.ledger.reservations()) == 2
    call.cancel()
    await mesh.nothing_left()


async def test_a_recovered_sequence_is_predicted_from_where_it_is(mesh: Mesh) -> None:
    await start(mesh, decodes=2)
    predictor = await add_predictor(mesh)
    for decode in mesh.decodes:
        decode.pause_after = 9
    call = mesh.generate()
    await until(lambda: mesh.process.router._entries)
    flight = next(iter(mesh.process.router._entries.values())).flight
    await until(lambda: len(flight.stream.token_ids) == 9)
    died = next(peer for peer in mesh.decodes if peer.running)
    for decode in mesh.decodes:
        if decode is not died:
            decode.resume()
    await died.kill()
    messages = await collect(call)
    check_answer(messages, "hello", 20)
    assert messages[-1].usage.recoveries == 1
    samples = [request.samples[0] for request in predictor.asked]
    prefilled = [len(spec.output_token_ids) for spec in mesh.prefills[0].specs]
    assert [sample.output_tokens for sample in samples] == prefilled == [0, 9]
    assert [sample.prompt_tokens for sample in samples] == [5, 5]
    await mesh.nothing_left()

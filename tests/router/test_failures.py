"""Instances that refuse, die, hang and lie; a ledger that is down: the client gets the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from starmesh.rpc.status import StatusError, from_rpc_error, retry_later
from starmesh.types import InstanceState, Ownership, Role
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.router.conftest import Mesh, check_answer, generate_request, until
from tests.router.peers import EOS

FULL = retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "no blocks", 0.1)
DRAINING = retry_later(grpc.StatusCode.UNAVAILABLE, "draining", 0.1)
NO_KV = StatusError(grpc.StatusCode.ABORTED, "could not pull")
OTHER_LAYOUT = StatusError(grpc.StatusCode.FAILED_PRECONDITION, "layouts differ")


async def collect(
    call: grpc.aio.UnaryStreamCall[Any, inference_pb2.GenerateResponse],
) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in call]


@pytest.mark.parametrize("refusal", [FULL, DRAINING])
async def test_a_decode_refusal_takes_the_ticket_elsewhere(mesh: Mesh, refusal: StatusError) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.script.append(refusal)
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert len(mesh.prefills[0].specs) == 1
    epochs = [spec.epoch for decode in mesh.decodes for spec in decode.specs]
    assert sorted(epochs) == [1, 4, 7]
    await mesh.nothing_left()


async def test_blocks_that_nobody_pulled_are_given_back(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].script += [FULL] * 100
    call = mesh.generate(request_id="r")
    await until(lambda: mesh.decodes[0].specs)
    call.cancel()
    await until(lambda: mesh.prefills[0].released == ["r/1"])
    mesh.decodes[0].script.clear()
    check_answer(await collect(mesh.generate()), "hello", 20)
    await mesh.nothing_left()
    assert mesh.prefills[0].released == ["r/1"]


async def test_a_ticket_that_ran_out_is_prefilled_again(mesh: Mesh) -> None:
    await mesh.start()
    mesh.prefills[0].lease_s = 0.01
    mesh.decodes[0].script.append(FULL)
    check_answer(await collect(mesh.generate()), "hello", 20)
    assert [len(spec.output_token_ids) for spec in mesh.prefills[0].specs] == [0, 1]


@pytest.mark.parametrize("refusal", [NO_KV, OTHER_LAYOUT])
async def test_kv_that_cannot_be_had_is_prefilled_again(mesh: Mesh, refusal: StatusError) -> None:
    await mesh.start(prefills=2)
    mesh.decodes[0].script += [refusal, refusal]
    messages = await collect(mesh.generate())
    check_answer(messages, "hello", 20)
    specs = [spec for prefill in mesh.prefills for spec in prefill.specs]
    assert sorted((spec.epoch, len(spec.output_token_ids)) for spec in specs) == [(1, 0), (4, 1), (7, 2)]
    assert messages[-1].usage.recoveries == 0  # nobody died
    await mesh.nothing_left()


async def test_a_prefill_refusal_goes_elsewhere(mesh: Mesh) -> None:
    await mesh.start(prefills=2)
    for prefill in mesh.prefills:
        prefill.script += [FULL, DRAINING]
    check_answer(await collect(mesh.generate()), "hello", 20)
    await mesh.nothing_left()


async def test_failures_without_end_end_the_request(mesh: Mesh) -> None:
    await mesh.start(max_recoveries=2)
    mesh.prefills[0].script += [NO_KV] * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(mesh.generate())
    status = from_rpc_error(caught.value)
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert status.retry_delay_s is not None
    await mesh.nothing_left()


async def test_a_decode_instance_that_dies_is_survived_by_all_its_streams(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 8
    calls = [asyncio.create_task(collect(mesh.generate(f"prompt {number}"))) for number in range(16)]
    await until(lambda: sum(len(decode.sequences) for decode in mesh.decodes) == 16)
    doomed, heir = mesh.decodes
    lost = len(doomed.sequences)
    assert 0 < lost < 16
    await doomed.kill()
    heir.resume()
    recoveries = 0
    for number, call in enumerate(calls):
        messages = await call
        check_answer(messages, f"prompt {number}", 20)
        recoveries += messages[-1].usage.recoveries
    assert recoveries == lost
    await mesh.nothing_left()


async def test_the_only_decode_instance_dies_and_another_comes(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.process.router._entries)
    flight = next(iter(mesh.process.router._entries.values())).flight
    # All that comes before the pause: what it goes on from, with one more from its second prefill.
    await until(lambda: len(flight.stream.token_ids) == 5)
    await mesh.decodes[0].kill()
    await until(lambda: mesh.process.dispatcher.queued_requests == 1)
    await mesh.add_decode()
    messages = await call
    check_answer(messages, "hello", 20)
    assert messages[-1].usage.recoveries == 1
    spec = mesh.decodes[1].specs[0]
    assert (spec.epoch, len(spec.output_token_ids)) == (4, 6)
    await mesh.nothing_left()


async def test_a_decode_instance_that_hangs_is_given_up_with_its_lease(mesh: Mesh) -> None:
    await mesh.start(lease_ttl_s=0.3)
    mesh.decodes[0].pause_after = 5
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.decodes[0].sequences)
    await mesh.decodes[0].vanish()
    await mesh.add_decode()
    check_answer(await call, "hello", 20)
    await mesh.nothing_left()


async def test_a_prefill_instance_that_dies_is_replaced(mesh: Mesh) -> None:
    await mesh.start(prefills=2)
    for prefill in mesh.prefills:
        prefill.gate.clear()
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: any(prefill.specs for prefill in mesh.prefills))
    doomed, heir = sorted(mesh.prefills, key=lambda prefill: not prefill.specs)
    heir.gate.set()
    await doomed.kill()
    messages = await call
    check_answer(messages, "hello", 20)
    assert messages[-1].usage.recoveries == 1
    await mesh.nothing_left()


async def test_a_prefill_instance_that_hangs_is_given_up_with_its_lease(mesh: Mesh) -> None:
    await mesh.start()
    mesh.prefills[0].gate.clear()
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.prefills[0].specs)
    await mesh.prefills[0].vanish()
    await mesh.add_prefill()
    check_answer(await call, "hello", 20)
    await mesh.nothing_left()


async def test_tokens_that_come_twice_late_or_with_holes_do_no_harm(mesh: Mesh) -> None:
    await mesh.start()
    sent: list[sequence_pb2.SequenceOutput] = []

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        if output.offset == 7 and output.epoch == 1:
            return []
        sent.append(output)
        stale = sequence_pb2.SequenceOutput()
        stale.CopyFrom(output)
        stale.epoch = 0
        stale.token_ids[:] = [1]
        return [stale, *sent[-2:], output]

    mesh.decodes[0].tamper = tamper
    messages = await collect(mesh.generate(request_id="odd"))
    check_answer(messages, "hello", 20)
    assert ("odd", 1) in mesh.decodes[0].cancelled  # the owner of the stream with a hole
    assert [len(spec.output_token_ids) for spec in mesh.prefills[0].specs] == [0, 7]
    await mesh.nothing_left()


async def test_an_end_that_the_tokens_imply_needs_no_word_of_it(mesh: Mesh) -> None:
    await mesh.start()

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        output.finish_reason = sequence_pb2.FINISH_REASON_UNSPECIFIED
        return [output]

    mesh.decodes[0].tamper = tamper
    check_answer(await collect(mesh.generate(request_id="r")), "hello", 20)
    await until(lambda: mesh.decodes[0].cancelled == [("r", 1)])  # the instance seems not to know
    await mesh.nothing_left()


async def test_an_instance_that_dies_after_the_last_token_is_not_recovered_from(mesh: Mesh) -> None:
    """The end-of-sequence token came, the word of the end did not."""
    await mesh.start()

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        if output.offset == 5:
            output.token_ids[:] = [EOS]
        return [output] if output.offset <= 5 else []

    mesh.decodes[0].tamper = tamper
    mesh.decodes[0].pause_after = 6
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.process.router._entries)
    flight = next(iter(mesh.process.router._entries.values())).flight
    await until(lambda: len(flight.stream.token_ids) == 6)
    await mesh.decodes[0].kill()
    messages = await call
    assert messages[-1].finish_reason == sequence_pb2.FINISH_REASON_STOP
    assert messages[-1].usage.recoveries == 0
    assert len(mesh.prefills[0].specs) == 1
    await mesh.nothing_left()


async def test_an_instance_that_cancels_by_itself_is_survived(mesh: Mesh) -> None:
    await mesh.start()

    def tamper(output: sequence_pb2.SequenceOutput) -> list[sequence_pb2.SequenceOutput]:
        if output.epoch == 1 and output.offset >= 4:
            return [
                sequence_pb2.SequenceOutput(
                    request_id=output.request_id,
                    epoch=1,
                    offset=4,
                    finish_reason=sequence_pb2.FINISH_REASON_CANCELLED,
                )
            ]
        return [output]

    mesh.decodes[0].tamper = tamper
    check_answer(await collect(mesh.generate()), "hello", 20)
    await mesh.nothing_left()


async def test_streams_and_new_requests_go_on_without_a_ledger(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    for decode in mesh.decodes:
        decode.pause_after = 5
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: any(decode.sequences for decode in mesh.decodes))
    mesh.ledger.down = True
    await until(lambda: not mesh.process.watch.available)
    for decode in mesh.decodes:
        decode.pause_after = None  # for new sequences; the old one waits
    mesh.prefills[0].gate.clear()  # none ends before all have their places
    calls = [asyncio.create_task(collect(mesh.generate(f"new {number}"))) for number in range(8)]
    await until(lambda: len(mesh.prefills[0].specs) == 9)
    mesh.prefills[0].gate.set()
    for number, messages in enumerate(await asyncio.gather(*calls)):
        check_answer(messages, f"new {number}", 20)
    # By local counts, both had a share.
    assert all(len(decode.specs) >= 3 for decode in mesh.decodes)
    holder = next(decode for decode in mesh.decodes if decode.sequences)
    await holder.kill()
    messages = await call
    check_answer(messages, "hello", 20)
    assert messages[-1].usage.recoveries == 1
    mesh.ledger.down = False
    await until(lambda: mesh.process.watch.available)


async def test_a_ledger_that_restarts_empty_disturbs_nothing(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    call = asyncio.create_task(collect(mesh.generate(request_id="old")))
    await until(lambda: mesh.decodes[0].sequences)
    mesh.ledger.restart_empty()
    check_answer(await collect(mesh.generate("other", tokens=4)), "other", 4)
    assert not call.done()
    assert mesh.decodes[0].streams == 1
    await mesh.decodes[0].kill()
    await mesh.add_decode()
    check_answer(await call, "hello", 20)
    await mesh.nothing_left()


async def test_the_owner_is_in_the_ledger_while_it_runs(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    call = mesh.generate(request_id="mine")
    await until(lambda: mesh.decodes[0].sequences)
    assert await mesh.ledger.owner("mine") == Ownership("decode-0", 1)
    call.cancel()
    await mesh.nothing_left()


async def test_no_instance_is_unavailable_with_a_delay(mesh: Mesh) -> None:
    await mesh.start(prefills=1, decodes=0, absent_timeout_s=0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(mesh.generate())
    status = from_rpc_error(caught.value)
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert status.retry_delay_s is not None
    await mesh.nothing_left()


async def test_a_full_cluster_queues_and_then_refuses(mesh: Mesh) -> None:
    await mesh.start(queue_length=2, queue_timeout_s=2, reserve_output_tokens=16)
    decode = mesh.decodes[0]
    decode.free_blocks = 0
    await until(lambda: _full(mesh))
    waiting = [asyncio.create_task(collect(mesh.generate())) for _ in range(2)]
    await until(lambda: mesh.process.dispatcher.queued_requests == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(mesh.generate())
    status = from_rpc_error(caught.value)
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.retry_delay_s is not None
    for call in waiting:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        status = from_rpc_error(caught.value)
        assert (status.code, status.retry_delay_s is None) == (grpc.StatusCode.RESOURCE_EXHAUSTED, False)
    await mesh.nothing_left()
    late = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.process.dispatcher.queued_requests == 1)
    decode.free_blocks = 1024
    check_answer(await late, "hello", 20)
    await mesh.nothing_left()


def _full(mesh: Mesh) -> bool:
    """Whether the router has seen the decode instance report that nothing is free."""
    reported = [item.load for item in mesh.process.watch.view.of_role(Role.DECODE) if item.load is not None]
    return any(load.free_blocks == 0 for load in reported)


async def test_requests_in_flight_are_bounded(mesh: Mesh) -> None:
    await mesh.start(max_requests=2)
    mesh.decodes[0].pause_after = 3
    calls = [mesh.generate() for _ in range(2)]
    await until(lambda: mesh.process.router.active_requests == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(mesh.generate())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    await mesh.nothing_left()


async def test_a_draining_instance_gets_nothing_new(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    await mesh.decodes[0].drain()
    await until(lambda: any(item.info.state is InstanceState.DRAINING for item in mesh.process.watch.view.instances))
    for _ in range(4):
        check_answer(await collect(mesh.generate()), "hello", 20)
    assert mesh.decodes[0].specs == []


async def test_a_router_that_stops_lets_streams_end_and_takes_no_more(mesh: Mesh) -> None:
    await mesh.start(grace_s=20)
    mesh.decodes[0].pause_after = 5
    call = asyncio.create_task(collect(mesh.generate()))
    await until(lambda: mesh.decodes[0].sequences)
    mesh.process.router.stopping.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(mesh.generate())
    status = from_rpc_error(caught.value)
    assert (status.code, status.retry_delay_s is None) == (grpc.StatusCode.UNAVAILABLE, False)
    leaving = asyncio.create_task(mesh.process.__aexit__(None, None, None))
    mesh.decodes[0].pause_after = None
    await mesh.decodes[0].kill()
    await mesh.add_decode()
    check_answer(await call, "hello", 20)
    await leaving


async def test_a_grace_that_runs_out_cuts_streams_with_a_status(mesh: Mesh) -> None:
    await mesh.start(grace_s=0.1)
    mesh.decodes[0].pause_after = 5
    call = asyncio.create_task(collect(mesh.inference.Generate(generate_request(request_id="cut"), timeout=20)))
    await until(lambda: mesh.decodes[0].sequences)
    await mesh.process.__aexit__(None, None, None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await until(lambda: mesh.decodes[0].cancelled == [("cut", 1)])

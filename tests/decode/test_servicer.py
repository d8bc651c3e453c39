"""The Decode stream on a socket: a router that is gone leaves nothing, wherever the stream stood."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest

from services.decode.servicer import DecodeServicer
from services.decode.worker import DecodeWorker
from services.prefill.servicer import PrefillServicer
from services.prefill.worker import PrefillWorker
from starmesh.clock import WallClock
from starmesh.instance.instance import Instance
from starmesh.ledger.memory import MemoryLedger
from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.rpc.status import from_rpc_error
from starmesh.types import Role
from starmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, sequence_pb2
from tests.instance.running import PATIENCE_S, Running, running_instance, spec, until


def serving_prefill(instance: Instance) -> PrefillWorker:
    worker = PrefillWorker(instance)
    servicer = PrefillServicer(worker, instance.instance_id)
    name = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
    instance.server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, name)
    return worker


def serving_decode(instance: Instance) -> DecodeWorker:
    worker = DecodeWorker(instance)
    servicer = DecodeServicer(worker, max_timeout_s=60.0)
    name = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
    instance.server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, name)
    return worker


def address(running: Running) -> str:
    return running.instance.membership.info.address


async def _read_one(call: grpc.aio.StreamStreamCall) -> None:
    assert (await call.read()).outputs


async def _nothing_runs(decode: Running) -> bool:
    return not decode.worker._running and not decode.worker._freeing


async def _read_nothing(call: grpc.aio.StreamStreamCall) -> None:
    """The stream's window fills up: the instance's write waits."""


@pytest.mark.parametrize("read", [_read_one, _read_nothing])
@pytest.mark.parametrize("end", ["cancel", "half-close"])
async def test_the_end_of_a_stream_frees_all_that_ran_on_it(
    read: Callable[[grpc.aio.StreamStreamCall], object], end: str
) -> None:
    ledger = MemoryLedger(WallClock())
    async with (
        running_instance(Role.PREFILL, ledger, serving_prefill) as prefill,
        running_instance(Role.DECODE, ledger, serving_decode) as decode,
        open_channel(address(prefill)) as to_prefill,
        open_channel(address(decode)) as to_decode,
    ):
        call = decode_pb2_grpc.DecodeServiceStub(to_decode).Decode()
        for name in "abcd":
            sequence = convert.spec_pb(spec(name, limit=60))
            request = prefill_pb2.PrefillRequest(sequence=sequence, model_revision="checking")
            done = await prefill_pb2_grpc.PrefillServiceStub(to_prefill).Prefill(request, timeout=PATIENCE_S)
            sequence.output_token_ids.append(done.token_id)
            start = decode_pb2.StartSequence(sequence=sequence, ticket=done.ticket)
            await call.write(decode_pb2.DecodeRequest(start=start))
        await read(call)  # type: ignore[misc]
        if end == "cancel":
            call.cancel()
        else:
            await call.done_writing()
            while await call.read():
                pass
        await until(lambda: _nothing_runs(decode))
        await decode.nothing_left()
        for name in "abcd":  # what was cut before its pull
            prefill.instance.revoke_lease(name, 1)
            await prefill.instance.engine.call(lambda core, name=name: core.cancel(name))
        await prefill.nothing_left()


@pytest.mark.parametrize(
    ("sequence", "code", "field"),
    [
        (sequence_pb2.SequenceSpec(request_id="a"), grpc.StatusCode.INVALID_ARGUMENT, "sequence.epoch"),
        (convert.spec_pb(spec(prompt=999)), grpc.StatusCode.INVALID_ARGUMENT, "sequence.prompt_token_ids"),
    ],
)
async def test_a_prefill_that_cannot_be_names_the_field(
    sequence: sequence_pb2.SequenceSpec, code: grpc.StatusCode, field: str
) -> None:
    async with (
        running_instance(Role.PREFILL, MemoryLedger(WallClock()), serving_prefill) as prefill,
        open_channel(address(prefill)) as channel,
    ):
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Prefill(prefill_pb2.PrefillRequest(sequence=sequence), timeout=PATIENCE_S)
        status = from_rpc_error(caught.value)
        assert (status.code, status.fields) == (code, [field])
        await prefill.nothing_left()


async def test_a_cancelled_prefill_call_frees_everything() -> None:
    """Also when the cancel crosses the response: then nobody has the ticket, and the end of the lease frees."""
    async with (
        running_instance(Role.PREFILL, MemoryLedger(WallClock()), serving_prefill, kv_lease_s=1.0) as prefill,
        open_channel(address(prefill)) as channel,
    ):
        request = prefill_pb2.PrefillRequest(sequence=convert.spec_pb(spec(prompt=200, limit=30)))
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=PATIENCE_S)
        while not prefill.worker._waiting and not call.done():
            await asyncio.sleep(0)
        call.cancel()
        await prefill.nothing_left()

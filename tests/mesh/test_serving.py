"""The mesh serves: real processes, real sockets, a real model."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import cluster_pb2, inference_pb2, sequence_pb2
from tests.mesh.processes import Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.streams import generate, generate_all, request


async def test_a_mesh_on_a_tiny_model(tiny_mesh: Mesh) -> None:
    """One mesh, many questions: starting it takes longer than all of them."""
    await _sixteen_streams_agree_with_themselves(tiny_mesh)
    await _cancel_frees_blocks(tiny_mesh)
    await _a_client_that_goes_away_frees_blocks(tiny_mesh)
    await _a_deadline_ends_a_stream(tiny_mesh)
    await _every_service_has_health_and_reflection(tiny_mesh)
    await _the_ledger_restarts_empty(tiny_mesh)
    await _a_drain_lets_streams_finish(tiny_mesh)


async def _sixteen_streams_agree_with_themselves(mesh: Mesh) -> None:
    """Sampled answers depend on seed and position only: the second time, batched otherwise, they are the same."""
    stub = mesh.inference()
    messages = [
        request(prompt, temperature=1.0, seed=index, max_output_tokens=40, ignore_eos=True)
        for index, prompt in enumerate(PROMPTS)
    ]
    together = await generate_all(stub, messages)
    alone = [await generate(stub, message) for message in messages[:4]]
    assert [answer.token_ids for answer in together[:4]] == [answer.token_ids for answer in alone]
    assert all(len(answer.token_ids) == 40 for answer in together)

    async def all_used() -> bool:
        used = {instance.instance_id for instance in await mesh.instances() if instance.load.output_tokens}
        return {"prefill-0", "decode-0", "decode-1"} <= used

    await until(all_used, "reports of tokens by all instances")
    decode = await mesh.instance("decode-0")
    assert decode.instance.load.transfer_bytes > 0
    assert decode.instance.load.transfer_backend == sequence_pb2.TRANSFER_BACKEND_NIXL
    await mesh.settled()


async def _cancel_frees_blocks(mesh: Mesh) -> None:
    stub = mesh.inference()
    message = request("Count.", max_output_tokens=1500, ignore_eos=True)
    message.request_id = "to-cancel"
    started = asyncio.Event()
    running = asyncio.create_task(generate(stub, message, on_token=lambda tokens: started.set()))
    await asyncio.wait_for(started.wait(), 120)
    await stub.Cancel(inference_pb2.CancelRequest(request_id="to-cancel"), timeout=10)
    answer = await asyncio.wait_for(running, 120)
    assert answer.finish_reason == sequence_pb2.FINISH_REASON_CANCELLED
    await mesh.settled()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(inference_pb2.CancelRequest(request_id="to-cancel"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def _a_client_that_goes_away_frees_blocks(mesh: Mesh) -> None:
    call = mesh.inference().Generate(request("Count.", max_output_tokens=1500, ignore_eos=True), timeout=60)
    assert (await call.read()).token_ids
    call.cancel()
    await mesh.settled()


async def _a_deadline_ends_a_stream(mesh: Mesh) -> None:
    call = mesh.inference().Generate(request("Count.", max_output_tokens=1900, ignore_eos=True), timeout=0.7)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await mesh.settled()


async def _every_service_has_health_and_reflection(mesh: Mesh) -> None:
    for name in mesh.services:
        channel = mesh.channel(name)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING, name
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=10)
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = [service.name for service in (await reflection.read()).list_services_response.service]
        assert any(service.startswith("starmesh.v1.") for service in services), name
        await reflection.done_writing()


async def _the_ledger_restarts_empty(mesh: Mesh) -> None:
    """Redis dies under a stream: the stream goes on, new requests too, and the ledger is rebuilt when it is back."""
    stub = mesh.inference()
    message = request("Count.", max_output_tokens=400, ignore_eos=True)
    expected = await generate(stub, message)
    started = asyncio.Event()
    running = asyncio.create_task(generate(stub, message, on_token=lambda tokens: started.set()))
    await asyncio.wait_for(started.wait(), 120)
    await mesh.kill_ledger()
    response = await mesh.cluster().ListInstances(cluster_pb2.ListInstancesRequest(), timeout=10)
    assert response.instances, "the last view is what there is"
    assert (await generate(stub, message)).token_ids == expected.token_ids
    assert (await running).token_ids == expected.token_ids
    await mesh.restart_ledger()
    await mesh.all_seen(4)
    assert (await generate(stub, message)).token_ids == expected.token_ids
    await mesh.settled()


async def _a_drain_lets_streams_finish(mesh: Mesh) -> None:
    stub = mesh.inference()
    messages = [request(prompt, max_output_tokens=300, ignore_eos=True) for prompt in PROMPTS[:8]]
    started = asyncio.Event()
    running = asyncio.create_task(
        generate_all(stub, messages, on_token=lambda tokens: started.set() if tokens > 80 else None)
    )
    await asyncio.wait_for(started.wait(), 120)
    await mesh.cluster().Drain(cluster_pb2.DrainRequest(instance_id="decode-0"), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.cluster().Drain(cluster_pb2.DrainRequest(instance_id="decode-9"), timeout=10)
    assert from_rpc_error(caught.value).code is grpc.StatusCode.NOT_FOUND
    answers = await running
    assert all(len(answer.token_ids) == 300 and answer.usage.recoveries == 0 for answer in answers if answer.usage)

    async def drained() -> bool:
        states = {instance.instance_id: instance.state for instance in await mesh.instances()}
        return states["decode-0"] == cluster_pb2.INSTANCE_STATE_DRAINED

    await until(drained, "decode-0 to report DRAINED")
    before = (await mesh.instance("decode-0")).instance.load.output_tokens
    await generate_all(stub, messages[:4])
    assert (await mesh.instance("decode-0")).instance.load.output_tokens == before, "a drained instance got work"
    mesh.services["decode-0"].terminate()
    assert await asyncio.wait_for(mesh.services["decode-0"].process.wait(), 120) == 0
    await mesh.all_seen(3)

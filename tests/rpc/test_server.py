"""A real server: errors as statuses, malformed requests, limits, health, reflection, plaintext only on loopback."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from starmesh.rpc.channels import ChannelPool
from starmesh.rpc.server import PlaintextRefused, RpcServer
from starmesh.rpc.status import StatusError, bad_field, from_rpc_error, retry_later
from starmesh.v1 import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
SECRET = "the client's secret prompt"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Fails in the way that the request asks for."""

    async def Cancel(self, request, context):  # noqa: N802
        if request.request_id == "bad":
            raise bad_field("request_id", "is bad")
        if request.request_id == "busy":
            raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", 1.5)
        if request.request_id == "crash":
            raise ValueError(SECRET)
        return inference_pb2.CancelResponse()

    async def Generate(self, request, context):  # noqa: N802
        yield inference_pb2.GenerateResponse(text="one")
        raise bad_field("text", "failed in the middle")

    async def GenerateMany(self, request_iterator, context):  # noqa: N802
        async for _ in request_iterator:
            yield inference_pb2.GenerateManyResponse()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer(listen="127.0.0.1:0")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Servicer(), SERVICE)
    yield await server.start()
    await server.stop(0)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    pool = ChannelPool()
    yield pool.get(address)
    await pool.close()


async def failure(call: grpc.aio.Call) -> StatusError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_status_error_reaches_the_client_with_its_details(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    error = await failure(stub.Cancel(inference_pb2.CancelRequest(request_id="bad"), timeout=20))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])
    error = await failure(stub.Cancel(inference_pb2.CancelRequest(request_id="busy"), timeout=20))
    assert (error.code, error.retry_delay_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.5)


async def test_a_crash_leaks_nothing_and_is_logged(channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with caplog.at_level(logging.ERROR):
        error = await failure(stub.Cancel(inference_pb2.CancelRequest(request_id="crash"), timeout=20))
    assert error.code is grpc.StatusCode.INTERNAL
    assert SECRET not in error.message
    reference = error.message.split()[-1]
    assert any(reference in record.getMessage() for record in caplog.records)


async def test_a_stream_that_fails_in_the_middle_ends_with_its_status(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(inference_pb2.GenerateRequest(), timeout=20)
    texts = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in call:
            texts += [response.text]
    assert texts == ["one"]
    assert from_rpc_error(caught.value).fields == ["text"]


@pytest.mark.parametrize(
    ("wire", "field"),
    [
        (inference_pb2.CancelRequest(request_id="abcd").SerializeToString().replace(b"bc", b"\xff\xfe"), "request_id"),
        (b"\xff\xff\xff", ""),
    ],
)
async def test_a_malformed_request_names_the_field(channel: grpc.aio.Channel, wire: bytes, field: str) -> None:
    error = await failure(channel.unary_unary(f"/{SERVICE}/Cancel")(wire, timeout=20))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_a_malformed_message_on_a_stream_names_the_field(channel: grpc.aio.Channel) -> None:
    message = inference_pb2.GenerateManyRequest(cancel_request_id="abcd").SerializeToString()
    call = channel.stream_stream(f"/{SERVICE}/GenerateMany")(timeout=20)
    await call.write(message)
    assert await call.read() == b""
    await call.write(message.replace(b"bc", b"\xff\xfe"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).fields == ["cancel_request_id"]


async def test_a_huge_message_is_refused_and_the_server_goes_on(channel: grpc.aio.Channel, address: str) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as big:
        call = inference_pb2_grpc.InferenceServiceStub(big).Cancel(
            inference_pb2.CancelRequest(request_id="x" * 100_000_000), timeout=60
        )
        error = await failure(call)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await stub.Cancel(inference_pb2.CancelRequest(request_id="fine"), timeout=20)


async def test_health_and_reflection() -> None:
    server = RpcServer(listen="127.0.0.1:0")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Servicer(), SERVICE)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            response = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        response = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=20)
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = {service.name for service in (await reflection.read()).list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= services
        await reflection.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        files = (await reflection.read()).file_descriptor_response.file_descriptor_proto
        assert files
        await reflection.done_writing()
    await server.stop(0)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "example.org:0"])
def test_plaintext_beyond_loopback_must_be_asked_for(listen: str) -> None:
    with pytest.raises(PlaintextRefused, match="--allow-plaintext"):
        RpcServer(listen=listen)


async def test_a_taken_port_is_refused() -> None:
    first = RpcServer(listen="127.0.0.1:0")
    address = await first.start()
    second = RpcServer(listen=address)
    with pytest.raises(OSError, match="another process"):
        await second.start()
    await second.stop(0)
    await first.stop(0)

"""Every RPC that the protos define, tried with whatever credentials: a new one cannot be forgotten.

Messages are bytes here, empty ones unless a test says otherwise: who is refused is refused whatever he sends.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import starmesh.v1

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
TIMEOUT_S = 20.0
_TRIES = 10
_WRITTEN_TOO_LATE = "SendMessageOperation"
"""grpc.aio's client says INTERNAL with this, and loses the status, where a server refuses a stream that the client is
just writing to."""


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method."""

    service: str
    method: str
    streams_in: bool
    streams_out: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.method}"


def _rpcs_of(service: ServiceDescriptor) -> list[Rpc]:
    return [
        Rpc(service.full_name, method.name, method.client_streaming, method.server_streaming)
        for method in service.methods
    ]


def _services() -> dict[str, list[Rpc]]:
    modules = [
        importlib.import_module(f"starmesh.v1.{module.name}")
        for module in pkgutil.iter_modules(starmesh.v1.__path__)
        if module.name.endswith("_pb2")
    ]
    files = [module.DESCRIPTOR for module in modules] + [health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR]
    found = [service for file in files for service in file.services_by_name.values()]
    return {service.full_name: _rpcs_of(service) for service in found}


SERVICES = _services()
"""The RPCs of each service: ours, health and reflection."""
assert len(SERVICES) >= 9, SERVICES.keys()


async def attempt(
    channel: grpc.aio.Channel, rpc: Rpc, message: bytes = b"", *, metadata: Any = None
) -> grpc.StatusCode:
    """How a call ends, or OK as soon as it is answered."""
    status, _ = await ask(channel, rpc, message, metadata=metadata)
    return status


async def ask(
    channel: grpc.aio.Channel, rpc: Rpc, message: bytes = b"", *, metadata: Any = None
) -> tuple[grpc.StatusCode, bytes]:
    """The same with the first answer."""
    for _ in range(_TRIES):
        try:
            return await _ask_once(channel, rpc, message, metadata)
        except grpc.aio.AioRpcError as error:
            if not (rpc.streams_in and _WRITTEN_TOO_LATE in (error.debug_error_string() or "")):
                return error.code(), b""
    raise AssertionError(f"{rpc} never told how it ended in {_TRIES} tries")


async def _ask_once(
    channel: grpc.aio.Channel, rpc: Rpc, message: bytes, metadata: Any
) -> tuple[grpc.StatusCode, bytes]:
    options = {"timeout": TIMEOUT_S, "metadata": metadata}
    kind = f"{'stream' if rpc.streams_in else 'unary'}_{'stream' if rpc.streams_out else 'unary'}"
    call = getattr(channel, kind)(rpc.path)(_once(message) if rpc.streams_in else message, **options)
    try:
        answer = await call.read() if rpc.streams_out else await call
    finally:
        call.cancel()
    return grpc.StatusCode.OK, answer if isinstance(answer, bytes) else b""


async def served_by(channel: grpc.aio.Channel, *, metadata: Any = None) -> set[str]:
    """The services of a server, as it says."""
    rpc = SERVICES[REFLECTION][0]
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    status, answer = await ask(channel, rpc, request, metadata=metadata)
    assert status is grpc.StatusCode.OK, status
    response = reflection_pb2.ServerReflectionResponse.FromString(answer)
    return {service.name for service in response.list_services_response.service}


async def _once(message: bytes) -> AsyncIterator[bytes]:
    yield message

"""A service's gRPC server: limits, keepalive, health, reflection, tracing and error mapping, the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from starmesh.loopback import is_loopback
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.members import MemberInterceptor
from starmesh.rpc.status import StatusInterceptor

# A prompt of 4 MiB of text, or 32k tokens at 5 bytes each, with room to spare; KV chunks are at most 1 MiB.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
# Streams of one connection: a router holds one per request only on its public side.
MAX_CONCURRENT_STREAMS = 4096

SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    # Two servers must not share a port by mistake (the default lets them).
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    # Also TCP_USER_TIMEOUT: exceeds the longest blip that a stream should survive.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class PlaintextRefused(Exception):
    """A listen address beyond loopback without TLS, not asked for by name."""


class RpcServer:
    """One grpc.aio server. Serves health as NOT_SERVING until ``set_serving(True)``."""

    def __init__(
        self,
        *,
        listen: str,
        allow_plaintext: bool = False,
        credentials: Credentials | None = None,
        members_only: bool = True,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """``listen`` is host:port, port 0 for any. With ``credentials`` all is TLS, and with ``members_only`` mutual
        TLS: only services of the mesh are answered. ``interceptors`` may raise StatusError in handlers.

        Raises PlaintextRefused without credentials for a host that is not loopback unless ``allow_plaintext``.
        """
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdigit():
            raise ValueError(f"listen address {listen!r} is not HOST:PORT")
        if credentials is None and not allow_plaintext and not is_loopback(listen):
            raise PlaintextRefused(
                f"{listen} is not a loopback address and the connection is not encrypted; give --tls-cert, --tls-key "
                "and --tls-ca, listen on 127.0.0.1, or pass --allow-plaintext on a network that you trust"
            )
        self._host = host
        self._listen = listen
        self._credentials = (
            None if credentials is None else credentials.for_server(require_client_certificate=members_only)
        )
        inner = list(interceptors)
        if credentials is not None and members_only:
            inner.insert(0, MemberInterceptor(credentials.server_name))
        # No tracing interceptor of OpenTelemetry's: it fails to detach its context when a client leaves during a write,
        # and its twin for clients swallows cancellation. Servicers continue the trace of the metadata themselves.
        self._server = grpc.aio.server(interceptors=[StatusInterceptor(), *inner], options=SERVER_OPTIONS)
        self._health = HealthServicer()
        self._names = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = ""

    def add(self, register: Callable[[Any, Any], None], servicer: Any, full_name: str) -> None:
        """Add a servicer by its generated ``add_..._to_server`` and the service's full name."""
        register(servicer, self._server)
        self._names.append(full_name)

    async def start(self) -> str:
        """Bind and serve. Returns the address, host:port. Raises OSError when the port is taken."""
        reflection.enable_server_reflection(self._names, self._server)
        await self.set_serving(False)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._listen)
            else:
                port = self._server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._listen}: is another process using the port?") from error
        await self._server.start()
        self.address = f"{self._host}:{port}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """Set what health checks answer, for the whole server and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those in flight ``grace_s``, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

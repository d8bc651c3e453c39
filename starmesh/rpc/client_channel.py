"""A client's channel to a router: TLS by the mesh's CA, and an API key with every call.

Owns what services between each other do not need; theirs are in ``channels``. The key travels as metadata and not as
gRPC's call credentials, which refuse to go over plaintext on loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

from starmesh.loopback import is_loopback
from starmesh.rpc.channels import CHANNEL_OPTIONS
from starmesh.rpc.credentials import TlsError, client_credentials


def open_client_channel(address: str, *, ca: Path | None = None, api_key: str = "") -> grpc.aio.Channel:
    """A channel to the router at ``address``. ``ca`` is a PEM file of the CAs that sign its certificate, which must be
    for the host in ``address``; without one it is plaintext. Raises TlsError for a file that cannot be used, and for a
    key that would cross a network in the clear."""
    if ca is None:
        if api_key and not is_loopback(address):
            raise TlsError(f"the API key would go to {address} unencrypted; give --tls-ca")
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(address, client_credentials(ca), options=CHANNEL_OPTIONS)
    return KeyedChannel(channel, api_key) if api_key else channel


class KeyedChannel(grpc.aio.Channel):
    """A channel whose calls all carry an API key. An interceptor would do, but its calls are not quite calls: their
    cancellation and their reads differ."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str) -> None:
        self._channel = channel
        self._entry = ("authorization", f"Bearer {api_key}")

    def __repr__(self) -> str:
        return f"<KeyedChannel {self._channel!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.stream_stream(*args, **options))

    def _keyed(self, begin: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any = None, *, metadata: Any = None, **options: Any) -> Any:
            return begin(request, metadata=(*(metadata or ()), self._entry), **options)

        return call

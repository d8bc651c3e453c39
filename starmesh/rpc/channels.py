"""Client channels: one per address, with the limits and keepalive that the servers expect."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from starmesh.rpc.credentials import Credentials
from starmesh.rpc.server import MAX_MESSAGE_BYTES

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that comes back is found within a second, not after the default two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Channels to the same address must not share a connection: a stalled pull would hold up tokens.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
RETIRED_S = 600.0
"""How long calls may go on over a channel whose certificate has been replaced: longer than those of a pool take."""


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to another service: mutual TLS with ``credentials``, plaintext without. It keeps the certificate of now
    when it connects again later; what lives longer than a certificate comes from a ``ChannelPool``."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    # The mesh's name instead of the host in the address: see ``credentials``.
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", credentials.server_name)]
    return grpc.aio.secure_channel(address, credentials.for_channel(), options=options)


class ChannelPool:
    """Channels by address, opened on first use and anew when the process's certificate has been replaced."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._generation = 0 if credentials is None else credentials.generation
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._retired: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to ``address``, for a call that begins now."""
        if self._credentials is not None and (generation := self._credentials.generation) != self._generation:
            self._generation = generation
            while self._channels:
                self._retire(self._channels.popitem()[1])
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self._credentials)
        return channel

    async def retain(self, addresses: set[str]) -> None:
        """Close the channels to all other addresses: instances come and go with new ports."""
        for address in [address for address in self._channels if address not in addresses]:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Close all channels."""
        await self.retain(set())
        for closing, channel in list(self._retired.items()):
            closing.cancel()
            await channel.close()

    def _retire(self, channel: grpc.aio.Channel) -> None:
        """Close a channel when the calls over it have had the time to end."""
        closing = asyncio.create_task(_close_later(channel), name="retired channel")
        self._retired[closing] = channel
        closing.add_done_callback(lambda _: self._retired.pop(closing, None))


async def _close_later(channel: grpc.aio.Channel) -> None:
    await asyncio.sleep(RETIRED_S)
    await channel.close()

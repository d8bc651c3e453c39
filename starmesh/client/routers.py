"""The routers that a client may ask: a connection to each, and whom to ask first.

Owns the channels. A router whose connection broke is asked after the others for a while; it is never given up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import grpc.aio

from starmesh.rpc.client_channel import open_client_channel
from starmesh.v1 import inference_pb2_grpc

_AVOID_S: Final = 5.0


class RouterLink:
    """One router, as this client sees it."""

    def __init__(self, address: str, *, tls_ca: Path | None, api_key: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel = open_client_channel(address, ca=tls_ca, api_key=api_key)
        self.stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.avoid_until_s = 0.0
        """Asked after others until then, in the event loop's time."""

    async def close(self) -> None:
        """Break what still runs."""
        await self._channel.close()


class Routers:
    """All of them. Needs a running event loop."""

    def __init__(self, addresses: Sequence[str], *, tls_ca: Path | None, api_key: str) -> None:
        """Raises TlsError for a CA file that cannot be used, and for a key that would go unencrypted."""
        self._links = [RouterLink(address, tls_ca=tls_ca, api_key=api_key) for address in addresses]
        # Clients that start together do not all ask the same router.
        self._next = random.randrange(len(addresses))  # noqa: S311 - no secret
        self._loop = asyncio.get_running_loop()
        self.closed = False
        """Whether nothing is to be asked any more."""

    def __len__(self) -> int:
        return len(self._links)

    def choose(self, *, other_than: RouterLink | None = None) -> RouterLink:
        """The next in turn, those last whose connection broke just now, and ``other_than`` at the very end."""
        self._next += 1
        now_s = self._loop.time()
        turns = len(self._links)
        ordered = [self._links[(self._next + turn) % turns] for turn in range(turns)]
        return min(ordered, key=lambda link: (link is other_than, link.avoid_until_s > now_s))

    def avoid(self, link: RouterLink) -> None:
        """Its connection broke."""
        link.avoid_until_s = self._loop.time() + _AVOID_S

    async def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            await link.close()

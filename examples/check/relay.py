"""A TCP relay whose connections can be cut: a network that breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_CHUNK_BYTES = 65_536


class Relay:
    """Passes bytes between clients and one address."""

    def __init__(self, address: str) -> None:
        self.address = ""
        """Where it listens."""
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._connected = asyncio.Event()

    def cut(self) -> None:
        """Break all connections, as a reset does. New ones are taken."""
        self._connected.clear()
        for writer in self._writers:
            writer.transport.abort()

    async def wait_until_connected(self) -> None:
        """Return when there has been a connection since the last cut."""
        await self._connected.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side ends it."""
        try:
            onward_reader, onward_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._connected.set()
        pair = {writer, onward_writer}
        self._writers |= pair
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pass(reader, onward_writer))
                tasks.create_task(_pass(onward_reader, writer))
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()


@asynccontextmanager
async def relay_to(address: str) -> AsyncIterator[Relay]:
    """A relay to HOST:PORT on a port of its own of this machine."""
    relay = Relay(address)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    relay.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
        await server.wait_closed()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until there is no more, or nobody to take it."""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()

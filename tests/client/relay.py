"""A connection in between that a test can break, stall and refuse."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self


class Relay:
    """Passes bytes between clients and one address."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.refusing = False
        """Whether connections are cut as soon as they are made."""
        self.cut_after: int | None = None
        """Cut when this many bytes more have come from the target."""
        self.cuts = 0
        self.address = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections, on both sides."""
        self.cuts += 1
        for pair in self._pairs:
            for writer in pair:
                writer.transport.abort()
        self._pairs.clear()

    def stall(self) -> None:
        """Pass nothing on until ``flow``."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass all on."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._pairs.append((writer, target_writer))
        for source, sink, counted in ((reader, target_writer, False), (target_reader, writer, True)):
            task = asyncio.create_task(self._pass(source, sink, counted=counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(4096):
                await self._flowing.wait()
                if counted and self.cut_after is not None:
                    if self.cut_after < len(data):
                        # The last bytes may be half a message.
                        sink.write(data[: self.cut_after])
                        await sink.drain()
                        self.cut_after = None
                        self.cut()
                        return
                    self.cut_after -= len(data)
                sink.write(data)
                await sink.drain()
        sink.transport.abort()

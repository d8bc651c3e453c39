"""The live page's frames as server-sent events: made once however many look on, and only while somebody does.

Owns the pace, the bound on clients and the form of an event. Owns no content (``cluster_frames``) and no HTTP
(``live``). Nothing queues: a client that is slow gets the newest frame when it has taken the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

import grpc
from google.protobuf.json_format import MessageToJson

from services.router.cluster_frames import ClusterFrames
from starmesh.rpc.status import retry_later

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.5
MAX_CLIENTS: Final = 32
MAX_SEQUENCES: Final = 1024
"""More are not told apart on a screen."""
_LARGEST_SHARE: Final = 0.25
"""Part of the time that making frames may take: beyond it they come less often."""
_LONGEST_INTERVAL_S: Final = 3.0
"""But not so seldom that a page takes the router for lost."""
_RETRY_DELAY_S: Final = 5.0

END: Final = b"event: end\ndata: {}\n\n"
"""The last event: the router is stopping."""


class LiveEvents:
    """Frames for clients that have joined."""

    def __init__(
        self, frames: ClusterFrames, *, interval_s: float = INTERVAL_S, max_clients: int = MAX_CLIENTS
    ) -> None:
        self._frames = frames
        self._interval_s = interval_s
        self._max_clients = max_clients
        self._places: set[Place] = set()
        self._newest = b""
        self._number = 0
        self._changed = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    @property
    def clients(self) -> int:
        """How many look on."""
        return len(self._places)

    def join(self) -> Place:
        """A place to look on from, until it is closed. Raises StatusError when all are taken, or at the end."""
        if self._frames.stopping.is_set():
            raise retry_later(grpc.StatusCode.UNAVAILABLE, "this router is stopping; use another", _RETRY_DELAY_S)
        if len(self._places) >= self._max_clients:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_clients} clients look on already; close one, or try again later",
                _RETRY_DELAY_S,
            )
        place = Place(self)
        self._places.add(place)
        if self._making is None:
            self._making = asyncio.create_task(self._make(), name="live frames")
        return place

    def _leave(self, place: Place) -> None:
        self._places.discard(place)
        if not self._places and self._making is not None:
            self._making.cancel()
            self._making = None
            # The last frame will have aged when the next one comes to look on.
            self._number = 0

    async def _make(self) -> None:
        """Frames until nobody looks on or the router stops."""
        loop = asyncio.get_running_loop()
        stopping = self._frames.stopping
        while not stopping.is_set():
            began_s = loop.time()
            try:
                frame = await self._frames.frame(max_sequences=MAX_SEQUENCES)
                # A large cluster's takes tens of milliseconds to write: not on the loop that tokens go through.
                text = await asyncio.to_thread(
                    MessageToJson, frame, indent=None, preserving_proto_field_name=True, ensure_ascii=True
                )
                self._tell(b"data: " + text.encode() + b"\n\n")
            except Exception:
                # The next frame may be another; pages that hear nothing say so.
                log.exception("a frame of the live page failed")
            rest_s = min(_LONGEST_INTERVAL_S, (loop.time() - began_s) / _LARGEST_SHARE)
            wait_s = max(self._interval_s, rest_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stopping.wait()
        self._tell(END)

    def _tell(self, event: bytes) -> None:
        self._newest = event
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()


class Place:
    """One client's; ``close`` it."""

    def __init__(self, events: LiveEvents) -> None:
        self._events = events

    def close(self) -> None:
        """Look on no more. May be repeated."""
        self._events._leave(self)

    async def events(self) -> AsyncIterator[bytes]:
        """The newest event, and each that comes after the last one was taken; ends with END."""
        seen, newest = 0, b""
        while newest != END:
            while seen == self._events._number:
                await self._events._changed.wait()
            seen, newest = self._events._number, self._events._newest
            yield newest

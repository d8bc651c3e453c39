"""The router's requests behind one HTTP request: one for each answer that it asks for.

Owns that all of them begin together and end together, that news of any wakes the one writer, and that a client that
goes away ends them at once, whatever the writer is waiting for. Owns nothing of what is sent (``sse``, ``whole``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

import grpc
from opentelemetry.context import Context
from starlette.types import Receive

from services.router.answer import Piece
from services.router.flight import Flight
from services.router.http.answers import PromptTokensDetails, Usage
from services.router.router import Router
from starmesh.rpc.status import StatusError
from starmesh.types import FinishReason
from starmesh.v1 import inference_pb2


class Choices:
    """Use ``attended`` once; inside it ``wait`` and ``take`` in turn until ``unfinished`` is 0 or the client is
    ``gone``."""

    def __init__(
        self,
        router: Router,
        requests: Sequence[inference_pb2.GenerateRequest],
        *,
        per_prompt: int,
        key_id: str,
        parent: Context,
    ) -> None:
        """Each ``per_prompt`` of the requests have one prompt. ``parent`` is the trace to continue."""
        self._router = router
        self._requests = requests
        self._per_prompt = per_prompt
        self._key_id = key_id
        self._parent = parent
        self._flights: list[Flight] = []
        # Keys only: those with news, in the order in which it came.
        self._marked: dict[Flight, None] = {}
        self._indices: dict[Flight, int] = {}
        self._output_tokens = 0
        self._ready = asyncio.Event()
        self.unfinished = len(requests)
        self.gone = False
        """Whether the client has gone away."""

    def __len__(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def attended(self, receive: Receive) -> AsyncIterator[Self]:
        """Begin, and end all in the end. ``receive`` says when the client goes. Raises StatusError for a request that
        is refused."""
        watcher: asyncio.Task[None] | None = None
        try:
            for index, request in enumerate(self._requests):
                flight = self._router.open(
                    request, timeout_s=None, on_ready=self._mark, parent=self._parent, key_id=self._key_id
                )
                self._flights.append(flight)
                self._indices[flight] = index
            watcher = asyncio.create_task(self._watch(receive), name="client")
            yield self
        finally:
            if watcher is not None:
                watcher.cancel()
            self._close()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for news, or for the client to go. Returns False when neither has come in time."""
        if not self._ready.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._ready.wait()
            except TimeoutError:
                return False
        self._ready.clear()
        return True

    def take(self) -> Iterator[tuple[int, Piece]]:
        """All that is new, each with the index of its choice. Raises StatusError when one has failed, after what came
        before that."""
        while self._marked:
            flight = next(iter(self._marked))
            del self._marked[flight]
            piece = flight.take()
            if piece is not None:
                self._output_tokens += len(piece.token_ids)
                if piece.finish_reason is FinishReason.CANCELLED:
                    raise StatusError(grpc.StatusCode.CANCELLED, "the request was cancelled")
                if piece.finish_reason is not None:
                    self.unfinished -= 1
                yield self._indices[flight], piece
            if flight.error is not None:
                raise flight.error.bare()

    @property
    def usage(self) -> Usage:
        """Tokens of all of them, once they have ended."""
        firsts = self._flights[:: self._per_prompt]
        prompt_tokens = sum(flight.prompt_tokens for flight in firsts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._output_tokens,
            total_tokens=prompt_tokens + self._output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(flight.cached_tokens for flight in firsts)),
        )

    def _mark(self, flight: Flight) -> None:
        self._marked[flight] = None
        self._ready.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # the body's end
        self.gone = True
        self._close()
        self._ready.set()

    def _close(self) -> None:
        for flight in self._flights:
            self._router.close(flight)

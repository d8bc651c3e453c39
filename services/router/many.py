"""One GenerateMany stream: many requests, and one message for all that is new of them at each wake-up.

Owns the stream's requests and the bounds on them. While the client does not read, tokens wait in the requests'
flights, bounded by what each may generate, and become part of later messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc
from opentelemetry.context import Context

from services.router.access import Caller
from services.router.flight import Flight, superseded
from services.router.pieces import piece_pb
from services.router.router import Router
from services.router.validation import check_request_id, duration_in
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.telemetry.setup import context_of
from starmesh.v1 import inference_pb2

# Keeps a message that follows a long pause of the client far below the size limit: a token and its text take some 10
# bytes. A request's own piece is not split.
_MAX_MESSAGE_TOKENS = 65_536
_MAX_TIMEOUT_S = 86_400.0
_RETRY_DELAY_S = 1.0
# Refusals that may wait for a client that does not read. Beyond them it is not read from either.
_MAX_FAILURES = 1024


class ManyRequests:
    """The requests of one stream."""

    def __init__(
        self, router: Router, caller: Caller, *, max_requests: int, timeout_s: float | None, parent: Context
    ) -> None:
        """``timeout_s`` is what the stream's own deadline leaves; None without one."""
        self._router = router
        self._caller = caller
        self._max_requests = max_requests
        self._loop = asyncio.get_running_loop()
        self._deadline_s = None if timeout_s is None else self._loop.time() + timeout_s
        self._parent = parent
        self._flights: dict[str, Flight] = {}
        # Keys only: those with news, in the order in which it came.
        self._marked: dict[Flight, None] = {}
        self._failures: list[inference_pb2.RequestFailure] = []
        self._ready = asyncio.Event()
        self._told = asyncio.Event()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def run(
        self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]
    ) -> AsyncIterator[inference_pb2.GenerateManyResponse]:
        """Serve until the client has sent its last request and had its last answer, or the router stops."""
        reader = asyncio.create_task(self._read(requests))
        stopping = asyncio.create_task(self._router.stopping.wait())
        for task in (reader, stopping):
            task.add_done_callback(lambda _: self._ready.set())
        try:
            while True:
                await self._ready.wait()
                self._ready.clear()
                while self._marked or self._failures:
                    yield self._gather()
                if reader.done():
                    reader.result()  # raises what is wrong with the stream itself
                if (reader.done() or stopping.done()) and not self._flights:
                    return
        finally:
            reader.cancel()
            stopping.cancel()

    def close(self) -> None:
        """Cancel what still runs, and begin nothing more."""
        self._closed = True
        for flight in self._flights.values():
            self._router.close(flight)
        self._flights.clear()

    async def _read(self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]) -> None:
        async for request in requests:
            while len(self._failures) >= _MAX_FAILURES:
                self._told.clear()
                await self._told.wait()
            if self._closed:
                return  # a request that came last before the client left: nobody would end it
            match request.WhichOneof("action"):
                case "generate":
                    try:
                        self._begin(request)
                    except StatusError as error:
                        self._fail(request.generate.request_id, error)
                case "cancel_request_id":
                    # One that has ended in the meantime is no error: the client could not know.
                    flight = self._flights.get(request.cancel_request_id)
                    if flight is not None:
                        self._router.cancel(flight.request_id, key_id=flight.key_id)
                case _:
                    self._fail("", bad_field("action", "is not set; set generate or cancel_request_id"))

    def _begin(self, request: inference_pb2.GenerateManyRequest) -> None:
        generate = request.generate
        check_request_id(generate.request_id, "generate.request_id")
        if len(self._flights) >= self._max_requests:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this stream has {self._max_requests} requests in flight; wait for one to end",
                _RETRY_DELAY_S,
            )
        timeout_s = None if self._deadline_s is None else self._deadline_s - self._loop.time()
        if request.HasField("timeout"):
            own_s = duration_in(request.timeout, "timeout", 0.0, _MAX_TIMEOUT_S)
            timeout_s = own_s if timeout_s is None else min(own_s, timeout_s)
        parent = context_of(request.traceparent) if request.traceparent else self._parent
        flight = self._router.open(
            generate,
            timeout_s=timeout_s,
            on_ready=self._mark,
            parent=parent,
            key_id=self._caller.key_id,
            admit=self._caller.admit,
        )
        self._flights[flight.request_id] = flight

    def _mark(self, flight: Flight) -> None:
        self._marked[flight] = None
        self._ready.set()

    def _fail(self, request_id: str, error: StatusError) -> None:
        failure = inference_pb2.RequestFailure(request_id=request_id, status=error.to_sequence_status())
        self._failures.append(failure)
        self._ready.set()

    def _gather(self) -> inference_pb2.GenerateManyResponse:
        """All that is new, up to the bound of a message."""
        responses: list[inference_pb2.GenerateResponse] = []
        tokens = 0
        while self._marked and tokens < _MAX_MESSAGE_TOKENS:
            flight = next(iter(self._marked))
            del self._marked[flight]
            if flight.reader:
                self._hand_over(flight)
                continue
            piece = flight.take()
            if piece is not None:
                tokens += len(piece.token_ids)
                responses.append(piece_pb(flight, piece))
                if piece.finish_reason is not None:
                    self._end(flight)
                    continue
            if flight.error is not None and flight.request_id in self._flights:
                self._fail(flight.request_id, flight.error)
                self._end(flight)
        failures, self._failures = self._failures, []
        self._told.set()
        return inference_pb2.GenerateManyResponse(responses=responses, failures=failures)

    def _hand_over(self, flight: Flight) -> None:
        """A Resume has taken the answer: here it has ended."""
        if self._flights.get(flight.request_id) is flight:
            del self._flights[flight.request_id]
            self._fail(flight.request_id, superseded())

    def _end(self, flight: Flight) -> None:
        self._flights.pop(flight.request_id, None)
        self._router.close(flight)

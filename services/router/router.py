"""The router's requests: who is in flight, under which id, and the way in and out.

Owns admission by count, duplicate ids, cancel by id and the end of the process. Owns no request's course (``life``).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from opentelemetry.context import Context

from services.router.flight import Flight
from services.router.life import Life
from services.router.owners import duplicate_id
from services.router.parts import Parts
from services.router.retries import RETRY_DELAY_S
from services.router.validation import check_request
from starmesh.rpc import convert
from starmesh.rpc.status import retry_later
from starmesh.types import FinishReason
from starmesh.v1 import inference_pb2


@dataclass(slots=True)
class _Entry:
    """A request id in use: until its client has had the last message and its life has cleaned up."""

    flight: Flight
    task: asyncio.Task[None]
    closed: bool = False


class Router:
    """Takes requests in and follows them to their end."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._entries: dict[str, _Entry] = {}
        self.stopping = asyncio.Event()
        """Set when the process is to end: nothing new is taken."""
        self.idle = asyncio.Event()
        """Set while no request is in flight."""
        self.idle.set()

    def __repr__(self) -> str:
        return f"<Router {self.active_requests} active, {self._parts.dispatcher.queued_requests} queued>"

    @property
    def active_requests(self) -> int:
        """Requests that clients wait for."""
        return sum(not entry.closed for entry in self._entries.values())

    @property
    def queued_requests(self) -> int:
        """Those of them that wait for an instance."""
        return self._parts.dispatcher.queued_requests

    def open(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float | None,
        on_ready: Callable[[Flight], None],
        parent: Context,
    ) -> Flight:
        """Take a request in. Its tokens, or its error, come through the flight; ``close`` it in the end.

        ``timeout_s`` None means as long as the router allows. ``parent`` is the trace to continue. Raises StatusError
        for what is wrong with the request as it stands, or with the time.
        """
        if self.stopping.is_set():
            raise retry_later(grpc.StatusCode.UNAVAILABLE, "this router is stopping; use another", RETRY_DELAY_S)
        settings, model = self._parts.settings, self._parts.model
        check_request(request, model.facts(self._parts.watch.view))
        request_id = request.request_id or secrets.token_hex(12)
        former = self._entries.get(request_id)
        if former is not None and not former.closed:
            raise duplicate_id(request_id)
        if len(self._entries) >= settings.max_requests:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this router has {settings.max_requests} requests in flight; try again later",
                RETRY_DELAY_S,
            )
        duration_s = settings.max_duration_s if timeout_s is None else min(timeout_s, settings.max_duration_s)
        flight = Flight(
            request_id,
            detokenizer=model.detokenizer(tuple(request.sampling.stop_strings)),
            deadline_s=asyncio.get_running_loop().time() + duration_s,
            coalesce_window_s=convert.duration_s(request.coalesce_window),
            on_ready=on_ready,
        )
        life = Life(self._parts, flight, request, seed=secrets.randbits(63))
        after = former.task if former is not None else None
        task = asyncio.create_task(_run_after(after, life, parent), name=f"request {request_id}")
        entry = self._entries[request_id] = _Entry(flight, task)
        self.idle.clear()
        task.add_done_callback(lambda _: self._forget(entry))
        return flight

    def close(self, flight: Flight) -> None:
        """The client has had the last message, or is gone: then whatever still runs is cancelled. May be repeated."""
        entry = self._entries.get(flight.request_id)
        if entry is not None and entry.flight is flight and not entry.closed:
            entry.closed = True
            flight.abandon()
            if not flight.ended:
                entry.task.cancel()
            self._forget(entry)

    def cancel(self, request_id: str) -> bool:
        """End a request with CANCELLED as its finish reason. Returns False when none of this id is in flight."""
        entry = self._entries.get(request_id)
        if entry is None or entry.closed or entry.flight.ended:
            return False
        entry.flight.end(FinishReason.CANCELLED)
        entry.task.cancel()
        return True

    async def stop(self) -> None:
        """Cancel what is left and wait until it is cleaned up."""
        self.stopping.set()
        tasks = [entry.task for entry in self._entries.values()]
        for entry in list(self._entries.values()):
            entry.flight.fail(
                retry_later(grpc.StatusCode.UNAVAILABLE, "this router is stopping; use another", RETRY_DELAY_S)
            )
            entry.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, entry: _Entry) -> None:
        """Free the id once neither client nor life needs it."""
        request_id = entry.flight.request_id
        if entry.closed and entry.task.done() and self._entries.get(request_id) is entry:
            del self._entries[request_id]
            if not self._entries:
                self.idle.set()


async def _run_after(former: asyncio.Task[None] | None, life: Life, parent: Context) -> None:
    """Run ``life`` when the last request of the same id has cleaned up: its clean-up is by id."""
    if former is not None:
        try:
            await asyncio.wait([former])
        except asyncio.CancelledError:
            # Whoever comes third waits for this task only.
            await asyncio.wait([former])
            raise
    await life.run(parent)

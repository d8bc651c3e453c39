"""The router's requests: who is in flight, under which id, and the way in and out.

Owns admission by count, duplicate ids, who reads an answer, cancel by id and the end of the process. Owns no request's
course (``life``) and not for how long a client may be away (``away``).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import grpc
from opentelemetry.context import Context

from services.router.away import Away, Entry
from services.router.flight import Flight
from services.router.life import Life
from services.router.owners import duplicate_id
from services.router.parts import Parts
from services.router.request_spans import refusals_noted
from services.router.retries import RETRY_DELAY_S
from services.router.validation import check_request
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.types import FinishReason
from starmesh.v1 import inference_pb2


class Router:
    """Takes requests in and follows them to their end."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        # Those that run or are read; one that is complete and whose client is away is in ``away`` alone.
        self._entries: dict[str, Entry] = {}
        settings = parts.settings
        self.away = Away(
            max_running=settings.max_detached_requests,
            max_kept_tokens=settings.max_kept_tokens,
            give_up=self._give_up,
        )
        self.stopping = asyncio.Event()
        """Set when the process is to end: nothing new is taken."""
        self.idle = asyncio.Event()
        """Set while no request is in flight: answers that are complete and kept are not waited for."""
        self.idle.set()

    def __repr__(self) -> str:
        return f"<Router {self.active_requests} active, {self._parts.dispatcher.queued_requests} queued>"

    @property
    def active_requests(self) -> int:
        """Requests that clients wait for, or may come back to."""
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
        key_id: str = "",
        admit: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Flight:
        """Take a request in. Its tokens, or its error, come through the flight; ``close`` it in the end.

        ``timeout_s`` None means as long as the router allows. ``parent`` is the trace to continue. ``key_id`` names the
        API key that was sent, if any is needed, and what ``admit`` gives is held as long as the request runs or is
        read. Raises StatusError for what is wrong with the request as it stands, or with the time, or as ``admit``
        does.
        """
        settings, model = self._parts.settings, self._parts.model
        request_id = request.request_id or secrets.token_hex(12)
        former, kept = self._entries.get(request_id), self.away.find(request_id)
        with refusals_noted(request, model.name, parent), self._parts.metrics.refusals_counted():
            self._check_takes(request, former)
            if kept is not None and kept.flight.key_id != key_id:
                raise duplicate_id(request_id)  # whose it is may still come back for it
        duration_s = settings.max_duration_s if timeout_s is None else min(timeout_s, settings.max_duration_s)
        flight = Flight(
            request_id,
            deadline_s=asyncio.get_running_loop().time() + duration_s,
            coalesce_window_s=convert.duration_s(request.coalesce_window),
            resume_window_s=convert.duration_s(request.resume_window),
            key_id=key_id,
            stop_strings=tuple(request.sampling.stop_strings),
            output_token_ids=request.output_token_ids,
            on_ready=on_ready,
        )
        if not flight.brought_tokens:
            flight.serve(model.detokenizer(flight.stop_strings))
        admission = ExitStack()
        admission.enter_context(admit())
        if kept is not None:
            self._give_up(kept)
        life = Life(self._parts, flight, request, seed=secrets.randbits(63))
        after = former.task if former is not None else None
        task = asyncio.create_task(_run_after(after, life, parent), name=f"request {request_id}")
        entry = self._entries[request_id] = Entry(flight, task, admission=admission)
        self.idle.clear()
        task.add_done_callback(lambda _: self._forget(entry))
        return flight

    async def resume(
        self, request_id: str, *, offset: int, on_ready: Callable[[Flight], None], key_id: str = ""
    ) -> Flight:
        """Read on behind the first ``offset`` output tokens of a request that has a resume window, in place of whoever
        reads it now; ``close`` it in the end with the ``reader`` that the flight names then. Its news come as in
        ``open``. Raises StatusError when there is no such request, or not with this API key."""
        entry = self._entries.get(request_id) or self.away.find(request_id)
        if entry is None or entry.closed or not entry.flight.resume_window_s or entry.flight.key_id != key_id:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND, f"no request {request_id} that can be resumed is here; begin it anew"
            )
        flight = entry.flight
        tokens = len(flight.stream.token_ids)
        if not flight.brought_tokens <= offset <= tokens:
            raise bad_field("offset", f"is {offset}; this answer has tokens {flight.brought_tokens} to {tokens}")
        self.away.leave_off(entry)
        entry.away = False
        self._entries[request_id] = entry
        self.idle.clear()
        reader = flight.read_anew(on_ready)
        try:
            detokenizer = await self._parts.model.detokenizer_after(
                flight.stop_strings, flight.stream.token_ids[:offset]
            )
            flight.check_reader(reader)
        except BaseException:
            self.close(flight, reader)
            raise
        flight.serve(detokenizer, offset=offset)
        return flight

    def _check_takes(self, request: inference_pb2.GenerateRequest, former: Entry | None) -> None:
        """Raise StatusError for a request that is not taken in; ``former`` is another one of its id."""
        if self.stopping.is_set():
            raise retry_later(grpc.StatusCode.UNAVAILABLE, "this router is stopping; use another", RETRY_DELAY_S)
        settings = self._parts.settings
        check_request(request, self._parts.model.facts(self._parts.watch.view))
        if former is not None and not former.closed:
            raise duplicate_id(request.request_id)
        if len(self._entries) >= settings.max_requests:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this router has {settings.max_requests} requests in flight; try again later",
                RETRY_DELAY_S,
            )

    def close(self, flight: Flight, reader: int = 0) -> None:
        """The client has had the last message, or is gone. Then whatever still runs is cancelled, unless there is a
        window to resume it in. Without effect for a ``reader`` that another has followed. May be repeated."""
        entry = self._entries.get(flight.request_id)
        if entry is None or entry.flight is not flight or entry.closed or entry.away or reader != flight.reader:
            return
        flight.abandon()
        if flight.resume_window_s and flight.stream.finish_reason is not FinishReason.CANCELLED:
            entry.away = True
            self.away.wait(entry)
            self._forget(entry)
        else:
            self._give_up(entry)

    def cancel(self, request_id: str, *, key_id: str = "") -> bool:
        """End a request with CANCELLED as its finish reason. Returns False when none of this id is in flight, or not
        with this API key."""
        entry = self._entries.get(request_id)
        if entry is None or entry.closed or entry.flight.ended or entry.flight.key_id != key_id:
            return False
        entry.flight.end(FinishReason.CANCELLED)
        entry.task.cancel()
        if entry.away:
            self._give_up(entry)
        return True

    async def stop(self) -> None:
        """Cancel what is left and wait until it is cleaned up."""
        self.stopping.set()
        self.away.clear()
        tasks = [entry.task for entry in self._entries.values()]
        for entry in list(self._entries.values()):
            entry.flight.fail(
                retry_later(grpc.StatusCode.UNAVAILABLE, "this router is stopping; use another", RETRY_DELAY_S)
            )
            entry.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _give_up(self, entry: Entry) -> None:
        """No client will read any more."""
        self.away.leave_off(entry)
        entry.closed, entry.away = True, False
        if not entry.flight.ended:
            entry.task.cancel()
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """Free the id once neither client nor life needs it; a complete answer is kept while its client is away."""
        request_id = entry.flight.request_id
        if not entry.task.done() or not (entry.closed or entry.away):
            return
        entry.admission.close()
        if self._entries.get(request_id) is entry:
            del self._entries[request_id]
            if not self._entries:
                self.idle.set()
            self.away.ended(entry)


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

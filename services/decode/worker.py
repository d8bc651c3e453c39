"""The sequences of a decode instance: taken over from prefill instances or from others like it, decoded for routers.

Owns each sequence from its start message, or its arrival, to its end: its deadline, its cancel, who hears of its
tokens. How it moves is the migrator's; the worker tells it what happens to sequences on their way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import grpc

from services.decode.config import MigratorConfig, PredictorConfig
from services.decode.handoff import RETRY_DELAY_S, hand_off
from services.decode.link import RouterLink
from services.decode.metrics import DecodeMetrics
from services.decode.migrator import Migrator
from services.decode.remaining import RemainingTokens
from services.decode.running import RunningSequence, WaitingRouter, failure, not_here
from starmesh.engine.engine import SequenceOutput
from starmesh.instance.instance import Instance
from starmesh.instance.intake import check_sequence
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.telemetry import names
from starmesh.telemetry.setup import context_of, span
from starmesh.types import (
    FinishReason,
    HiddenLayout,
    InstanceState,
    KvTicket,
    Ownership,
    RemainingEstimate,
    SequenceSpec,
)
from starmesh.v1 import sequence_pb2

log = logging.getLogger(__name__)

# Other ends may be this instance's only: the request goes on elsewhere.
_BY_ITSELF = (FinishReason.STOP, FinishReason.LENGTH)


class DecodeWorker:
    """Decodes sequences, many at a time, for any number of routers."""

    def __init__(
        self, instance: Instance, config: MigratorConfig | None = None, predictor: PredictorConfig | None = None
    ) -> None:
        """Without ``predictor`` no predictor is asked."""
        self.instance = instance
        self._running: dict[str, RunningSequence] = {}
        # Sequences that were stopped and whose blocks are not free yet, the newest of each request.
        self._freeing: dict[str, asyncio.Task[None]] = {}
        self._metrics = DecodeMetrics(instance.metrics, lambda: instance.last_load)
        instance.on_pull = self._metrics.pulled
        self.migrator = Migrator(instance, self, config or MigratorConfig(), self._metrics)
        instance.count_migrations = self.migrator.counts
        self.remaining = RemainingTokens(instance, self._running, predictor)

    @property
    def running(self) -> Mapping[str, RunningSequence]:
        """The sequences that are here, by request, in the order in which they came."""
        return self._running

    def has_blocks(self, request_id: str) -> bool:
        """Whether a sequence of the request is here, or its blocks are not free yet."""
        return request_id in self._running or request_id in self._freeing

    # What routers ask for.

    def start(
        self,
        link: RouterLink,
        spec: SequenceSpec,
        ticket: KvTicket,
        *,
        timeout_s: float,
        traceparent: str,
        hidden_state: bytes = b"",
        hidden_layout: HiddenLayout | None = None,
        estimate: RemainingEstimate | None = None,
    ) -> None:
        """Take a sequence over. Tokens, its end or its failure go to ``link``. ``hidden_state`` is that of the last
        token prefilled, packed, as ``hidden_layout`` describes it, and ``estimate`` what has been made of it."""
        request_id = spec.request_id
        try:
            self._check_takes(spec)
        except StatusError as error:
            link.put(failure(request_id, spec.epoch, len(spec.output_token_ids), error))
            return
        before = self.migrator.incoming.supersede(request_id)
        former = self._running.get(request_id)
        if former is not None:
            # Usually its router has gone on and refuses this; another router's client must not wait for nothing.
            superseded = StatusError(grpc.StatusCode.ABORTED, f"epoch {spec.epoch} of {request_id} is here")
            self._put(former, former.failure(superseded))
            self._stop(former)
        if request_id in self._freeing:
            before |= {self._freeing[request_id]}
        running = RunningSequence.of(spec, link, traceparent=traceparent, estimate=estimate)
        running.before = before
        self._running[request_id] = running
        self._bound(running, timeout_s)
        usable = self.remaining.usable(hidden_state, hidden_layout)
        running.handoff = self.instance.background(self._take_over(running, spec, ticket, usable))

    def attach(self, link: RouterLink, request_id: str, epoch: int, offset: int, *, timeout_s: float) -> None:
        """Send the tokens from ``offset`` on of a sequence that has moved here, or is about to; or that it has not."""
        waiting = WaitingRouter(link, offset, timeout_s)
        if offset < 0:
            link.put(failure(request_id, epoch, 0, bad_field("attach.offset", "must not be negative")))
            return
        if self.migrator.incoming.attach(request_id, epoch, waiting):
            return
        if request_id in self._running and self._running[request_id].epoch == epoch:
            self.serve(request_id, epoch, waiting)
        else:
            link.put(not_here(request_id, epoch, offset))

    def cancel(self, link: RouterLink, request_id: str, epoch: int) -> None:
        """Stop a sequence of ``link`` and free its blocks; unknown ones and newer epochs are left alone. One that is to
        come under such an epoch is not taken in."""
        self.migrator.incoming.cancel(request_id, epoch)
        running = self._running.get(request_id)
        if running is not None and running.link is link and running.router_epoch <= epoch:
            self.remaining.ended(running, FinishReason.CANCELLED)
            self._stop(running)

    def disconnect(self, link: RouterLink) -> None:
        """Stop every sequence of a router that has gone."""
        self.migrator.incoming.disconnect(link)
        for running in [running for running in self._running.values() if running.link is link]:
            self._stop(running)

    # What the engine makes.

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Pass on what a step made."""
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None or running.epoch != output.epoch:
                continue
            self.remaining.made(running, output)
            message = running.take(output)
            self._put(running, message)
            if output.finish_reason is None and output.error is None:
                continue
            if running.link is None:
                running.end = message
            else:
                self._end(running, output.finish_reason, failed=output.error is not None)
                self.migrator.outgoing.finished(running.request_id)

    async def close(self) -> None:
        """Give up what is in progress: the routers go on with it elsewhere."""
        self.migrator.close()
        for running in list(self._running.values()):
            self._put(running, running.failure(StatusError(grpc.StatusCode.ABORTED, "the instance is stopping")))
            self._stop(running)
        await self.remaining.close()

    # What migrations do with sequences.

    def tell_moved(self, running: RunningSequence, owner: Ownership, address: str, output_tokens: int) -> None:
        """Tell its router where it goes on after how many tokens, and forget it."""
        assert running.link is not None and len(running.token_ids) == output_tokens
        running.link.put_move(running.moved(owner, address))
        if running.span is not None:
            running.span.add_event(names.EVENT_MOVED, {names.TARGET_INSTANCE: owner.instance_id})
        self._end(running)

    def adopt(
        self, spec: SequenceSpec, *, timeout_s: float, traceparent: str, estimate: RemainingEstimate | None
    ) -> None:
        """Take a sequence over that the engine is about to run; its outputs wait for a router."""
        running = RunningSequence.of(spec, None, traceparent=traceparent, estimate=estimate)
        self._running[spec.request_id] = running
        self._bound(running, timeout_s)
        running.begin_span(self.instance.instance_id)
        self.instance.membership.report_soon()

    def serve(self, request_id: str, epoch: int, waiting: WaitingRouter) -> None:
        """Send its tokens to the router that has come for them."""
        running = self._running[request_id]
        running.link, running.router_epoch = waiting.link, epoch
        if waiting.offset > len(running.token_ids):
            # Its router has tokens that nobody made: it must not go on from here.
            waiting.link.put(not_here(request_id, epoch, waiting.offset))
            self._stop(running)
            return
        waiting.link.put(running.since(waiting.offset))
        if running.end is not None:
            self._end(running, convert.finish_reason(running.end.finish_reason))
        else:
            self._bound(running, waiting.timeout_s)

    def give_up(self, request_id: str, epoch: int) -> None:
        """Tell its router that it could not go on here, and forget it."""
        running = self._running.get(request_id)
        if running is not None and running.epoch == epoch:
            self._put(running, running.failure(StatusError(grpc.StatusCode.ABORTED, "it could not go on here")))
            self._end(running, failed=True)

    def forget(self, request_id: str, epoch: int) -> None:
        """Forget it without a word."""
        running = self._running.get(request_id)
        if running is not None and running.epoch == epoch:
            self._end(running, FinishReason.CANCELLED)

    # How a sequence begins and ends.

    def _check_takes(self, spec: SequenceSpec) -> None:
        """Raise StatusError for a sequence that cannot be started."""
        if self.instance.state is not InstanceState.READY:
            raise retry_later(grpc.StatusCode.UNAVAILABLE, "this instance is draining; use another", RETRY_DELAY_S)
        check_sequence(spec)
        former = self._running.get(spec.request_id)
        known = max(former.epoch if former else 0, self.migrator.incoming.newest_epoch(spec.request_id))
        if known >= spec.epoch:
            raise StatusError(grpc.StatusCode.ALREADY_EXISTS, f"request {spec.request_id} is here under epoch {known}")

    async def _take_over(
        self, running: RunningSequence, spec: SequenceSpec, ticket: KvTicket, hidden_state: bytes
    ) -> None:
        """The handoff. Whatever goes wrong, the blocks are freed and the router hears of it once; who cancels this
        frees them (``_stop``)."""
        context = context_of(running.traceparent)
        attributes = {**running.attributes(self.instance.instance_id), names.PREFILL_INSTANCE: ticket.instance_id}
        try:
            if running.before:
                await asyncio.wait(running.before)
            with span(names.SPAN_HANDOFF, context, attributes=attributes) as current:
                await self._metrics.measure_handoff(hand_off(self.instance, spec, ticket, current))
            # Before the start: a sequence may end with its first step, before this has heard that it runs.
            running.begin_span(self.instance.instance_id)
            self.remaining.begun(running, prefilled_tokens=ticket.resident_tokens, hidden_state=hidden_state)
            await self.instance.engine.call(lambda core: core.start(spec, ticket.resident_tokens))
        except StatusError as error:
            await self._fail(running, error)
        except Exception:
            log.exception("handoff of %s failed", spec.request_id)
            await self._fail(
                running, StatusError(grpc.StatusCode.ABORTED, "the handoff failed; see the instance's log")
            )

    async def _fail(self, running: RunningSequence, error: StatusError) -> None:
        await self._free(running)
        if self._running.get(running.request_id) is running:
            self._put(running, running.failure(error))
            self._end(running, failed=True)

    def _put(self, running: RunningSequence, message: sequence_pb2.SequenceOutput) -> None:
        # Without a router it waits in ``token_ids`` and ``end``.
        if running.link is not None:
            running.link.put(message)

    def _bound(self, running: RunningSequence, timeout_s: float) -> None:
        if running.deadline is not None:
            running.deadline.cancel()
        running.deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire, running)

    def _expire(self, running: RunningSequence) -> None:
        if running.link is None:
            # It has just come; a router that still wants it prefills it again.
            self.migrator.incoming.cancel(running.request_id, running.epoch)
            return
        running.link.put(running.cancelled())
        self.remaining.ended(running, FinishReason.CANCELLED)
        self._stop(running)

    def _stop(self, running: RunningSequence) -> None:
        """End a sequence that has not ended by itself, and free its blocks."""
        self._end(running, FinishReason.CANCELLED)
        if self.migrator.outgoing.cancelled(running.request_id):
            return
        request_id = running.request_id
        freeing = self._freeing[request_id] = self.instance.background(self._free_after_handoff(running))

        def freed(task: asyncio.Task[None]) -> None:
            if self._freeing.get(request_id) is task:
                del self._freeing[request_id]

        freeing.add_done_callback(freed)

    async def _free_after_handoff(self, running: RunningSequence) -> None:
        # A pull that is cancelled may still write for a moment: into blocks that must not be another's by then. That
        # goes for the former epoch's too, which freeing this one would free.
        for before in (*running.before, running.handoff):
            if before is not None:
                await asyncio.wait([before])
        await self._free(running)

    def _end(self, running: RunningSequence, reason: FinishReason | None = None, *, failed: bool = False) -> None:
        """Forget a sequence."""
        if self._running.get(running.request_id) is running:
            del self._running[running.request_id]
        if reason in _BY_ITSELF:
            self.remaining.ended(running, reason)
        if running.deadline is not None:
            running.deadline.cancel()
        if running.handoff is not None and running.handoff is not asyncio.current_task():
            running.handoff.cancel()
        running.end_span(reason, failed=failed)
        self.instance.membership.report_soon()

    async def _free(self, running: RunningSequence) -> None:
        await self.instance.engine.call(lambda core: core.cancel(running.request_id, running.epoch))

"""Takes sequences over from prefill instances and decodes them for the routers.

Owns each sequence from its start message to its end: the handoff (reserve blocks, pull, confirm the lease), its
deadline, its cancel. Tokens go to the link of the router that started it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import grpc
from opentelemetry.trace import Span

from services.decode.link import RouterLink
from starmesh.engine.engine import SequenceOutput
from starmesh.engine.scheduler import CapacityError, DuplicateRequest
from starmesh.instance.instance import Instance
from starmesh.instance.intake import check_sequence
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, retry_later
from starmesh.telemetry import names
from starmesh.telemetry.setup import context_of, tracer
from starmesh.transfer import LayoutMismatch, TransferError
from starmesh.types import FinishReason, InstanceState, KvTicket, SequenceSpec
from starmesh.v1 import sequence_pb2

log = logging.getLogger(__name__)

# Blocks come free when a sequence ends, which on a busy instance is a matter of steps.
RETRY_DELAY_S = 0.25


@dataclass(slots=True, eq=False)
class _Running:
    """A sequence and whose it is. ``after`` ends when the blocks of the request's former epoch are free."""

    spec: SequenceSpec
    link: RouterLink
    after: asyncio.Task[None] | None = None
    handoff: asyncio.Task[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    span: Span | None = None
    output_tokens: int = field(default=0)


class DecodeWorker:
    """Decodes sequences, many at a time, for any number of routers."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._running: dict[str, _Running] = {}
        # Sequences that were stopped and whose blocks are not free yet, the newest of each request.
        self._freeing: dict[str, asyncio.Task[None]] = {}

    def start(
        self, link: RouterLink, spec: SequenceSpec, ticket: KvTicket, *, timeout_s: float, traceparent: str
    ) -> None:
        """Take a sequence over. Tokens, its end or its failure go to ``link``."""
        if self._instance.state is not InstanceState.READY:
            error = retry_later(grpc.StatusCode.UNAVAILABLE, "this instance is draining; use another", RETRY_DELAY_S)
            link.put(_failure(spec, error))
            return
        try:
            check_sequence(spec)
        except StatusError as bad:
            link.put(_failure(spec, bad))
            return
        former = self._running.get(spec.request_id)
        if former is not None:
            if former.spec.epoch >= spec.epoch:
                error = StatusError(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"request {spec.request_id} runs here under epoch {former.spec.epoch}",
                )
                link.put(_failure(spec, error))
                return
            # Usually its router has gone on and refuses this; another router's client must not wait for nothing.
            superseded = StatusError(grpc.StatusCode.ABORTED, f"epoch {spec.epoch} of {spec.request_id} is here")
            former.link.put(_failure(former.spec, superseded))
            self._stop(former)
        after = self._freeing.get(spec.request_id)
        running = _Running(spec, link, after, output_tokens=len(spec.output_token_ids))
        self._running[spec.request_id] = running
        running.deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire, running)
        running.handoff = self._instance.background(self._take_over(running, ticket, traceparent))

    def cancel(self, link: RouterLink, request_id: str, epoch: int) -> None:
        """Stop a sequence of ``link`` and free its blocks; unknown ones and newer epochs are left alone."""
        running = self._running.get(request_id)
        if running is not None and running.link is link and running.spec.epoch <= epoch:
            self._stop(running)

    def disconnect(self, link: RouterLink) -> None:
        """Stop every sequence of a router that has gone."""
        for running in [running for running in self._running.values() if running.link is link]:
            self._stop(running)

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Pass on what a step made."""
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None or running.spec.epoch != output.epoch:
                continue
            running.output_tokens = output.offset + len(output.token_ids)
            message = sequence_pb2.SequenceOutput(
                request_id=output.request_id,
                epoch=output.epoch,
                offset=output.offset,
                token_ids=output.token_ids,
                finish_reason=convert.finish_reason_pb(output.finish_reason),
            )
            if output.error is not None:
                status = StatusError(grpc.StatusCode.ABORTED, output.error)
                message.failure.CopyFrom(status.to_sequence_status())
            running.link.put(message)
            if output.finish_reason is not None or output.error is not None:
                self._end(running, output.finish_reason)

    async def close(self) -> None:
        """Give up what is in progress: the routers go on with it elsewhere."""
        for running in list(self._running.values()):
            error = StatusError(grpc.StatusCode.ABORTED, "the instance is stopping")
            running.link.put(_failure(running.spec, error))
            self._stop(running)

    async def _take_over(self, running: _Running, ticket: KvTicket, traceparent: str) -> None:
        """The handoff. Whatever goes wrong, the blocks are freed and the router hears of it once; who cancels this
        frees them (``_stop``)."""
        spec = running.spec
        attributes: dict[str, str | int] = {
            names.REQUEST_ID: spec.request_id,
            names.EPOCH: spec.epoch,
            names.INSTANCE_ID: self._instance.instance_id,
            names.PREFILL_INSTANCE: ticket.instance_id,
        }
        context = context_of(traceparent)
        try:
            if running.after is not None:
                await asyncio.wait([running.after])
            with tracer().start_as_current_span(names.SPAN_HANDOFF, context, attributes=attributes) as span:
                await self._pull(spec, ticket, span)
            # Before the start: a sequence may end with its first step, before this has heard that it runs.
            running.span = tracer().start_span(names.SPAN_DECODE, context, attributes=attributes)
            await self._instance.engine.call(lambda core: core.start(spec, ticket.resident_tokens))
        except StatusError as error:
            await self._free(spec)
            if self._running.get(spec.request_id) is running:
                running.link.put(_failure(spec, error))
                self._end(running)
        except Exception:
            log.exception("handoff of %s failed", spec.request_id)
            await self._free(spec)
            if self._running.get(spec.request_id) is running:
                unexpected = StatusError(grpc.StatusCode.ABORTED, "the handoff failed; see the instance's log")
                running.link.put(_failure(spec, unexpected))
                self._end(running)

    async def _pull(self, spec: SequenceSpec, ticket: KvTicket, span: Span) -> None:
        instance = self._instance
        try:
            block_ids = await instance.engine.call(lambda core: core.reserve(spec.request_id, spec.epoch, spec.tokens))
        except DuplicateRequest as error:
            raise StatusError(grpc.StatusCode.ALREADY_EXISTS, str(error)) from None
        except CapacityError as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
        if block_ids is None:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"no free KV blocks for {spec.tokens} tokens; use another instance",
                RETRY_DELAY_S,
            )
        try:
            result = await instance.pull(ticket, block_ids[: len(ticket.block_ids)])
        except LayoutMismatch as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
        except TransferError as error:
            raise StatusError(grpc.StatusCode.ABORTED, f"pulling KV from {ticket.instance_id}: {error}") from None
        span.set_attribute(names.TRANSFER_BACKEND, result.backend.value)
        span.set_attribute(names.TRANSFER_BYTES, result.bytes)

    def _expire(self, running: _Running) -> None:
        self._report_cancelled(running)
        self._stop(running)

    def _report_cancelled(self, running: _Running) -> None:
        spec = running.spec
        running.link.put(
            sequence_pb2.SequenceOutput(
                request_id=spec.request_id,
                epoch=spec.epoch,
                offset=running.output_tokens,
                finish_reason=sequence_pb2.FINISH_REASON_CANCELLED,
            )
        )

    def _stop(self, running: _Running) -> None:
        """End a sequence that has not ended by itself, and free its blocks."""
        self._end(running, FinishReason.CANCELLED)
        request_id = running.spec.request_id
        freeing = self._freeing[request_id] = self._instance.background(self._free_after_handoff(running))

        def freed(task: asyncio.Task[None]) -> None:
            if self._freeing.get(request_id) is task:
                del self._freeing[request_id]

        freeing.add_done_callback(freed)

    async def _free_after_handoff(self, running: _Running) -> None:
        # A pull that is cancelled may still write for a moment: into blocks that must not be another's by then. That
        # goes for the former epoch's too, which freeing this one would free.
        for before in (running.after, running.handoff):
            if before is not None:
                await asyncio.wait([before])
        await self._free(running.spec)

    def _end(self, running: _Running, reason: FinishReason | None = None) -> None:
        """Forget a sequence."""
        if self._running.get(running.spec.request_id) is running:
            del self._running[running.spec.request_id]
        if running.deadline is not None:
            running.deadline.cancel()
        current = asyncio.current_task()
        if running.handoff is not None and running.handoff is not current:
            running.handoff.cancel()
        if running.span is not None:
            running.span.set_attribute(names.OUTPUT_TOKENS, running.output_tokens)
            if reason is not None:
                running.span.set_attribute(names.FINISH_REASONS, [reason.value])
            running.span.end()
        self._instance.membership.report_soon()

    async def _free(self, spec: SequenceSpec) -> None:
        await self._instance.engine.call(lambda core: core.cancel(spec.request_id, spec.epoch))


def _failure(spec: SequenceSpec, error: StatusError) -> sequence_pb2.SequenceOutput:
    return sequence_pb2.SequenceOutput(
        request_id=spec.request_id,
        epoch=spec.epoch,
        offset=len(spec.output_token_ids),
        failure=error.to_sequence_status(),
    )

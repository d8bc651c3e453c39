"""One sequence on its way in: carries out what the target's table asks for.

Owns the blocks set aside, the pull, the timer, the router and the calls that wait of one migration, and feeds what
comes of them back to the record, one event at a time, on the event loop. Decides nothing: that is
``starmesh.migration.target``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from opentelemetry import trace

from services.decode import migration_spans as spans
from services.decode.claims import Claims
from services.decode.engine_calls import ArrivingSequence
from services.decode.link import RouterLink
from services.decode.running import Sequences, WaitingRouter, not_here
from services.decode.waiting_calls import WaitingCalls
from starmesh.engine.scheduler import SchedulingError
from starmesh.instance.instance import Instance
from starmesh.migration import target
from starmesh.migration import target_effects as effects
from starmesh.migration import target_record as events
from starmesh.migration.table import ProtocolError
from starmesh.migration.terms import LedgerSilent, Limits, OwnerIs, Refusal, Terms, TimedOut
from starmesh.telemetry.setup import note_failure
from starmesh.transfer import TransferError
from starmesh.types import KvTicket, RemainingEstimate, SequenceSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShell:
    """What a migration here acts through. ``on_start`` is called when the instance has won the sequence, ``on_end``
    once, when all is over."""

    instance: Instance
    claims: Claims
    sequences: Sequences
    on_start: Callable[[], None]
    on_end: Callable[[TargetMigration], None]


class TargetMigration:
    """Begins when it is made, on the source's first call. ``on`` takes what the instance sees happen: AbortAsked."""

    def __init__(
        self, shell: TargetShell, terms: Terms, limits: Limits, *, blocks: int, traceparent: str, parent: str
    ) -> None:
        """``traceparent`` is the request's trace context, ``parent`` that of the source's span."""
        self.terms = terms
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shell = shell
        self._instance = shell.instance
        self._loop = asyncio.get_running_loop()
        self._traceparent = traceparent
        self._waiting: WaitingRouter | None = None
        self._sequence = ArrivingSequence(shell.instance, terms.request_id, terms.moved.epoch)
        self._reserve_calls: WaitingCalls[int | Refusal] = WaitingCalls()
        self._calls: WaitingCalls[bool] = WaitingCalls()
        self._pulling: asyncio.Task[None] | None = None
        self._pulled = False
        self._deadline_s = 0.0
        self._estimate: RemainingEstimate | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.pulled_bytes = 0
        self._span = spans.begin_target(terms, parent=parent or traceparent)
        self._end, begun = target.begin(terms, limits, blocks=blocks, now_s=self._loop.time())
        self._carry_out(begun)

    def __repr__(self) -> str:
        return f"<TargetMigration {self.terms.request_id} from {self.terms.source_id}: {self._end.state.name}>"

    @property
    def state(self) -> events.TargetState:
        """Where it stands."""
        return self._end.state

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self._end.over

    # The source's calls.

    async def reserved(self, *, again: bool) -> int | Refusal:
        """The blocks set aside, or why there are none; ``again`` for a call that repeats the first. Raises StatusError
        ABORTED when the migration ends before."""
        return await self._reserve_calls.ask(lambda: self._advance(events.ReserveAsked()) if again else None)

    async def copied(self, asked: events.CopyAsked) -> bool:
        """Whether the round's blocks are here; False when the migration was given up. Raises StatusError
        FAILED_PRECONDITION for a call that does not belong here, and ABORTED when its answer cannot be said."""
        return await self._calls.ask(lambda: self._advance(asked))

    async def committed(
        self, asked: events.CommitAsked, *, remaining_s: float, estimate: RemainingEstimate | None
    ) -> bool:
        """Whether this instance owns the sequence, which is bounded by ``remaining_s`` then, with the last ``estimate``
        of its remaining tokens; as ``copied``."""
        self._estimate = estimate
        self._deadline_s = self._loop.time() + remaining_s
        return await self._calls.ask(lambda: self._advance(asked))

    # The router.

    def attach(self, waiting: WaitingRouter) -> None:
        """A router asks for the sequence: it hears its tokens or that they are not here."""
        if self._waiting is not None and self._waiting.link is not waiting.link:
            self._refuse_router()
        self._waiting = waiting
        self.on(events.Attached())

    def waits(self, link: RouterLink) -> bool:
        """Whether a router waits on ``link`` for the outcome."""
        return self._waiting is not None and self._waiting.link is link

    # The record.

    def on(self, event: events.TargetEvent) -> None:
        """Take an event of this instance's; what comes after the end is dropped."""
        if self.over:
            return
        try:
            self._advance(event)
        except ProtocolError:
            # A bug. The record stands, and its timer ends it.
            log.exception("%r", self)

    def _advance(self, event: events.TargetEvent) -> None:
        self._end, asked = target.advance(self._end, event, self._loop.time())
        log.debug("%r after %s", self, type(event).__name__)
        self._carry_out(asked)
        if self.over:
            self._finish()

    def _carry_out(self, asked: tuple[effects.TargetEffect, ...]) -> None:
        terms, shell, background = self.terms, self._shell, self._instance.background
        for effect in asked:
            match effect:
                case effects.ReserveBlocks(blocks):
                    background(self._reserve(blocks))
                case effects.AnswerReserved(blocks):
                    self._reserve_calls.answer(blocks)
                case effects.AnswerRefused(refusal):
                    self._reserve_calls.answer(refusal)
                case effects.Pull(ticket, local_block_ids):
                    self._pulled = False
                    self._pulling = background(self._pull(ticket, local_block_ids))
                    # A callback, for a task that is cancelled before it begins never runs.
                    self._pulling.add_done_callback(self._on_pull_end)
                case effects.StopPull():
                    assert self._pulling is not None
                    self._pulling.cancel()
                case effects.AnswerCopied() | effects.AnswerCommitted():
                    self._calls.answer(True)
                case effects.AnswerDeclined():
                    self._calls.answer(False)
                case effects.AnswerUndecided():
                    self._calls.leave()
                case effects.Claim(expected, new):
                    claim = shell.claims.claim(terms.request_id, expected, new, wanted=lambda: not self.over)
                    background(self._ask_ledger(claim))
                case effects.AskOwner(at_s):
                    background(self._ask_ledger(shell.claims.owner(terms.request_id, at_s=at_s)))
                case effects.Start(spec, resident_tokens):
                    spec = replace(spec, epoch=terms.moved.epoch)
                    timeout_s = max(0.0, self._deadline_s - self._loop.time())
                    shell.sequences.adopt(
                        spec, timeout_s=timeout_s, traceparent=self._traceparent, estimate=self._estimate
                    )
                    shell.on_start()
                    background(self._start(spec, resident_tokens))
                case effects.ServeRouter():
                    assert self._waiting is not None
                    shell.sequences.serve(terms.request_id, terms.moved.epoch, self._waiting)
                    self._waiting = None
                case effects.RefuseRouter():
                    self._refuse_router()
                case effects.Free():
                    shell.sequences.forget(terms.request_id, terms.moved.epoch)
                    background(self._sequence.free())
                case effects.Disown(epoch):
                    background(shell.claims.disown(terms.request_id, epoch))
                case effects.StartTimer(at_s):
                    self._stop_timer()
                    self._timer = self._loop.call_at(at_s, self.on, TimedOut())
                case _:
                    raise AssertionError(effect)

    # What takes time.

    async def _reserve(self, blocks: int) -> None:
        found = await self._sequence.reserve(blocks)
        self.on(events.NoBlocks(found) if isinstance(found, Refusal) else events.BlocksReserved(found))

    async def _pull(self, ticket: KvTicket, local_block_ids: tuple[int, ...]) -> None:
        span = spans.begin_transfer(self.terms, self._span, blocks=len(local_block_ids))
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                result = await self._instance.pull(ticket, local_block_ids)
            except TransferError as error:
                log.info("%r: %s", self, error)
                note_failure(span, type(error).__name__)
                return
            spans.note_transfer(span, result)
        self.pulled_bytes = result.bytes
        self._pulled = True

    def _on_pull_end(self, task: asyncio.Task[None]) -> None:
        self.on(events.Pulled() if self._pulled else events.PullFailed())

    async def _ask_ledger(self, asking: Awaitable[OwnerIs | LedgerSilent]) -> None:
        self.on(await asking)

    async def _start(self, spec: SequenceSpec, resident_tokens: int) -> None:
        try:
            await self._sequence.start(spec, resident_tokens)
        except (SchedulingError, ValueError) as error:
            log.error("%r could not start: %s", self, error)
            if not self.over:
                self.on(events.StartFailed())
            else:
                self._shell.sequences.give_up(spec.request_id, spec.epoch)
                await self._sequence.free()

    # Ends.

    def _refuse_router(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.link.put(not_here(self.terms.request_id, self.terms.moved.epoch, waiting.offset))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self) -> None:
        self._stop_timer()
        self._reserve_calls.leave()
        self._calls.leave()
        spans.end_target(self._span, self._end)
        self.ended.set_result(None)
        self._shell.on_end(self)

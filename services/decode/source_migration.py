"""One sequence on its way out: carries out what the source's table asks for.

Owns the record, the lease, the timer and the span of one migration, and feeds it what comes of the calls to the target,
the engine and the ledger, one event at a time, on the event loop. Decides nothing: that is
``starmesh.migration.source``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from services.decode import migration_spans as spans
from services.decode.claims import Claims
from services.decode.engine_calls import DepartingSequence
from services.decode.migration_progress import MigrationProgress, ProgressLog
from services.decode.running import RunningSequence
from services.decode.target_calls import TargetCalls, Verdict
from starmesh.instance.instance import Instance
from starmesh.migration import source
from starmesh.migration import source_effects as effects
from starmesh.migration import source_record as events
from starmesh.migration.table import ProtocolError
from starmesh.migration.terms import Cause, LedgerSilent, Limits, OwnerIs, Refusal, Terms, TimedOut
from starmesh.telemetry.setup import traceparent_of
from starmesh.transfer.lease import LeaseTableFull
from starmesh.types import KvTicket, Ownership

log = logging.getLogger(__name__)

_UNDONE: Final[dict[Verdict, events.SourceEvent]] = {
    Verdict.DECLINED: events.Declined(),
    Verdict.NO_ANSWER: events.NoAnswer(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShell:
    """What a migration away acts through. ``tell_moved`` tells the sequence's router that the owner goes on after so
    many output tokens, and forgets the sequence; ``give_up`` tells it that request and epoch could not go on here.
    ``on_end`` is called once, when all is over."""

    instance: Instance
    claims: Claims
    target: TargetCalls
    tell_moved: Callable[[Ownership, int], None]
    give_up: Callable[[str, int], None]
    on_end: Callable[[SourceMigration], None]


class SourceMigration:
    """Begins when it is made. ``on`` takes what the worker sees happen to the sequence: Finished, Cancelled."""

    def __init__(
        self, shell: SourceShell, running: RunningSequence, terms: Terms, limits: Limits, *, traceparent: str
    ) -> None:
        """``traceparent`` is that of the round or command that decided it."""
        self.terms = terms
        self.progress = ProgressLog()
        self._shell = shell
        self._running = running
        self._instance = shell.instance
        self._sequence = DepartingSequence(shell.instance, terms.request_id, terms.epoch)
        self._loop = asyncio.get_running_loop()
        self._arrived_blocks = 0
        self._transfer_bytes = 0
        self._frozen_at_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abort: Cause | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._span = spans.begin_source(terms, request=running.traceparent, command=traceparent)
        self.traceparent = traceparent_of(self._span)
        """For whoever asked for it, to link to."""
        # The first of its calls into the engine: what later ones find is compared with it.
        self._instance.background(self._note_preemptions())
        blocks = -(-running.tokens // self._instance.layout.block_tokens)
        self._end, begun = source.begin(terms, limits, blocks=blocks, now_s=self._loop.time())
        self._carry_out(begun)
        self.progress.tell(self._progress())

    def __repr__(self) -> str:
        return f"<SourceMigration {self.terms.request_id} to {self.terms.target_id}: {self._end.state.name}>"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self._end.over

    async def outcome(self) -> MigrationProgress:
        """How it ended, once it has."""
        return await self.progress.outcome()

    def on(self, event: events.SourceEvent) -> None:
        """Take an event; what comes after the end is dropped."""
        if self._end.over:
            return
        try:
            self._end, asked = source.advance(self._end, event, self._loop.time())
        except ProtocolError:
            # All events are this process's own, so this is a bug. The record stands, and its timer ends it.
            log.exception("%r", self)
            return
        log.debug("%r after %s", self, type(event).__name__)
        self._carry_out(asked)
        self.progress.tell(self._progress())
        if self._end.over:
            self._finish()

    def _carry_out(self, asked: tuple[effects.SourceEffect, ...]) -> None:
        terms, claims, background = self.terms, self._shell.claims, self._instance.background
        for effect in asked:
            match effect:
                case effects.Reserve(blocks):
                    self._call(self._reserve(blocks))
                case effects.Copy(_, _, block_ids):
                    resident_tokens = len(block_ids) * self._instance.layout.block_tokens
                    ticket = self._lease(block_ids, resident_tokens)
                    self._call(self._copy(effect, ticket))
                case effects.Freeze():
                    background(self._freeze())
                case effects.Commit(_, _, block_ids, resident_tokens):
                    ticket = self._lease(block_ids, resident_tokens)
                    self._call(self._commit(effect, ticket))
                case effects.RevokeLease():
                    self._instance.revoke_migration_leases(terms.reservation_id)
                case effects.TakeBack(expected, new):
                    claim = claims.claim(terms.request_id, expected, new, wanted=lambda: not self.over)
                    background(self._ask_ledger(claim))
                case effects.AskOwner(at_s):
                    background(self._ask_ledger(claims.owner(terms.request_id, at_s=at_s)))
                case effects.Resume(epoch):
                    self._running.epoch = epoch
                    background(self._resume(epoch))
                case effects.Drop():
                    background(self._sequence.drop())
                case effects.TellMoved(owner, output_tokens):
                    self._shell.tell_moved(owner, output_tokens)
                case effects.Abort(cause):
                    self._abort = cause
                case effects.StartTimer(at_s):
                    self._stop_timer()
                    self._timer = self._loop.call_at(at_s, self.on, TimedOut())
                case _:
                    raise AssertionError(effect)

    # Calls to the target.

    async def _reserve(self, blocks: int) -> None:
        info = self._instance.membership.info
        answer = await self._shell.target.reserve(
            blocks,
            max_tokens=min(self._running.max_tokens, info.max_sequence_tokens),
            layout=self._instance.layout,
            source_address=info.address,
            request_traceparent=self._running.traceparent,
            traceparent=self.traceparent,
        )
        if answer is None:
            self.on(events.NoAnswer())
        elif isinstance(answer, Refusal):
            self.on(events.Refused(answer))
        else:
            await self._on_arrival(lambda full: events.Reserved(answer, full))

    async def _copy(self, effect: effects.Copy, ticket: KvTicket | None) -> None:
        verdict = await self._verdict(ticket, lambda held: self._shell.target.copy(effect, held))
        if verdict is Verdict.DONE:
            self._arrived_blocks = effect.first_block + len(effect.block_ids)
            await self._on_arrival(events.Copied)
        else:
            self.on(_UNDONE[verdict])

    async def _commit(self, effect: effects.Commit, ticket: KvTicket | None) -> None:
        remaining_s, estimate = self._running.remaining_s, self._running.estimate
        target = self._shell.target
        verdict = await self._verdict(
            ticket, lambda held: target.commit(effect, held, remaining_s=remaining_s, estimate=estimate)
        )
        if verdict is Verdict.DONE:
            self._arrived_blocks = effect.first_block + len(effect.block_ids)
            self.on(events.Committed())
        else:
            self.on(_UNDONE[verdict])

    async def _verdict(
        self, ticket: KvTicket | None, ask: Callable[[KvTicket], Awaitable[tuple[Verdict, int]]]
    ) -> Verdict:
        if ticket is None:
            return Verdict.NO_ANSWER
        verdict, pulled_bytes = await ask(ticket)
        self._transfer_bytes += pulled_bytes
        return verdict

    def _lease(self, block_ids: tuple[int, ...], resident_tokens: int) -> KvTicket | None:
        """The ticket for the next pull, which ends the one before; None when as many leases are out as may be."""
        self._instance.revoke_migration_leases(self.terms.reservation_id)
        try:
            return self._instance.lease_for_migration(self.terms.reservation_id, block_ids, resident_tokens)
        except LeaseTableFull as error:
            log.warning("%r: %s", self, error)
            return None

    # What happens in the engine.

    async def _note_preemptions(self) -> None:
        if not await self._sequence.note_preemptions():
            self.on(events.Preempted())

    async def _on_arrival(self, happened: Callable[[tuple[int, ...]], events.SourceEvent]) -> None:
        """Go on with the full blocks that there are by now."""
        full = await self._sequence.full_block_ids()
        self.on(events.Preempted() if full is None else happened(full))

    async def _freeze(self) -> None:
        frozen = await self._sequence.freeze()
        if frozen is None:
            self.on(events.Preempted())
        else:
            self._frozen_at_s = self._loop.time()
            self.on(frozen)

    async def _resume(self, epoch: int) -> None:
        try:
            await self._sequence.resume(epoch)
        except Exception:
            log.exception("%r: the sequence could not resume", self)
            await self._sequence.drop()
            self._shell.give_up(self.terms.request_id, epoch)

    async def _ask_ledger(self, asking: Awaitable[OwnerIs | LedgerSilent]) -> None:
        self.on(await asking)

    # The record's surroundings.

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._instance.background(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _progress(self) -> MigrationProgress:
        end = self._end
        frozen_s = self._loop.time() - self._frozen_at_s if end.over and self._frozen_at_s is not None else 0.0
        return MigrationProgress(
            reservation_id=self.terms.reservation_id,
            target_id=self.terms.target_id,
            state=end.state,
            rounds=end.rounds,
            copied_blocks=self._arrived_blocks,
            transfer_bytes=self._transfer_bytes,
            cause=end.cause,
            refusal=end.refusal,
            frozen_s=frozen_s,
            traceparent=self.traceparent,
        )

    def _finish(self) -> None:
        self._stop_timer()
        current = asyncio.current_task()
        for call in self._calls:
            # Their answers are of no use any more. (This may be the end of one.)
            if call is not current:
                call.cancel()
        self._instance.background(self._shell.target.close(self._abort))
        how = self._progress()
        spans.end_source(self._span, how)
        log.info("%s to %s: %s", self.terms.request_id, self.terms.target_id, how)
        self._shell.on_end(self)

"""One sequence on its way out of a simulated instance: carries out what the source's table asks for, on virtual time.

Owns the record, the lease and the timer of one migration, and feeds it what comes of the calls to the target, the
engine and the ledger, one event at a time. Decides nothing: that is ``starmesh.migration.source``. The live shell is
``services.decode.source_migration``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starmesh.migration import source
from starmesh.migration import source_effects as effects
from starmesh.migration import source_record as events
from starmesh.migration import target_effects as answers
from starmesh.migration.target_record import CommitAsked, CopyAsked
from starmesh.migration.terms import Cause, Limits, Terms, TimedOut
from starmesh.sim.departing_sequence import DepartingSequence
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.network import Network
from starmesh.sim.owners import Owners
from starmesh.sim.target_calls import Answer, Receiver, TargetCalls
from starmesh.types import KvLayout, KvTicket

_IN_BATCH: Final = frozenset({events.SourceState.RESERVING, events.SourceState.COPYING, events.SourceState.FREEZING})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShell:
    """What a migration away acts through. ``tell_moved`` tells the router who goes on; ``on_end`` is called once, when
    all is over."""

    loop: EventLoop
    network: Network
    owners: Owners
    instance: SimulatedInstance
    layout: KvLayout
    receiver: Receiver
    tell_moved: Callable[[Terms], None]
    on_end: Callable[[SourceMigration], None]


class SourceMigration:
    """``begin`` begins it. ``on_sequence`` takes what its instance sees happen to the sequence."""

    def __init__(self, shell: SourceShell, terms: Terms, limits: Limits, *, tokens: int, max_tokens: int) -> None:
        """The sequence has ``tokens`` tokens now and may grow to ``max_tokens``."""
        self.terms = terms
        self.began_s = shell.loop.now_s
        self.frozen_at_s: float | None = None
        self.transfer_bytes = 0
        self._shell = shell
        self._max_tokens = min(max_tokens, shell.instance.info.max_sequence_tokens)
        self._sequence = DepartingSequence(shell.loop, shell.instance, terms.request_id, terms.epoch)
        self._target = TargetCalls(shell.network, shell.receiver, terms, self._answered)
        self._ticket: KvTicket | None = None
        self._leases = 0
        self._asked_bytes = 0
        self._timer: Event | None = None
        self._question: Event | None = None
        self._abort: Cause | None = None
        self._events: deque[events.SourceEvent] = deque()
        self._busy = False
        blocks = -(-tokens // shell.layout.block_tokens)
        self._end, self._begun = source.begin(terms, limits, blocks=blocks, now_s=self.began_s)

    def __repr__(self) -> str:
        return f"<SourceMigration {self.terms.request_id} to {self.terms.target_id}: {self._end.state.name}>"

    @property
    def end(self) -> events.SourceEnd:
        """Where it stands."""
        return self._end

    def begin(self) -> None:
        """Ask the target for room."""
        self._busy = True
        # The first of its calls into the engine: what later ones find is compared with it.
        self._sequence.note_preemptions(lost=lambda: self._on(events.Preempted()))
        self._carry_out(self._begun)
        self._catch_up()

    def holds(self, ticket: KvTicket) -> bool:
        """Whether a ticket's lease has not ended."""
        return self._ticket is ticket

    def on_sequence(self, event: events.Finished | events.Preempted) -> None:
        """It has happened to a sequence of this request: to the one here, unless that is out of the batch already."""
        if self._end.state in _IN_BATCH:
            self._on(event)

    def target_died(self) -> None:
        """Nobody will answer what has been asked."""
        self._target.target_died()

    def kill(self) -> None:
        """Its instance has died: nothing more of it happens."""
        self._stop()
        self._target.close(None)

    def _on(self, event: events.SourceEvent) -> None:
        """Take an event; what comes after the end is dropped. One that comes of an effect waits for those beside it."""
        self._events.append(event)
        if not self._busy:
            self._catch_up()

    def _catch_up(self) -> None:
        self._busy = True
        while self._events and not self._end.over:
            self._end, asked = source.advance(self._end, self._events.popleft(), self._shell.loop.now_s)
            self._carry_out(asked)
            if self._end.over:
                self._stop()
                self._target.close(self._abort)
                self._shell.on_end(self)
        self._busy = False

    def _carry_out(self, asked: tuple[effects.SourceEffect, ...]) -> None:
        shell, request_id = self._shell, self.terms.request_id
        for effect in asked:
            match effect:
                case effects.Reserve(blocks):
                    self._target.reserve(blocks, max_tokens=self._max_tokens)
                case effects.Copy(number, first_block, block_ids):
                    ticket = self._lease(block_ids, len(block_ids) * shell.layout.block_tokens)
                    self._target.ask(CopyAsked(number, first_block, ticket))
                case effects.Freeze():
                    self._sequence.freeze(self._frozen)
                case effects.Commit(spec, first_block, block_ids, resident_tokens):
                    self._target.ask(CommitAsked(spec, first_block, self._lease(block_ids, resident_tokens)))
                case effects.RevokeLease():
                    self._ticket = None
                case effects.TakeBack(expected, new):
                    self._question = shell.owners.claim(request_id, expected, new, self._on)
                case effects.AskOwner(at_s):
                    self._question = shell.owners.ask(request_id, self._on, at_s=at_s)
                case effects.Resume(epoch):
                    self._sequence.resume(epoch)
                case effects.Drop():
                    self._sequence.drop()
                case effects.TellMoved():
                    shell.tell_moved(self.terms)
                case effects.Abort(cause):
                    self._abort = cause
                case effects.StartTimer(at_s):
                    self._stop_timer()
                    self._timer = shell.loop.at(at_s, lambda: self._on(TimedOut()))
                case _:
                    raise AssertionError(effect)

    def _answered(self, answer: Answer) -> None:
        match answer:
            case answers.AnswerReserved(blocks):
                self._on_arrival(lambda full_block_ids: events.Reserved(blocks, full_block_ids))
            case answers.AnswerRefused(refusal):
                self._on(events.Refused(refusal))
            case answers.AnswerCopied():
                self.transfer_bytes += self._asked_bytes
                self._on_arrival(events.Copied)
            case answers.AnswerCommitted():
                self.transfer_bytes += self._asked_bytes
                self._on(events.Committed())
            case answers.AnswerDeclined():
                self._on(events.Declined())
            case None:
                self._on(events.NoAnswer())

    def _on_arrival(self, happened: Callable[[tuple[int, ...]], events.SourceEvent]) -> None:
        """Go on with the full blocks that there are by now."""
        self._sequence.full_block_ids(lambda full: self._on(events.Preempted() if full is None else happened(full)))

    def _frozen(self, frozen: events.Frozen | None) -> None:
        if frozen is not None:
            self.frozen_at_s = self._shell.loop.now_s
        self._on(events.Preempted() if frozen is None else frozen)

    def _lease(self, block_ids: tuple[int, ...], resident_tokens: int) -> KvTicket:
        """The ticket for the next pull; its lease ends the one before, and itself with the timer of its call."""
        self._leases += 1
        self._asked_bytes = len(block_ids) * self._shell.layout.block_bytes
        self._ticket = KvTicket(
            lease_id=f"{self.terms.reservation_id}/{self._leases}",
            instance_id=self.terms.source_id,
            address=self.terms.source_id,
            layout=self._shell.layout,
            block_ids=block_ids,
            resident_tokens=resident_tokens,
            lease_duration_s=self._end.limits.round_s,
        )
        return self._ticket

    def _stop(self) -> None:
        self._ticket = None
        self._stop_timer()
        if self._question is not None:
            self._question.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

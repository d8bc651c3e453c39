"""One sequence on its way into a simulated instance: carries out what the target's table asks for, on virtual time.

Owns the pull, the timer and the call that waits of one migration, and feeds what comes of them back to the record, one
event at a time. Decides nothing: that is ``starmesh.migration.target``. The live shell is
``services.decode.target_migration``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from starmesh.engine.engine import EngineCore
from starmesh.engine.scheduler import CapacityError, DuplicateRequest
from starmesh.migration import target
from starmesh.migration import target_effects as effects
from starmesh.migration import target_record as events
from starmesh.migration.terms import Limits, Refusal, Terms, TimedOut
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.network import Network
from starmesh.sim.owners import Owners
from starmesh.sim.pull import Pull
from starmesh.sim.target_calls import Answer, Reply
from starmesh.types import KvLayout, KvTicket, SequenceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShell:
    """What a migration here acts through. ``confirm`` says at the source whether a ticket's lease has held.
    ``on_start`` is called when the instance has won the sequence, ``on_end`` once, when all is over."""

    loop: EventLoop
    network: Network
    owners: Owners
    instance: SimulatedInstance
    layout: KvLayout
    confirm: Callable[[Terms, KvTicket], bool]
    on_start: Callable[[TargetMigration], None]
    on_end: Callable[[TargetMigration], None]


class TargetMigration:
    """``begin`` begins it, on the source's first call. ``on`` takes what the instance sees happen: AbortAsked, and
    Attached for the router."""

    def __init__(self, shell: TargetShell, terms: Terms, limits: Limits, *, blocks: int, reply: Reply) -> None:
        self.terms = terms
        self._shell = shell
        self._reply: Reply | None = reply
        self._pull: Pull | None = None
        self._timer: Event | None = None
        self._question: Event | None = None
        self._events: deque[events.TargetEvent] = deque()
        self._busy = False
        self._end, self._begun = target.begin(terms, limits, blocks=blocks, now_s=shell.loop.now_s)

    def __repr__(self) -> str:
        return f"<TargetMigration {self.terms.request_id} from {self.terms.source_id}: {self._end.state.name}>"

    @property
    def end(self) -> events.TargetEnd:
        """Where it stands."""
        return self._end

    def begin(self) -> None:
        """Set blocks aside."""
        self._busy = True
        self._carry_out(self._begun)
        self._catch_up()

    def ask(self, asked: events.CopyAsked | events.CommitAsked, reply: Reply) -> None:
        """The source's next call."""
        self._reply = reply
        self.on(asked)

    def kill(self) -> None:
        """Its instance has died: nothing more of it happens."""
        self._stop()

    def on(self, event: events.TargetEvent) -> None:
        """Take an event; what comes after the end is dropped. One that comes of an effect waits for those beside it."""
        self._events.append(event)
        if not self._busy:
            self._catch_up()

    def _catch_up(self) -> None:
        self._busy = True
        while self._events and not self._end.over:
            self._end, asked = target.advance(self._end, self._events.popleft(), self._shell.loop.now_s)
            self._carry_out(asked)
            if self._end.over:
                self._finish()
        self._busy = False

    def _carry_out(self, asked: tuple[effects.TargetEffect, ...]) -> None:
        terms, shell = self.terms, self._shell
        request_id, epoch = terms.request_id, terms.moved.epoch
        for effect in asked:
            match effect:
                case effects.ReserveBlocks(blocks):
                    shell.instance.call(self._reserving(blocks), self._reserved)
                case effects.AnswerReserved() | effects.AnswerRefused():
                    self._answer(effect)
                case effects.AnswerCopied() | effects.AnswerCommitted() | effects.AnswerDeclined():
                    self._answer(effect)
                case effects.AnswerUndecided():
                    self._answer(None)
                case effects.Pull(ticket):
                    self._begin_pull(ticket)
                case effects.StopPull():
                    assert self._pull is not None
                    self._pull.cancel()
                    shell.loop.after(0.0, lambda: self.on(events.PullFailed()))
                case effects.Claim(expected, new):
                    self._question = shell.owners.claim(request_id, expected, new, self.on)
                case effects.AskOwner(at_s):
                    self._question = shell.owners.ask(request_id, self.on, at_s=at_s)
                case effects.Start(spec, resident_tokens):
                    shell.on_start(self)
                    shell.instance.call(_starting(replace(spec, epoch=epoch), resident_tokens), _demand_success)
                case effects.ServeRouter() | effects.RefuseRouter():
                    pass  # a simulated token counts when it is made, whoever hears of it
                case effects.Free():
                    shell.instance.call(lambda core: core.cancel(request_id, epoch))
                case effects.Disown(epoch_to_remove):
                    shell.owners.disown(request_id, epoch_to_remove)
                case effects.StartTimer(at_s):
                    self._stop_timer()
                    self._timer = shell.loop.at(at_s, lambda: self.on(TimedOut()))
                case _:
                    raise AssertionError(effect)

    def _answer(self, answer: Answer) -> None:
        reply, self._reply = self._reply, None
        if reply is not None:
            reply(answer)

    def _begin_pull(self, ticket: KvTicket) -> None:
        shell, terms = self._shell, self.terms
        self._pull = Pull(
            shell.network,
            holder_id=terms.source_id,
            puller_id=terms.target_id,
            size_bytes=len(ticket.block_ids) * shell.layout.block_bytes,
            confirm=lambda: shell.confirm(terms, ticket),
            done=lambda arrived: self.on(events.Pulled() if arrived else events.PullFailed()),
        )

    def _reserving(self, blocks: int) -> Callable[[EngineCore], tuple[int, ...] | Refusal]:
        """Set aside ``blocks``, or as many as a sequence may have here."""
        request_id, epoch = self.terms.request_id, self.terms.moved.epoch
        tokens = min(blocks * self._shell.layout.block_tokens, self._shell.instance.info.max_sequence_tokens)

        def reserve(core: EngineCore) -> tuple[int, ...] | Refusal:
            try:
                return core.reserve(request_id, epoch, tokens) or Refusal.NO_ROOM
            except DuplicateRequest:
                return Refusal.ALREADY_HERE
            except CapacityError:
                return Refusal.TOO_LONG

        return reserve

    def _reserved(self, found: tuple[int, ...] | Refusal | Exception) -> None:
        if isinstance(found, Exception):
            raise found
        self.on(events.NoBlocks(found) if isinstance(found, Refusal) else events.BlocksReserved(found))

    def _finish(self) -> None:
        self._stop()
        self._answer(None)
        self._shell.on_end(self)

    def _stop(self) -> None:
        self._stop_timer()
        if self._pull is not None:
            self._pull.cancel()
        if self._question is not None:
            self._question.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _starting(spec: SequenceSpec, resident_tokens: int) -> Callable[[EngineCore], None]:
    return lambda core: core.start(spec, resident_tokens)


def _demand_success(result: object) -> None:
    # Whoever has won has its blocks reserved; only a newer claim could take them away.
    if isinstance(result, Exception):
        raise result

"""What a migrator does for the source's end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starmesh.migration import source
from starmesh.migration import source_effects as se
from starmesh.migration import source_record as sr
from starmesh.migration import target_effects as te
from starmesh.migration import target_record as tr
from starmesh.migration.terms import Limits, Terms
from starmesh.types import KvLayout, KvTicket, MigrationReason, Ownership
from tests.migration.engine_model import BLOCK_TOKENS, blocks_for
from tests.migration.wire_model import LedgerCall, Output
from tests.migration.worker_model import Worker

LAYOUT: Final = KvLayout("model", "float32", 1, 1, 1, BLOCK_TOKENS)
LIMITS: Final = Limits(tail_blocks=1, max_rounds=3, headroom_blocks=2)


@dataclass(eq=False)
class Source:
    end: sr.SourceEnd
    preemptions: int
    timer_at_s: float | None = None
    call: int = 0


class SourceShell(Worker):
    """Moves sequences away."""

    def __init__(self, world: Any, instance_id: str) -> None:
        super().__init__(world, instance_id)
        self.sources: dict[str, Source] = {}
        self.leases: dict[str, tuple[str, frozenset[int]]] = {}

    def migrate(self, request_id: str, to: str) -> None:
        sequence = self.sequences[request_id]
        reservation_id = f"r{self.world.next_number()}"
        terms = Terms(
            reservation_id=reservation_id,
            request_id=request_id,
            epoch=sequence.epoch,
            source_id=self.id,
            target_id=to,
            reason=MigrationReason.LOAD,
        )
        end, effects = source.begin(terms, LIMITS, blocks=len(sequence.block_ids), now_s=self.world.now_s)
        self.sources[request_id] = Source(end, sequence.preemptions)
        self.carry_out_source(request_id, effects)

    def on_source(self, request_id: str, event: sr.SourceEvent) -> None:
        moving = self.sources[request_id]
        moving.end, effects = source.advance(moving.end, event, self.world.now_s)
        self.world.note(f"{request_id} source {self.id}: {type(event).__name__} -> {moving.end.state.name}")
        if moving.end.over:
            del self.sources[request_id]
        self.carry_out_source(request_id, effects, moving)

    def carry_out_source(
        self, request_id: str, effects: tuple[se.SourceEffect, ...], moving: Source | None = None
    ) -> None:
        moving = moving or self.sources[request_id]
        terms, world = moving.end.terms, self.world
        for effect in world.one_by_one(self, moving.end, effects):
            match effect:
                case se.Reserve(blocks):
                    moving.call = world.call(self, terms, ("reserve", blocks))
                case se.Copy(number, first_block, block_ids):
                    ticket = self.grant(terms, block_ids, 0)
                    moving.call = world.call(self, terms, ("ask", tr.CopyAsked(number, first_block, ticket)))
                case se.Freeze():
                    self.engine_calls.append(lambda: self.export(request_id, moving))
                case se.Commit(spec, first_block, block_ids, resident_tokens):
                    ticket = self.grant(terms, block_ids, resident_tokens)
                    moving.call = world.call(self, terms, ("ask", tr.CommitAsked(spec, first_block, ticket)))
                case se.RevokeLease():
                    self.revoke(terms.reservation_id)
                case se.TakeBack(expected, new):
                    world.ledger_calls.append(LedgerCall(self.source_ledger(moving), request_id, new, expected))
                case se.AskOwner(at_s):
                    world.ledger_calls.append(LedgerCall(self.source_ledger(moving), request_id, at_s=at_s))
                case se.Resume(epoch):
                    self.engine_calls.append(lambda: self.resume(request_id, terms.epoch, epoch))
                    if request_id in self.running:
                        self.running[request_id].epoch = epoch
                case se.Drop():
                    self.running.pop(request_id, None) if not isinstance(effects[-1], se.TellMoved) else None
                    self.engine_calls.append(lambda: self.remove(request_id, terms.epoch))
                case se.TellMoved(owner, output_tokens):
                    running = self.running.pop(request_id)
                    assert len(running.token_ids) == output_tokens
                    self.put(running, Output(request_id, terms.epoch, output_tokens, moved_to=owner))
                case se.Abort(cause):
                    world.send(self, terms.target_id, ("abort", terms.reservation_id, tr.AbortAsked(cause)))
                case se.StartTimer(at_s):
                    moving.timer_at_s = at_s
                case _:
                    raise AssertionError(effect)

    def source_ledger(self, moving: Source) -> Callable[[Any], None]:
        def answer(event: Any) -> None:
            if self.alive and self.sources.get(moving.end.terms.request_id) is moving:
                self.on_source(moving.end.terms.request_id, event)

        return answer

    def grant(self, terms: Terms, block_ids: tuple[int, ...], resident_tokens: int) -> KvTicket:
        self.revoke(terms.reservation_id)
        lease_id = f"l{self.world.next_number()}"
        self.leases[lease_id] = (terms.reservation_id, frozenset(block_ids))
        return KvTicket(lease_id, self.id, "", LAYOUT, block_ids, resident_tokens, 0.0)

    def revoke(self, owner_key: str) -> None:
        self.leases = {key: lease for key, lease in self.leases.items() if lease[0] != owner_key}

    def resume(self, request_id: str, epoch: int, new_epoch: int) -> None:
        sequence = self.sequences.get(request_id)
        if sequence is not None and sequence.epoch == epoch and sequence.status == "held":
            sequence.status = "running"
            sequence.epoch = new_epoch
            won = new_epoch == epoch or (request_id, Ownership(self.id, new_epoch)) in self.world.won
            assert won, f"{self.id} resumes {request_id} unowned"

    def export(self, request_id: str, moving: Source) -> None:
        sequence = self.sequences.get(request_id)
        event: sr.SourceEvent
        if sequence is None or sequence.epoch != moving.end.terms.epoch:
            return  # an output on its way says what became of it
        if sequence.status == "running":
            sequence.status = "held"
        if sequence.status != "held" or sequence.preemptions != moving.preemptions:
            event = sr.Preempted()
        else:
            blocks = blocks_for(sequence.resident_tokens)
            event = sr.Frozen(sequence.spec(), tuple(sequence.block_ids[:blocks]), sequence.resident_tokens)
        self.answers.append(lambda: self.to_source(request_id, moving, event))

    def to_source(self, request_id: str, moving: Source, event: sr.SourceEvent) -> None:
        if self.sources.get(request_id) is moving:
            self.on_source(request_id, event)

    def answered(self, request_id: str, call: int, answer: object) -> None:
        """The answer to a call to the target; None when there is none."""
        moving = self.sources.get(request_id)
        if moving is None or moving.call != call:
            return
        moving.call = 0
        if isinstance(answer, te.AnswerReserved | te.AnswerCopied):
            self.engine_calls.append(lambda: self.progress(request_id, moving, answer))
            return
        event: sr.SourceEvent = sr.NoAnswer()
        if isinstance(answer, te.AnswerRefused):
            event = sr.Refused(answer.refusal)
        elif isinstance(answer, te.AnswerCommitted):
            event = sr.Committed()
        elif isinstance(answer, te.AnswerDeclined):
            event = sr.Declined()
        self.on_source(request_id, event)

    def progress(self, request_id: str, moving: Source, answer: te.AnswerReserved | te.AnswerCopied) -> None:
        sequence = self.sequences.get(request_id)
        event: sr.SourceEvent
        if sequence is None or sequence.epoch != moving.end.terms.epoch:
            return  # an output on its way says what became of it
        if sequence.status != "running" or sequence.preemptions != moving.preemptions:
            event = sr.Preempted()
        else:
            full = tuple(sequence.block_ids[: sequence.resident_tokens // BLOCK_TOKENS])
            event = sr.Reserved(answer.blocks, full) if isinstance(answer, te.AnswerReserved) else sr.Copied(full)
        self.answers.append(lambda: self.to_source(request_id, moving, event))

"""What a migrator does for the target's end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starmesh.migration import target
from starmesh.migration import target_effects as te
from starmesh.migration import target_record as tr
from starmesh.migration.table import ProtocolError
from starmesh.migration.terms import Refusal, Terms
from starmesh.types import KvTicket, Ownership, SequenceSpec
from tests.migration.engine_model import Sequence
from tests.migration.source_model import LIMITS
from tests.migration.wire_model import LedgerCall, Output
from tests.migration.worker_model import Running, Worker

if TYPE_CHECKING:
    from tests.migration.instance_model import Instance


@dataclass(eq=False)
class Target:
    end: tr.TargetEnd
    timer_at_s: float | None = None
    reserve_call: int = 0
    call: int = 0


@dataclass(eq=False)
class Pulling:
    """A pull under way: blocks are read one at a time, then the holder confirms the lease."""

    taking: Target
    ticket: KvTicket
    local_block_ids: tuple[int, ...]
    holder: Instance
    read: int = 0
    stopped: bool = False


class TargetShell(Worker):
    """Takes sequences in."""

    def __init__(self, world: Any, instance_id: str) -> None:
        super().__init__(world, instance_id)
        self.targets: dict[str, Target] = {}
        self.pulls: list[Pulling] = []

    def called(self, call: int, terms: Terms, request: tuple[str, Any]) -> None:
        kind, body = request
        reservation_id = terms.reservation_id
        taking = self.targets.get(reservation_id)
        if kind == "reserve":
            if taking is not None:
                self.on_target(reservation_id, tr.ReserveAsked())
                return
            if any(other.end.terms.request_id == terms.request_id for other in self.targets.values()):
                self.world.answer(call, te.AnswerRefused(Refusal.ALREADY_HERE))
                return
            end, effects = target.begin(terms, LIMITS, blocks=body, now_s=self.world.now_s)
            self.targets[reservation_id] = Target(end, reserve_call=call)
            self.carry_out_target(reservation_id, effects)
        elif taking is None:
            self.world.answer(call, None)
        else:
            taking.call = call
            try:
                self.on_target(reservation_id, body)
            except ProtocolError:
                self.world.answer(call, None)

    def on_target(self, reservation_id: str, event: tr.TargetEvent) -> None:
        taking = self.targets[reservation_id]
        taking.end, effects = target.advance(taking.end, event, self.world.now_s)
        self.world.note(
            f"{taking.end.terms.request_id} target {self.id}: {type(event).__name__} -> {taking.end.state.name}"
        )
        self.carry_out_target(reservation_id, effects)
        if taking.end.over:
            del self.targets[reservation_id]
            self.parked.pop(reservation_id, None)

    def carry_out_target(self, reservation_id: str, effects: tuple[te.TargetEffect, ...]) -> None:
        taking, world = self.targets[reservation_id], self.world
        terms = taking.end.terms
        request_id, epoch = terms.request_id, terms.moved.epoch
        for effect in world.one_by_one(self, taking.end, effects):
            match effect:
                case te.ReserveBlocks(blocks, epoch_to_come):
                    self.engine_calls.append(lambda: self.reserve(taking, blocks, epoch_to_come))
                case te.AnswerReserved() | te.AnswerRefused():
                    world.answer(taking.reserve_call, effect)
                case te.Pull(ticket, local_block_ids):
                    holder = world.lives[terms.source_id]
                    self.pulls.append(Pulling(taking, ticket, local_block_ids, holder))
                case te.StopPull():
                    for pull in self.pulls:
                        pull.stopped = pull.stopped or pull.taking is taking
                case te.AnswerCopied() | te.AnswerCommitted() | te.AnswerDeclined():
                    world.answer(taking.call, effect)
                case te.AnswerUndecided():
                    world.answer(taking.call, None)
                case te.Claim(expected, new):
                    world.ledger_calls.append(LedgerCall(self.target_ledger(taking), request_id, new, expected))
                case te.AskOwner(at_s):
                    world.ledger_calls.append(LedgerCall(self.target_ledger(taking), request_id, at_s=at_s))
                case te.Start(spec, resident_tokens):
                    outputs = list(spec.output_token_ids)
                    self.running[request_id] = Running(epoch, None, epoch, token_ids=outputs)
                    self.engine_calls.append(lambda: self.begin(taking, spec, epoch, resident_tokens))
                case te.ServeRouter():
                    link, offset = self.parked.pop(reservation_id)
                    self.serve(request_id, link, offset)
                case te.RefuseRouter():
                    if reservation_id in self.parked:
                        link, offset = self.parked.pop(reservation_id)
                        link.down.append(Output(request_id, epoch, offset, failed=True))
                case te.Free():
                    if request_id in self.running and self.running[request_id].epoch == epoch:
                        del self.running[request_id]
                    self.engine_calls.append(lambda: self.remove(request_id, epoch))
                case te.Disown(epoch_to_remove):
                    world.disown(request_id, epoch_to_remove)
                case te.StartTimer(at_s):
                    taking.timer_at_s = at_s
                case _:
                    raise AssertionError(effect)

    def target_ledger(self, taking: Target) -> Callable[[Any], None]:
        def answer(event: Any) -> None:
            if self.alive and self.targets.get(taking.end.terms.reservation_id) is taking:
                self.on_target(taking.end.terms.reservation_id, event)

        return answer

    def reserve(self, taking: Target, blocks: int, epoch: int) -> None:
        request_id = taking.end.terms.request_id
        event: tr.TargetEvent = tr.NoBlocks(Refusal.NO_ROOM)
        if self.known_epoch(request_id) < epoch:
            self.remove(request_id, epoch - 1)
            block_ids = self.allocate(blocks)
            if block_ids is not None:
                self.incoming[request_id] = (epoch, block_ids)
                event = tr.BlocksReserved(tuple(block_ids))
        self.answers.append(lambda: self.to_target(taking, event))

    def begin(self, taking: Target, spec: SequenceSpec, epoch: int, resident_tokens: int) -> None:
        request_id = spec.request_id
        assert (request_id, Ownership(self.id, epoch)) in self.world.won, f"{self.id} starts {request_id} unowned"
        assert self.incoming[request_id][0] == epoch
        _, block_ids = self.incoming.pop(request_id)
        token_ids = [*spec.prompt_token_ids, *spec.output_token_ids]
        prompt_tokens = len(spec.prompt_token_ids)
        limit = spec.sampling.max_output_tokens
        assert taking.end.block_ids == tuple(block_ids)
        self.sequences[request_id] = Sequence(
            request_id, epoch, token_ids, prompt_tokens, limit, block_ids, resident_tokens
        )

    def to_target(self, taking: Target, event: tr.TargetEvent) -> None:
        if self.targets.get(taking.end.terms.reservation_id) is taking:
            self.on_target(taking.end.terms.reservation_id, event)

    def pull_some(self, pull: Pulling) -> None:
        """Read one block, or have the lease confirmed, or break off."""
        if not pull.stopped and pull.holder.alive and pull.read < len(pull.local_block_ids):
            local = pull.local_block_ids[pull.read]
            _, reserved = self.incoming.get(pull.taking.end.terms.request_id, (0, []))
            assert local in reserved, f"a pull writes into block {local} of {self.id}, which was freed"
            self.content[local] = pull.holder.content[pull.ticket.block_ids[pull.read]]
            pull.read += 1
            return
        confirmed = not pull.stopped and pull.holder.alive and pull.ticket.lease_id in pull.holder.leases
        if confirmed:
            del pull.holder.leases[pull.ticket.lease_id]
        self.pull_ended(pull, tr.Pulled() if confirmed else tr.PullFailed())

    def pull_ended(self, pull: Pulling, event: tr.TargetEvent) -> None:
        self.pulls.remove(pull)
        self.to_target(pull.taking, event)

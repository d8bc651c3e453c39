"""What a decode worker does: whose a sequence is, and who hears of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starmesh.migration import source_record as sr
from starmesh.migration import target_record as tr
from starmesh.migration.terms import Cause
from starmesh.types import SequenceSpec
from tests.migration.engine_model import Engine, Sequence, blocks_for
from tests.migration.wire_model import Link, Output

if TYPE_CHECKING:
    from tests.migration.world import World


@dataclass(eq=False)
class Running:
    """What a decode worker knows of a sequence: who hears of it, and what nobody has heard yet."""

    epoch: int
    link: Link | None
    began: int  # the epoch under which the router started or attached to it; ``epoch`` may have been raised since
    backlog: list[Output] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # all outputs
    ended: bool = False


class Worker(Engine):
    """An engine with routers."""

    def __init__(self, world: World, instance_id: str) -> None:
        super().__init__(instance_id)
        self.world = world
        self.alive = True
        self.running: dict[str, Running] = {}
        self.parked: dict[str, tuple[Link, int]] = {}  # routers that wait for a claim, by reservation

    def put(self, running: Running, output: Output) -> None:
        if running.link is None:
            running.backlog.append(output)
        else:
            running.link.down.append(output)

    def deliver(self, output: Output) -> None:
        running = self.running.get(output.request_id)
        if running is None or running.epoch > output.epoch or running.ended:
            return
        running.token_ids += output.token_ids
        self.put(running, output)
        if output.finished or output.failed:
            running.ended = True
            if running.link is not None:
                del self.running[output.request_id]
            moving = self.sources.get(output.request_id)
            if moving is not None:
                self.on_source(output.request_id, sr.Finished())

    def start(self, link: Link, spec: SequenceSpec) -> None:
        """A router's StartSequence; the prefill's KV is taken as pulled."""
        request_id = spec.request_id
        former = self.running.get(request_id)
        for reservation_id, taking in list(self.targets.items()):
            if taking.end.terms.request_id == request_id:
                self.on_target(reservation_id, tr.AbortAsked(Cause.SUPERSEDED))
        if any(taking.end.terms.request_id == request_id for taking in self.targets.values()):
            # A pull still writes into blocks of it.
            link.down.append(Output(request_id, spec.epoch, len(spec.output_token_ids), failed=True))
            return
        if self.known_epoch(request_id) >= spec.epoch or (former is not None and former.epoch >= spec.epoch):
            link.down.append(Output(request_id, spec.epoch, len(spec.output_token_ids), failed=True))
            return
        if former is not None:
            self.end(request_id)
        running = self.running[request_id] = Running(
            spec.epoch, link, spec.epoch, token_ids=list(spec.output_token_ids)
        )
        token_ids = [*spec.prompt_token_ids, *spec.output_token_ids]

        def call() -> None:
            self.remove(request_id, spec.epoch - 1)
            block_ids = None if self.known_epoch(request_id) else self.allocate(blocks_for(len(token_ids)))
            if block_ids is None:
                failed = Output(request_id, spec.epoch, len(spec.output_token_ids), failed=True)
                self.answers.append(lambda: self.deliver(failed))
                return
            sequence = Sequence(
                request_id,
                spec.epoch,
                token_ids,
                len(spec.prompt_token_ids),
                spec.sampling.max_output_tokens,
                block_ids,
                0,
            )
            self.write_kv(sequence, len(token_ids) - 1)
            self.sequences[request_id] = sequence

        assert self.running[request_id] is running
        self.engine_calls.append(call)

    def end(self, request_id: str) -> None:
        """The router wants no more of it."""
        running = self.running.pop(request_id, None)
        moving = self.sources.get(request_id)
        if moving is not None:
            self.on_source(request_id, sr.Cancelled())
        elif running is not None:
            self.engine_calls.append(lambda: self.remove(request_id, running.epoch))

    def cancel(self, link: Link, request_id: str, epoch: int) -> None:
        """A router's CancelSequence; its epoch is what the router had heard of."""
        for reservation_id, taking in list(self.targets.items()):
            terms = taking.end.terms
            if terms.request_id == request_id and terms.moved.epoch <= epoch:
                self.on_target(reservation_id, tr.AbortAsked(Cause.CANCELLED))
        running = self.running.get(request_id)
        if running is not None and running.link is link and running.began <= epoch:
            self.end(request_id)

    def attach(self, link: Link, request_id: str, epoch: int, offset: int) -> None:
        for reservation_id, taking in self.targets.items():
            terms = taking.end.terms
            if terms.request_id == request_id and terms.moved.epoch == epoch:
                self.parked[reservation_id] = (link, offset)
                self.on_target(reservation_id, tr.Attached())
                return
        running = self.running.get(request_id)
        if running is not None and running.epoch == epoch:
            self.serve(request_id, link, offset)
        else:
            link.down.append(Output(request_id, epoch, offset, failed=True))

    def serve(self, request_id: str, link: Link, offset: int) -> None:
        running = self.running[request_id]
        running.link, running.backlog = link, []
        token_ids = tuple(running.token_ids[offset:])
        link.down.append(Output(request_id, running.epoch, offset, token_ids, finished=running.ended))
        if running.ended:
            del self.running[request_id]

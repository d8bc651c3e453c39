"""A decode instance that follows a script, and moves sequences to another when a test says so.

A move here is its outcome alone: the source lets the sequence go, the ledger's entry changes, the target has it. What
the router is to hear of it is the test's choice. The protocol between the two instances is tested elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from starmesh.ledger import Ledger
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError
from starmesh.types import FinishReason, Ownership, Role, SequenceLoad, SequenceSpec
from starmesh.v1 import decode_pb2, decode_pb2_grpc, sequence_pb2
from tests.router.peers import Peer, finish_of, next_token

LONG_S = 600.0

Message = sequence_pb2.SequenceOutput | decode_pb2.SequenceMove
Outbox = asyncio.Queue[Message | None]


@dataclass(eq=False)
class Running:
    """A sequence that a router listens to, or, without an outbox, one that has moved here and waits for its router."""

    spec: SequenceSpec
    epoch: int
    outbox: Outbox | None
    token_ids: list[int]
    task: asyncio.Task[None] | None = None
    began: int = 0  # the epoch under which the router started it or attached; ``epoch`` may have been raised since

    def put(self, offset: int, finish: FinishReason | None = None) -> None:
        """Send the output tokens from ``offset`` on."""
        assert self.outbox is not None
        self.outbox.put_nowait(
            sequence_pb2.SequenceOutput(
                request_id=self.spec.request_id,
                epoch=self.epoch,
                offset=offset,
                token_ids=self.token_ids[offset:],
                finish_reason=convert.finish_reason_pb(finish),
            )
        )


class DecodePeer(Peer, decode_pb2_grpc.DecodeServiceServicer):
    """A decode instance."""

    def __init__(self, ledger: Ledger, instance_id: str = "decode-0", **options: Any) -> None:
        super().__init__(ledger, Role.DECODE, instance_id, **options)
        self.pause_after: int | None = None
        """Sequences wait for ``resume`` at this many output tokens."""
        self._resumed = asyncio.Event()
        self.tamper: Callable[[sequence_pb2.SequenceOutput], list[sequence_pb2.SequenceOutput]] = lambda output: [
            output
        ]
        """What is sent in place of each output."""
        self.cancelled: list[tuple[str, int]] = []
        self.attached: list[tuple[str, int, int]] = []
        """What routers have asked for: request, epoch and offset."""
        self.traceparents: list[str] = []
        self.started: list[decode_pb2.StartSequence] = []
        self.streams = 0
        self.running: dict[str, Running] = {}
        self.orders: list[decode_pb2.MigrateRequest] = []
        self.on_order: Callable[[decode_pb2.MigrateRequest], AsyncIterator[decode_pb2.MigrateResponse]] | None = None
        """What Migrate does."""

    def resume(self) -> None:
        """Let all go on."""
        self.pause_after = None
        self._resumed.set()

    async def move(
        self, request_id: str, target: DecodePeer, *, claim: bool = True, arrive: bool = True, tell: bool = True
    ) -> None:
        """Move a sequence to ``target``; ``claim`` it in the ledger, let it ``arrive`` and ``tell`` the router."""
        running = self.running.pop(request_id)
        assert running.task is not None and running.outbox is not None
        running.task.cancel()
        self.sequences.pop(request_id, None)
        epoch = running.epoch + 1
        if claim:
            before = Ownership(self.instance_id, running.epoch)
            await self.ledger.claim(request_id, target.instance_id, expected=before, epoch=epoch, ttl_s=LONG_S)
        if arrive:
            target.running[request_id] = Running(running.spec, epoch, None, running.token_ids)
            target._report(running.spec, epoch, len(running.token_ids))
        if tell:
            running.outbox.put_nowait(self.word_of_move(request_id, epoch, target))

    async def take_back(self, request_id: str) -> None:
        """Go on with a sequence under the epoch of a source that has won it back from a migration."""
        running = self.running[request_id]
        before = Ownership(self.instance_id, running.epoch)
        running.epoch += 2
        await self.ledger.claim(request_id, self.instance_id, expected=before, epoch=running.epoch, ttl_s=LONG_S)

    def word_of_move(self, request_id: str, epoch: int, target: DecodePeer) -> decode_pb2.SequenceMove:
        """What a source tells a router."""
        return decode_pb2.SequenceMove(
            request_id=request_id, epoch=epoch, instance_id=target.instance_id, address=target.info.address
        )

    def tell(self, move: decode_pb2.SequenceMove) -> None:
        """Send word of a move to the router of the sequence, which stays."""
        running = self.running[move.request_id]
        assert running.outbox is not None
        running.outbox.put_nowait(move)

    def _register_service(self) -> None:
        service = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
        self.server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, self, service)

    async def Migrate(  # noqa: N802
        self, request: decode_pb2.MigrateRequest, context: Any
    ) -> AsyncIterator[decode_pb2.MigrateResponse]:
        self.orders.append(request)
        assert self.on_order is not None
        async for progress in self.on_order(request):
            yield progress

    async def Decode(  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        outbox: Outbox = asyncio.Queue()
        self.streams += 1

        async def read() -> None:
            async for request in request_iterator:
                match request.WhichOneof("action"):
                    case "start":
                        self._start(request.start, outbox)
                    case "attach":
                        self._attach(request.attach, outbox)
                    case "cancel":
                        self._cancel(request.cancel, outbox)
            outbox.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (message := await outbox.get()) is not None:
                gathered = [message]
                while not outbox.empty() and (more := outbox.get_nowait()) is not None:
                    gathered.append(more)
                response = decode_pb2.DecodeResponse()
                for made in gathered:
                    if isinstance(made, decode_pb2.SequenceMove):
                        response.moves.append(made)
                    else:
                        response.outputs.extend(self.tamper(made))
                yield response
        finally:
            reader.cancel()
            for request_id, running in list(self.running.items()):
                if running.outbox is outbox and running.task is not None:
                    running.task.cancel()
                    del self.running[request_id]

    def _start(self, start: decode_pb2.StartSequence, outbox: Outbox) -> None:
        spec = convert.spec(start.sequence)
        self.traceparents.append(start.traceparent)
        self.started.append(start)
        self.specs.append(spec)
        if self.script:
            self._fail(spec.request_id, spec.epoch, len(spec.output_token_ids), self.script.popleft(), outbox)
            return
        running = Running(spec, spec.epoch, outbox, list(spec.output_token_ids), began=spec.epoch)
        self._go_on(running)

    def _attach(self, attach: decode_pb2.AttachSequence, outbox: Outbox) -> None:
        self.attached.append((attach.request_id, attach.epoch, attach.offset))
        running = self.running.get(attach.request_id)
        if running is None or running.epoch != attach.epoch:
            unknown = StatusError(grpc.StatusCode.NOT_FOUND, "it is not here")
            self._fail(attach.request_id, attach.epoch, attach.offset, unknown, outbox)
            return
        running.outbox, running.began = outbox, attach.epoch
        running.put(attach.offset)
        self._go_on(running)

    def _cancel(self, cancel: decode_pb2.CancelSequence, outbox: Outbox) -> None:
        self.cancelled.append((cancel.request_id, cancel.epoch))
        running = self.running.get(cancel.request_id)
        if running is not None and running.outbox in (outbox, None) and running.began <= cancel.epoch:
            if running.task is not None:
                running.task.cancel()
            self._forget(running)

    def _fail(self, request_id: str, epoch: int, offset: int, error: StatusError, outbox: Outbox) -> None:
        failure = error.to_sequence_status()
        outbox.put_nowait(
            sequence_pb2.SequenceOutput(request_id=request_id, epoch=epoch, offset=offset, failure=failure)
        )

    def _go_on(self, running: Running) -> None:
        self.running[running.spec.request_id] = running
        self._report(running.spec, running.epoch, len(running.token_ids))
        running.task = asyncio.create_task(self._generate(running))

    def _report(self, spec: SequenceSpec, epoch: int, output_tokens: int) -> None:
        prompt_tokens = len(spec.prompt_token_ids)
        self.sequences[spec.request_id] = SequenceLoad(
            spec.request_id, epoch, prompt_tokens, output_tokens, prompt_tokens, spec.sampling.max_output_tokens
        )

    def _forget(self, running: Running) -> None:
        self.running.pop(running.spec.request_id, None)
        self.sequences.pop(running.spec.request_id, None)

    async def _generate(self, running: Running) -> None:
        spec, output = running.spec, running.token_ids
        finish = finish_of(spec, output)
        while finish is None:
            while self.pause_after is not None and len(output) >= self.pause_after:
                self._resumed.clear()
                await self._resumed.wait()
            await asyncio.sleep(0)
            output.append(next_token([*spec.prompt_token_ids, *output]))
            finish = finish_of(spec, output)
            if finish is not None:
                self._forget(running)
            running.put(len(output) - 1, finish)

"""Decode instances that move sequences among them by real calls, and a router that follows.

The router is as small as docs/migration.md lets it be: it starts, attaches where it is told to, refuses what is not the
next token, and never recovers, so that a failure is seen. Each instance has a switch on its way to the ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from services.decode.config import MigratorConfig, PredictorConfig
from services.decode.outgoing import MoveAsked
from services.decode.outgoing import _stays_for as stays_for
from services.decode.servicer import DecodeServicer
from services.decode.source_migration import SourceMigration
from services.decode.worker import DecodeWorker
from services.prefill.worker import PrefillWorker
from services.router.stream import TokenStream, Verdict
from starmesh.clock import WallClock
from starmesh.engine.batch import Batch, StepResult
from starmesh.instance.instance import Instance
from starmesh.ledger import LedgerUnavailable
from starmesh.ledger.memory import MemoryLedger
from starmesh.migration.target_record import TargetState
from starmesh.migration.terms import Limits
from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.rpc.status import StatusError, from_sequence_status
from starmesh.types import FinishReason, KvTicket, MigrationReason, Ownership, RemainingEstimate, Role, SequenceSpec
from starmesh.v1 import decode_pb2, decode_pb2_grpc
from tests.engine.checking_executor import reference_tokens
from tests.instance.running import PATIENCE_S, MemoryExecutor, Running, running_instance, until

STEP_S = 0.01
# Calls may take long on a busy machine; the tests of those that are not answered have limits of their own.
LIMITS = Limits(tail_blocks=1, max_rounds=3, headroom_blocks=32, reserve_s=10.0, freeze_s=10.0, commit_s=10.0)


SLOWER_TOKENS = 20


class PacedExecutor(MemoryExecutor):
    """Steps take a little, so that a sequence is still under way when its migration is, until they need not. The longer
    a sequence, the longer: each ``SLOWER_TOKENS`` tokens add as much as the first step takes, for a busy machine may
    let the engine run and nothing else."""

    def __init__(self, total_blocks: int) -> None:
        super().__init__(total_blocks)
        self.step_s = STEP_S

    def execute(self, batch: Batch) -> StepResult:
        longest = max(len(item.history or ()) for item in batch.items)
        time.sleep(self.step_s * (1 + longest / SLOWER_TOKENS))
        return super().execute(batch)


class SwitchedLedger:
    """One process's way to the ledger, which may lose answers: ``claim_answers`` says of the next claims whether they
    are "done" without an answer or "lost" before, ``silent`` of all that is asked that it is not answered."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self._ledger = ledger
        self.claim_answers: list[str] = []
        self.silent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def claim(self, *args: Any, **kwargs: Any) -> None:
        how = self.claim_answers.pop(0) if self.claim_answers else ""
        if how != "lost" and not self.silent:
            await self._ledger.claim(*args, **kwargs)
        if how or self.silent:
            raise LedgerUnavailable("switched off")

    async def owner(self, request_id: str) -> Ownership | None:
        if self.silent:
            raise LedgerUnavailable("switched off")
        return await self._ledger.owner(request_id)

    async def report(self, *args: Any, **kwargs: Any) -> bool:
        if self.silent:
            raise LedgerUnavailable("switched off")
        return await self._ledger.report(*args, **kwargs)


class Hold:
    """Holds calls of an asynchronous method up until ``open`` is set: those made ``when``, before they begin, or
    ``after`` they are done."""

    def __init__(self, owner: Any, name: str, when: Callable[[], bool] = lambda: True, *, after: bool = False) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self._when = when
        self._after = after
        self._method = getattr(owner, name)
        setattr(owner, name, self)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._when():
            return await self._method(*args, **kwargs)
        done = await self._method(*args, **kwargs) if self._after else None
        self.reached.set()
        await self.open.wait()
        return done if self._after else await self._method(*args, **kwargs)

    async def until_reached(self) -> None:
        await asyncio.wait_for(self.reached.wait(), PATIENCE_S)


class Request:
    """One request as its router sees it."""

    def __init__(self, spec: SequenceSpec, owner: Ownership, hurry: Callable[[], None]) -> None:
        self.spec = spec
        self._hurry = hurry
        self.owner = owner
        self.stream = TokenStream(max_output_tokens=spec.sampling.max_output_tokens)
        self.stream.begin(owner.epoch)
        self.stream.accept(owner.epoch, 0, spec.output_token_ids, None)
        self.reference = reference_tokens(spec.prompt_token_ids, spec.sampling.max_output_tokens)
        self.moves: list[decode_pb2.SequenceMove] = []
        self.failure: StatusError | None = None
        self.follows = True
        """Whether a move is followed by itself."""
        self.refused = 0
        """Outputs that came from elsewhere or of an older epoch."""
        self.changed = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.stream.finish_reason is not None or self.failure is not None

    async def ended(self) -> FinishReason | None:
        """Wait for the end, which no failure may have brought about; steps take no time from now on."""
        self._hurry()
        await self.until(lambda: self.over)
        assert self.failure is None, self.failure
        return self.stream.finish_reason

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.changed.wait()
                self.changed.clear()

    def check(self) -> None:
        """Every token so far is the reference's."""
        tokens = self.stream.token_ids
        assert tokens == self.reference[: len(tokens)]


class Router:
    """Streams to the instances, and the requests on them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls: dict[str, Any] = {}
        # gRPC fails a write that begins while another of the same stream is under way.
        self._writes: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._channels: list[Any] = []
        self.requests: dict[str, Request] = {}

    async def start(
        self,
        spec: SequenceSpec,
        instance_id: str,
        *,
        traceparent: str = "",
        estimate: RemainingEstimate | None = None,
    ) -> Request:
        """Prefill and start a sequence, and wait until a token has come."""
        done = await self._cluster.prefill.worker.prefill(spec, "checking")
        assert done.ticket is not None
        spec = replace(spec, output_token_ids=(*spec.output_token_ids, done.token_id))
        ledger = self._cluster.ledger
        await ledger.claim(spec.request_id, instance_id, expected=None, epoch=spec.epoch, ttl_s=30)
        request = self.requests[spec.request_id] = Request(
            spec, Ownership(instance_id, spec.epoch), self._cluster.hurry
        )
        await self.start_on(
            instance_id,
            spec,
            done.ticket,
            traceparent=traceparent,
            hidden_state=done.hidden_state,
            hidden_layout=convert.hidden_layout_pb(done.hidden_layout) if done.hidden_layout is not None else None,
            estimate=convert.estimate_pb(estimate) if estimate is not None else None,
        )
        await request.until(lambda: len(request.stream.token_ids) > len(spec.output_token_ids) or request.failure)
        return request

    async def start_on(self, instance_id: str, spec: SequenceSpec, ticket: KvTicket, **fields: Any) -> None:
        start = decode_pb2.StartSequence(sequence=convert.spec_pb(spec), ticket=convert.ticket_pb(ticket), **fields)
        await self.send(instance_id, decode_pb2.DecodeRequest(start=start))

    async def attach(self, request: Request, owner: Ownership, *, offset: int | None = None) -> None:
        request.owner = owner
        request.stream.begin(owner.epoch)
        have = len(request.stream.token_ids) if offset is None else offset
        attach = decode_pb2.AttachSequence(request_id=request.spec.request_id, epoch=owner.epoch, offset=have)
        await self.send(owner.instance_id, decode_pb2.DecodeRequest(attach=attach))

    async def cancel(self, instance_id: str, request_id: str, epoch: int) -> None:
        cancel = decode_pb2.CancelSequence(request_id=request_id, epoch=epoch)
        await self.send(instance_id, decode_pb2.DecodeRequest(cancel=cancel))

    async def send(self, instance_id: str, message: decode_pb2.DecodeRequest) -> None:
        if instance_id not in self._calls:
            self._calls[instance_id] = self._cluster.stub(instance_id).Decode()
            self._readers[instance_id] = asyncio.create_task(self._read(instance_id))
        async with self._writes[instance_id]:
            await self._calls[instance_id].write(message)

    def channel(self, instance_id: str) -> Any:
        """A new channel to an instance."""
        self._channels.append(open_channel(self._cluster.address(instance_id)))
        return self._channels[-1]

    async def part(self, instance_id: str) -> None:
        """Break the stream to an instance."""
        self._calls.pop(instance_id).cancel()
        self._readers.pop(instance_id).cancel()

    async def close(self) -> None:
        for instance_id in list(self._calls):
            await self.part(instance_id)
        for channel in self._channels:
            await channel.close()

    async def _read(self, instance_id: str) -> None:
        call = self._calls[instance_id]
        while response := await call.read():
            for output in response.outputs:
                self._take(instance_id, output)
            for move in response.moves:
                await self._follow(instance_id, move)

    def _take(self, instance_id: str, output: Any) -> None:
        request = self.requests[output.request_id]
        if instance_id != request.owner.instance_id or output.epoch < request.owner.epoch:
            request.refused += 1
            return
        request.changed.set()
        if output.epoch > request.owner.epoch:
            request.owner = Ownership(instance_id, output.epoch)
        if output.HasField("failure"):
            request.failure = from_sequence_status(output.failure)
            return
        reason = convert.finish_reason(output.finish_reason)
        verdict = request.stream.accept(output.epoch, output.offset, output.token_ids, reason)
        assert verdict is not Verdict.GAP, f"{output} after {len(request.stream.token_ids)} tokens"
        request.check()

    async def _follow(self, instance_id: str, move: Any) -> None:
        request = self.requests[move.request_id]
        assert instance_id == request.owner.instance_id and move.epoch > request.owner.epoch
        assert len(request.stream.token_ids) == move.output_tokens
        assert move.address == self._cluster.address(move.instance_id)
        request.moves.append(move)
        request.changed.set()
        if request.follows:
            await self.attach(request, Ownership(move.instance_id, move.epoch))


class Cluster:
    """A prefill instance, decode instances by id, one ledger, one router."""

    def __init__(self, ledger: MemoryLedger, ledgers: dict[str, SwitchedLedger]) -> None:
        self.ledger = ledger
        self.ledgers = ledgers
        self.executors: dict[str, PacedExecutor] = {}
        self.prefill: Running
        self.decode: dict[str, Running] = {}
        self.router = Router(self)

    def hurry(self) -> None:
        """Let all steps take no time from now on."""
        for executor in self.executors.values():
            executor.step_s = 0.0

    def worker(self, instance_id: str) -> DecodeWorker:
        worker: DecodeWorker = self.decode[instance_id].worker
        return worker

    def address(self, instance_id: str) -> str:
        return self.decode[instance_id].instance.membership.info.address

    def stub(self, instance_id: str) -> decode_pb2_grpc.DecodeServiceAsyncStub:
        """For calls to an instance; its channel is closed with the router's."""
        channel = self.router.channel(instance_id)
        stub: decode_pb2_grpc.DecodeServiceAsyncStub = decode_pb2_grpc.DecodeServiceStub(channel)
        return stub

    def target_states(self, instance_id: str) -> list[TargetState]:
        """Where the migrations to an instance stand."""
        return [migration.state for migration in self.worker(instance_id).migrator.incoming._migrations.values()]

    def movable(self, instance_id: str) -> tuple[str, ...]:
        """The requests of an instance that it would move, were there a target and a place for them."""
        worker = self.worker(instance_id)
        under_way = worker.migrator.outgoing._migrations
        return tuple(
            name for name, running in worker.running.items() if name not in under_way and not stays_for(running)
        )

    def migrate(self, request_id: str, source: str, target: str, **asked: Any) -> SourceMigration:
        """Have ``source`` move a request to ``target``."""
        move = MoveAsked(
            request_id=request_id,
            target_id=target,
            address=self.address(target),
            **{"reason": MigrationReason.LOAD, **asked},
        )
        return self.worker(source).migrator.migrate(move)

    async def nothing_left(self) -> None:
        """Wait until no instance has anything of any sequence or migration."""
        for running in [self.prefill, *self.decode.values()]:
            await running.nothing_left()
        for instance_id in self.decode:
            worker = self.worker(instance_id)

            async def over(worker: DecodeWorker = worker) -> bool:
                counts = worker.migrator.counts()
                return not counts.incoming and not counts.outgoing and not worker._freeing

            await until(over)
            assert not worker.running


@asynccontextmanager
async def running_cluster(
    ids: str = "AB",
    *,
    limits: Limits = LIMITS,
    blocks: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    predictor: PredictorConfig | None = None,
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """Instances named by the letters of ``ids``, with ``blocks`` of 4 tokens each."""
    ledger = MemoryLedger(WallClock())
    cluster = Cluster(ledger, {instance_id: SwitchedLedger(ledger) for instance_id in ids})
    migrator = MigratorConfig(limits=limits, **(config or {}))

    def serving(instance: Instance) -> DecodeWorker:
        worker = DecodeWorker(instance, migrator, predictor)
        name = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
        servicer = DecodeServicer(worker, max_timeout_s=60.0)
        instance.server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, name)
        return worker

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        cluster.prefill = await enter(
            running_instance(Role.PREFILL, ledger, PrefillWorker, executor=MemoryExecutor(256))
        )
        for instance_id in ids:
            executor = cluster.executors[instance_id] = PacedExecutor((blocks or {}).get(instance_id, 256))
            cluster.decode[instance_id] = await enter(
                running_instance(
                    Role.DECODE,
                    cluster.ledgers[instance_id],  # type: ignore[arg-type]
                    serving,
                    executor=executor,
                    instance_id=instance_id,
                    **settings,
                )
            )
        stack.push_async_callback(cluster.router.close)
        yield cluster

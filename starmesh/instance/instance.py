"""A running engine instance: engine thread, KV transfer, leases, membership, drain, in the order that they start
and stop. What it does with sequences is its service's."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from starmesh.clock import WallClock
from starmesh.engine.engine import HIDDEN_EVERY_TOKENS, EngineCore, SequenceOutput
from starmesh.engine.thread import EngineThread
from starmesh.instance.emulated import load_emulated
from starmesh.instance.loading import LoadedEngine, load_engine
from starmesh.instance.metrics import StepMetrics, watch_load
from starmesh.instance.servicer import InstanceServicer
from starmesh.instance.settings import EngineSettings
from starmesh.ledger import Ledger
from starmesh.ledger.membership import Membership
from starmesh.loopback import is_loopback
from starmesh.model_files import DEFAULT_MODEL, fetch_model
from starmesh.process import write_port_file
from starmesh.rpc.channels import ChannelPool
from starmesh.rpc.server import RpcServer
from starmesh.telemetry.ledger_metrics import LedgerMetrics
from starmesh.telemetry.metrics import NO_METRICS, Metrics
from starmesh.transfer import PullResult, TransferError
from starmesh.transfer.ends import KvTransfer, open_transfer
from starmesh.types import (
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    KvTicket,
    Role,
    SequenceLoad,
    SequenceSpec,
    TransferBackend,
)
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, transfer_pb2, transfer_pb2_grpc

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 5.0
_FRESH_TOKENS = 10 * HIDDEN_EVERY_TOKENS  # As in rescheduling: ten predictions missed.


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationCounts:
    """Migrations under way to and from here, and how many sequences have moved here so far."""

    incoming: int = 0
    outgoing: int = 0
    migrated: int = 0


class Instance:
    """Made by ``open_instance``; add the service's servicer to ``server``, then ``run``."""

    def __init__(
        self,
        settings: EngineSettings,
        role: Role,
        loaded: LoadedEngine,
        ledger: Ledger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.instance_id = settings.instance_id
        self.layout = loaded.memory.layout
        self.hidden_layout = loaded.hidden_layout
        """What the hidden states of its sequences are made of; None when it keeps none."""
        self.engine = EngineThread(lambda: loaded.core, self._pass_on)
        self.credentials = settings.load_credentials(metrics)
        """What channels to other services are opened with; None for plaintext."""
        self.server = RpcServer(
            listen=settings.listen, allow_plaintext=settings.allow_plaintext, credentials=self.credentials
        )
        self.ledger = ledger
        self.metrics = metrics
        """What its service makes instruments of its own with."""
        self.count_migrations: Callable[[], MigrationCounts] = MigrationCounts
        """Set by a service that migrates; what it counts is in each load, and no drain ends before all are over."""
        self.foresee: Callable[[Sequence[SequenceLoad]], tuple[SequenceLoad, ...]] | None = None
        """Set by a service that knows how long sequences will be: fills in what they are predicted to generate."""
        self.on_load: Callable[[InstanceLoad], None] | None = None
        """Set by a service that acts on loads: hears of each, on the event loop."""
        self.on_pull: Callable[[PullResult | None], None] | None = None
        """Set by a service that measures pulls: hears of each, None for one that failed."""
        self._memory = loaded.memory
        self._transferring = loaded.transferring
        self._deliver: Callable[[list[SequenceOutput]], None] | None = None
        self._settings = settings
        self._transfer: KvTransfer | None = None
        self._leased_epochs: dict[str, int] = {}
        self._channels = ChannelPool(self.credentials)
        self._clock = WallClock()
        self._last_load: InstanceLoad | None = None
        self._last_load_s = self._clock.now_s()
        self._pulled_bytes = 0
        self._pulled_with: TransferBackend | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._nothing_left = asyncio.Event()
        self._drained = asyncio.Event()
        self._drain_end: asyncio.Task[None] | None = None
        info = InstanceInfo(
            instance_id=self.instance_id,
            incarnation=secrets.token_hex(8),
            role=role,
            address=settings.advertise,
            layout=self.layout,
            max_sequence_tokens=loaded.max_sequence_tokens,
            max_sequences=loaded.max_sequences,
        )
        self.membership = Membership(
            self.ledger, info, load=self._report, ttl_s=settings.lease_ttl_s, interval_s=settings.report_interval_s
        )
        loaded.core.on_step = StepMetrics(metrics)
        watch_load(metrics, load=lambda: self._last_load, state=lambda: self.state)

    @property
    def state(self) -> InstanceState:
        """Whether it takes new work."""
        return self.membership.info.state

    @property
    def last_load(self) -> InstanceLoad | None:
        """The last load that was made of it, None before the first. May be read from any thread."""
        return self._last_load

    @property
    def leases(self) -> int:
        """Leases that others have on its blocks."""
        return len(self.transfer.leases)

    @property
    def running(self) -> bool:
        """Whether its KV transfer is open, since ``run``."""
        return self._transfer is not None

    @property
    def transfer(self) -> KvTransfer:
        """Both ends of its KV transfer. Raises RuntimeError before ``run``."""
        if self._transfer is None:
            raise RuntimeError("the instance is not running")
        return self._transfer

    async def load(self) -> InstanceLoad:
        """What it reports of itself, as of between two steps: waits for the step that runs."""
        # What came before the drain is in a load that was asked for after it.
        draining = self.state is InstanceState.DRAINING
        # With what the last report foresaw, so that it costs no call of its own.
        expected_tokens = _expected_tokens(self._last_load)
        load = await self.engine.call(lambda core: _expect_and_load(core, expected_tokens))
        counts = self.count_migrations()
        # A drain ends with the first report that finds nothing, no handoff or migration in progress either: each end of
        # a sequence brings a report about.
        at_work = bool(counts.incoming or counts.outgoing) or not self._tasks <= {self._drain_end}
        if draining and load.free_blocks == load.total_blocks and not load.sequences and not at_work:
            self._nothing_left.set()
        load = dataclasses.replace(
            load,
            transfer_bytes=self._pulled_bytes,
            transfer_backend=self._pulled_with,
            incoming_migrations=counts.incoming,
            outgoing_migrations=counts.outgoing,
            migrated_sequences=counts.migrated,
            sequences=load.sequences if self.foresee is None else self.foresee(load.sequences),
        )
        self._last_load, self._last_load_s = load, self._clock.now_s()
        if self.on_load is not None:
            self.on_load(load)
        return load

    async def _report(self) -> InstanceLoad | None:
        """The load now or, while a long step runs, the last one: a slow instance is not a dead one. None when no step
        has ended for so long that the engine must hang."""
        try:
            async with asyncio.timeout(self._settings.report_interval_s):
                return await self.load()
        except TimeoutError:
            silent_s = self._clock.now_s() - self._last_load_s
            if silent_s < self._settings.stall_timeout_s:
                return self._last_load
            log.error("no step has ended for %.0f s; the lease runs out unless one does", silent_s)
            return None

    def lease(self, spec: SequenceSpec, block_ids: Sequence[int], resident_tokens: int) -> KvTicket:
        """Lease a held sequence's blocks to whoever pulls them; they are freed when the lease ends. Raises
        LeaseTableFull."""
        ticket = self._grant(spec.request_id, block_ids, resident_tokens)
        self._leased_epochs[spec.request_id] = spec.epoch
        return ticket

    def lease_for_migration(self, reservation_id: str, block_ids: Sequence[int], resident_tokens: int) -> KvTicket:
        """Lease blocks of a sequence that moves away; the end of the lease frees nothing. Raises LeaseTableFull."""
        return self._grant(reservation_id, block_ids, resident_tokens)

    def revoke_lease(self, request_id: str, epoch: int) -> None:
        """End the lease of a request if it is of ``epoch`` or older. Its blocks are the caller's to free."""
        leased = self._leased_epochs.get(request_id)
        if leased is not None and leased <= epoch:
            del self._leased_epochs[request_id]
            self.transfer.revoke(request_id)

    def revoke_migration_leases(self, reservation_id: str) -> None:
        """End the leases of a migration: no pull under them can be confirmed any more."""
        self.transfer.revoke(reservation_id)

    async def pull(self, ticket: KvTicket, local_block_ids: Sequence[int]) -> PullResult:
        """Pull a ticket's blocks and end its lease. Raises TransferError; then what was pulled is not to be used."""
        puller = self.transfer.puller
        try:
            async with self._transferring(len(ticket.block_ids)):
                result = await puller.pull(
                    ticket, ticket.block_ids, local_block_ids, timeout_s=self._settings.transfer_timeout_s
                )
            await puller.release(ticket, timeout_s=RELEASE_TIMEOUT_S)
        except TransferError:
            if self.on_pull is not None:
                self.on_pull(None)
            raise
        if self.on_pull is not None:
            self.on_pull(result)
        self._pulled_bytes += result.bytes
        self._pulled_with = result.backend
        return result

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` in a task that the instance's stop waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def drain(self) -> int:
        """Take nothing new; report DRAINED when the last sequence and lease have gone. Returns the sequences left."""
        load = await self.load()
        left = load.running_sequences + load.waiting_sequences
        if self.state is InstanceState.READY:
            log.info("draining, %d sequences left", left)
            await self.membership.set_state(InstanceState.DRAINING)
            self._drain_end = self.background(self._finish_drain())
        return left

    async def run(
        self,
        stop: asyncio.Event,
        *,
        deliver: Callable[[list[SequenceOutput]], None],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        """Serve until ``stop``; then drain within the grace period, ``close`` the service and leave. ``deliver`` takes
        what each step made, on the event loop.

        Raises RuntimeError when the engine's thread died, OSError when the port is taken, and LedgerError when the
        ledger does not answer at the start.
        """
        self._deliver = deliver
        settings = self._settings
        if self.credentials is not None:
            clear = TransferBackend.NIXL in settings.transfer_backends
            log.log(
                logging.WARNING if clear else logging.INFO,
                "KV is moved %s",
                "by NIXL, unencrypted, as --transfer says" if clear else "over TLS only, not by NIXL",
            )
        if is_loopback(settings.listen) and not settings.allow_plaintext:
            # UCX, below NIXL, would listen on every network of the machine, in the clear.
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        self._transfer = await open_transfer(
            self._memory,
            instance_id=self.instance_id,
            incarnation=self.membership.info.incarnation,
            backends=settings.transfer_backends,
            on_end=self._on_lease_end,
            channel_for=self._channels.get,
        )
        service = transfer_pb2.DESCRIPTOR.services_by_name["TransferService"].full_name
        self.server.add(transfer_pb2_grpc.add_TransferServiceServicer_to_server, self._transfer.servicer, service)
        service = cluster_pb2.DESCRIPTOR.services_by_name["InstanceService"].full_name
        self.server.add(cluster_pb2_grpc.add_InstanceServiceServicer_to_server, InstanceServicer(self), service)
        await self.engine.start()
        address = await self.server.start()
        self.membership.update(address=settings.advertise or address, transfer_backends=self._transfer.backends)
        try:
            await self.membership.start()
            await self.server.set_serving(True)
            write_port_file(settings.port_file, address)
            log.info("serving on %s", address)
            await self._until(stop)
            await self.server.set_serving(False)
            await self._drain_within(settings.grace_s)
        finally:
            await close()
            await self.server.stop(1.0)
            await self.membership.stop()
            # A lease that nobody has ended would keep it waiting: there are no more reports to end a drain with.
            if self._drain_end is not None:
                self._drain_end.cancel()
            while self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._transfer.close()
            await self._channels.close()
            await self.engine.stop()
            await self.ledger.close()
            log.info("stopped")

    def _pass_on(self, outputs: list[SequenceOutput]) -> None:
        if self._deliver is not None:
            self._deliver(outputs)

    async def _until(self, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait())
        ends: list[asyncio.Future[Any]] = [stopping, self.engine.failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self.engine.failed.done():
            raise RuntimeError(f"the engine died: {self.engine.failed.result()!r}") from self.engine.failed.result()

    async def _drain_within(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self.drain()
                await self._drained.wait()
        except TimeoutError:
            log.warning("grace of %.1f s is over: the routers go on elsewhere with what is left", grace_s)

    async def _finish_drain(self) -> None:
        await self._nothing_left.wait()
        await self.membership.set_state(InstanceState.DRAINED)
        self._drained.set()
        log.info("drained: safe to stop")

    def _grant(self, owner_key: str, block_ids: Sequence[int], resident_tokens: int) -> KvTicket:
        duration_s = self._settings.kv_lease_s
        return KvTicket(
            lease_id=self.transfer.grant(block_ids, owner_key, duration_s=duration_s),
            instance_id=self.instance_id,
            address=self.membership.info.address,
            layout=self.layout,
            block_ids=tuple(block_ids),
            resident_tokens=resident_tokens,
            lease_duration_s=duration_s,
        )

    def _on_lease_end(self, owner_key: str) -> None:
        # With the epoch: by the time that the engine frees, a newer one may hold blocks under the same id. A migration
        # has none, and frees by itself.
        epoch = self._leased_epochs.pop(owner_key, None)
        if epoch is not None:
            self.background(self._free(owner_key, epoch))

    async def _free(self, request_id: str, epoch: int) -> None:
        await self.engine.call(lambda core: core.release(request_id, epoch))
        self.membership.report_soon()

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background work failed", exc_info=task.exception())


def _expected_tokens(load: InstanceLoad | None) -> dict[str, int]:
    """At how many tokens the sequences of a load are predicted to end; without those whose prediction is too old."""
    return {
        known.request_id: known.prompt_tokens + known.output_tokens + known.remaining_tokens
        for known in (load.sequences if load is not None else ())
        if known.remaining_tokens is not None and (known.prediction_age_tokens or 0) <= _FRESH_TOKENS
    }


def _expect_and_load(core: EngineCore, expected_tokens: Mapping[str, int]) -> InstanceLoad:
    core.expect(expected_tokens)
    return core.load()


async def open_instance(
    settings: EngineSettings, role: Role, *, prefix_caching: bool, metrics: Metrics = NO_METRICS
) -> Instance:
    """Fetch and load the model, or what is emulated instead.

    Raises LedgerError for a ledger url that is not understood, ModelNotFound, UnsupportedModel or ValueError, each with
    what to do next.
    """
    ledger = settings.open_ledger()
    ledger.on_operation = LedgerMetrics(metrics.meter)
    emulation = settings.emulation
    if emulation is not None:
        log.info("emulating %s at speed %g", emulation.profile.name, emulation.speed)
        emulated = load_emulated(settings, emulation, prefix_caching=prefix_caching)
        return Instance(settings, role, emulated, ledger, metrics)
    model_dir = await asyncio.to_thread(fetch_model, settings.model or DEFAULT_MODEL, progress=log.info)
    log.info("loading %s on %s (%s)", model_dir.name, settings.device, settings.dtype)
    loaded = await asyncio.to_thread(load_engine, settings, model_dir, prefix_caching=prefix_caching)
    return Instance(settings, role, loaded, ledger, metrics)

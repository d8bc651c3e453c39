"""The sequences that move away: which do, how many may, and who may ask for it.

Owns the registry of migrations away, their limit and the newest leader's term. What one of them does is
``source_migration``'s.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from dataclasses import dataclass

import grpc

from services.decode.claims import Claims
from services.decode.config import MigratorConfig
from services.decode.metrics import DecodeMetrics
from services.decode.running import RunningSequence, Sequences
from services.decode.source_migration import SourceMigration, SourceShell
from services.decode.target_calls import TargetCalls
from starmesh.instance.instance import Instance
from starmesh.migration.source_record import Cancelled, Finished
from starmesh.migration.terms import Terms
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.types import MigrationReason, Ownership

# Migrations end within a second or so, if all goes well.
RETRY_DELAY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAsked:
    """A sequence to move to ``target_id`` at ``address``. ``epoch`` None is the present one. ``traceparent`` is that of
    the round or command that decided it, ``leader_term`` the rescheduler's, 0 from anyone else."""

    request_id: str
    target_id: str
    address: str
    reason: MigrationReason
    epoch: int | None = None
    traceparent: str = ""
    leader_term: int = 0


class OutgoingMigrations:
    """Begins migrations, and lets them hear of their sequences."""

    def __init__(
        self, instance: Instance, sequences: Sequences, claims: Claims, config: MigratorConfig, metrics: DecodeMetrics
    ) -> None:
        self._instance = instance
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._sequences = sequences
        self._claims = claims
        self._config = config
        self._migrations: dict[str, SourceMigration] = {}
        self._newest_term = 0
        self._closing = False

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._migrations)

    def begin(self, asked: MoveAsked) -> SourceMigration:
        """Begin a migration, or return the one under way for the same request, epoch and target.

        Raises StatusError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION, RESOURCE_EXHAUSTED or UNAVAILABLE, as
        ``DecodeService.Migrate`` tells.
        """
        self._check_term(asked.leader_term)
        running = self._sequences.running.get(asked.request_id)
        if running is None:
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"no sequence of {asked.request_id} runs here")
        if asked.epoch is not None and asked.epoch != running.epoch:
            raise _refused(f"{asked.request_id} runs here under epoch {running.epoch}, not {asked.epoch}")
        if asked.target_id == self._instance.instance_id:
            raise bad_field("target_instance_id", "is the instance that it runs on")
        under_way = self._migrations.get(asked.request_id)
        if under_way is not None:
            if under_way.terms.target_id != asked.target_id:
                raise _refused(f"{asked.request_id} is on its way to {under_way.terms.target_id}")
            return under_way
        self._check_may_leave(running)
        return self._begin(running, asked)

    def finished(self, request_id: str) -> None:
        """Its sequence has ended by itself, or the engine gave it up."""
        migration = self._migrations.get(request_id)
        if migration is not None:
            migration.on(Finished())

    def cancelled(self, request_id: str) -> bool:
        """Its router wants no more of its sequence. Returns whether it was on its way: then it is dropped here and
        there, and nobody else need free it."""
        migration = self._migrations.get(request_id)
        if migration is not None:
            migration.on(Cancelled())
        return migration is not None

    def close(self) -> None:
        """Begin none any more. Those under way end with their sequences."""
        self._closing = True

    def _check_term(self, leader_term: int) -> None:
        if leader_term and leader_term < self._newest_term:
            raise _refused(f"term {leader_term} is over; a leader of term {self._newest_term} has come")
        self._newest_term = max(self._newest_term, leader_term)

    def _check_may_leave(self, running: RunningSequence) -> None:
        stays_for = _stays_for(running)
        if stays_for is not None:
            raise _refused(f"{running.request_id} stays: {stays_for}")
        if self._closing:
            raise retry_later(grpc.StatusCode.UNAVAILABLE, "the instance is stopping", RETRY_DELAY_S)
        if not self._instance.membership.ledger_reachable:
            raise retry_later(
                grpc.StatusCode.UNAVAILABLE, "the ledger does not answer, so nothing can move", RETRY_DELAY_S
            )
        if len(self._migrations) >= self._config.max_outgoing:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{len(self._migrations)} sequences are on their way from here; wait for one to arrive",
                RETRY_DELAY_S,
            )

    def _begin(self, running: RunningSequence, asked: MoveAsked) -> SourceMigration:
        terms = Terms(
            reservation_id=secrets.token_hex(16),
            request_id=running.request_id,
            epoch=running.epoch,
            source_id=self._instance.instance_id,
            target_id=asked.target_id,
            reason=asked.reason,
        )
        limits, address = self._config.limits, asked.address

        def tell_moved(owner: Ownership, output_tokens: int) -> None:
            self._sequences.tell_moved(running, owner, address, output_tokens)

        shell = SourceShell(
            instance=self._instance,
            claims=self._claims,
            target=TargetCalls(address, terms, limits, self._instance.credentials),
            tell_moved=tell_moved,
            give_up=self._sequences.give_up,
            on_end=functools.partial(self._ended, self._loop.time()),
        )
        migration = SourceMigration(shell, running, terms, limits, traceparent=asked.traceparent)
        self._migrations[running.request_id] = migration
        return migration

    def _ended(self, began_s: float, migration: SourceMigration) -> None:
        del self._migrations[migration.terms.request_id]
        self._metrics.migrated(migration.terms.reason, migration.progress.last, self._loop.time() - began_s)
        self._instance.membership.report_soon()


def _stays_for(running: RunningSequence) -> str | None:
    """Why a sequence cannot move now; None when it can."""
    if running.link is None:
        return "it has just come, and its router is not here yet"
    if not running.in_engine:
        return "its KV is still on its way here"
    return None


def _refused(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)

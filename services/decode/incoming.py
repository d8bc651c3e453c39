"""The sequences that are taken in: which are, how many may be, and what makes one give way.

Owns the registry of migrations here and their limit. What one of them does is ``target_migration``'s.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import grpc

from services.decode.claims import Claims
from services.decode.config import MigratorConfig
from services.decode.link import RouterLink
from services.decode.running import Sequences, WaitingRouter
from services.decode.target_migration import TargetMigration, TargetShell
from starmesh.instance.instance import Instance
from starmesh.migration.target_record import AbortAsked, TargetState
from starmesh.migration.terms import Cause, Refusal, Terms
from starmesh.rpc.status import StatusError
from starmesh.types import InstanceState, KvLayout

# Until the commit call a source that begins anew has given its former attempt up. After it only a newer epoch of the
# sequence says so.
_NOT_COMMITTED: Final = frozenset({TargetState.RESERVING, TargetState.RESERVED, TargetState.PULLING})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomAsked:
    """A source's first call: room for ``blocks`` laid out as ``layout``, for a sequence that may grow to ``max_tokens``
    in all. ``traceparent`` is the request's trace context, ``parent`` that of the source's span."""

    terms: Terms
    layout: KvLayout
    blocks: int
    max_tokens: int
    traceparent: str
    parent: str


class IncomingMigrations:
    """Takes sequences in."""

    def __init__(self, instance: Instance, sequences: Sequences, claims: Claims, config: MigratorConfig) -> None:
        self.started = 0
        """Sequences that have moved here since the instance started."""
        self._instance = instance
        self._sequences = sequences
        self._claims = claims
        self._config = config
        self._migrations: dict[str, TargetMigration] = {}
        self._closing = False

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._migrations)

    @property
    def kept_s(self) -> float:
        """How long blocks are kept without another call of their source."""
        return self._config.limits.idle_s

    async def reserve(self, asked: RoomAsked) -> int | Refusal:
        """Set blocks aside; how many, or why none. Raises StatusError FAILED_PRECONDITION for a reservation id that is
        another's, and ABORTED when the migration ends before there is an answer."""
        terms = asked.terms
        known = self._migrations.get(terms.reservation_id)
        if known is not None:
            if known.terms != terms:
                raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, "the reservation id is another migration's")
            return await known.reserved(again=True)
        refusal = self._refusal(asked)
        if refusal is not None:
            return refusal
        shell = TargetShell(
            instance=self._instance,
            claims=self._claims,
            sequences=self._sequences,
            on_start=self._on_start,
            on_end=self._on_end,
        )
        migration = self._migrations[terms.reservation_id] = TargetMigration(
            shell,
            terms,
            self._config.limits,
            blocks=asked.blocks,
            traceparent=asked.traceparent,
            parent=asked.parent,
        )
        return await migration.reserved(again=False)

    def get(self, reservation_id: str) -> TargetMigration:
        """The migration under way of this id. Raises StatusError NOT_FOUND."""
        try:
            return self._migrations[reservation_id]
        except KeyError:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "no such reservation is known; reserve anew") from None

    def abort(self, reservation_id: str, cause: Cause) -> None:
        """The source's word that nobody waits for it; an unknown one is ignored."""
        migration = self._migrations.get(reservation_id)
        if migration is not None:
            migration.on(AbortAsked(cause))

    def attach(self, request_id: str, epoch: int, waiting: WaitingRouter) -> bool:
        """A router asks for a sequence that is being taken in under ``epoch``. Returns whether it is."""
        for migration in self._of(request_id):
            if migration.terms.moved.epoch == epoch:
                migration.attach(waiting)
                return True
        return False

    def cancel(self, request_id: str, epoch: int) -> None:
        """A router wants no more of a request: end what takes it in under ``epoch`` or an older one."""
        for migration in self._of(request_id):
            if migration.terms.moved.epoch <= epoch:
                migration.on(AbortAsked(Cause.CANCELLED))

    def disconnect(self, link: RouterLink) -> None:
        """A router has gone: end what it waits for."""
        for migration in [migration for migration in self._migrations.values() if migration.waits(link)]:
            migration.on(AbortAsked(Cause.CANCELLED))

    def newest_epoch(self, request_id: str) -> int:
        """The newest epoch under which a request is being taken in; 0 when it is not."""
        return max((migration.terms.moved.epoch for migration in self._of(request_id)), default=0)

    def supersede(self, request_id: str) -> frozenset[asyncio.Future[None]]:
        """Give up what takes a request in, for a newer epoch of it. Returns what to wait for until nothing writes into
        its blocks and they are free."""
        for migration in self._of(request_id):
            migration.on(AbortAsked(Cause.SUPERSEDED))
        return frozenset(migration.ended for migration in self._of(request_id))

    def close(self) -> None:
        """Take nothing in any more, and give up what is being taken in."""
        self._closing = True
        for migration in list(self._migrations.values()):
            migration.on(AbortAsked(Cause.CANCELLED))

    def _of(self, request_id: str) -> list[TargetMigration]:
        return [migration for migration in self._migrations.values() if migration.terms.request_id == request_id]

    def _refusal(self, asked: RoomAsked) -> Refusal | None:
        instance, terms = self._instance, asked.terms
        if instance.state is not InstanceState.READY or self._closing:
            return Refusal.NOT_READY
        if asked.layout != instance.layout:
            return Refusal.LAYOUT_MISMATCH
        if asked.max_tokens > instance.membership.info.max_sequence_tokens:
            return Refusal.TOO_LONG
        if not instance.membership.ledger_reachable:
            return Refusal.LEDGER_UNAVAILABLE
        for other in self._of(terms.request_id):
            newer = terms.epoch > other.terms.epoch
            if newer or (terms.epoch == other.terms.epoch and other.state in _NOT_COMMITTED):
                other.on(AbortAsked(Cause.SUPERSEDED))
        # What still has blocks may still be written into.
        if self._of(terms.request_id) or self._sequences.has_blocks(terms.request_id):
            return Refusal.ALREADY_HERE
        if len(self._migrations) >= self._config.max_incoming:
            return Refusal.TOO_MANY_MIGRATIONS
        return None

    def _on_start(self) -> None:
        self.started += 1

    def _on_end(self, migration: TargetMigration) -> None:
        del self._migrations[migration.terms.reservation_id]
        self._instance.membership.report_soon()

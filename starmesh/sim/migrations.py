"""All migrations of a simulated cluster: who may begin one, how many are under way, and who hears of their ends.

Owns the registry of migrations by their source, the limits, what the routers do for them, and what the death of either
end comes to. What one of them does is ``source_migration``'s and ``target_migration``'s, by the live tables.

The router's part is only its messages: on the source's word that a sequence has moved it attaches at the target. When
the source dies before it could say so, the router asks the ledger who owns the sequence, and attaches there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

from starmesh.migration.source_record import Finished, Preempted, SourceState
from starmesh.migration.terms import Cause, Limits, Terms
from starmesh.profiles import Profile
from starmesh.sequence_loads import COUNTS, SequenceLoads
from starmesh.sim.events import EventLoop
from starmesh.sim.incoming_migrations import IncomingMigrations
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.network import ROUTER, Network
from starmesh.sim.owners import Owners
from starmesh.sim.source_migration import SourceMigration, SourceShell
from starmesh.sim.target_migration import TargetMigration
from starmesh.types import KvTicket, Migration, Ownership

MAX_MIGRATIONS = 4
"""Under way from, and to, one instance (live: ``services.decode.config.MAX_MIGRATIONS``)."""

_EPOCH, _PROMPT, _OUTPUT, _MAX_OUTPUT = map(
    COUNTS.index, ("epoch", "prompt_tokens", "output_tokens", "max_output_tokens")
)
_DEFAULT_LIMITS: Final = Limits()


class MigrationListener(Protocol):
    """Hears what becomes of migrations."""

    def migration_moved(self, request_id: str, source_id: str, target_id: str, epoch: int) -> None:
        """The target has won the sequence, under ``epoch``: it is there from now on, whatever becomes of the source."""
        ...

    def migration_ended(
        self,
        migration: Migration,
        *,
        moved: bool,
        cause: Cause | None,
        duration_s: float,
        size_bytes: int,
        stood_still_s: float,
    ) -> None:
        """It is over at its source: once for each that has begun. ``cause`` is None where it ``moved`` and where its
        source has died. ``size_bytes`` have arrived; the sequence was out of the source's batch for ``stood_still_s``
        (until the step that it waits for at the target, a client waits longer)."""
        ...


class Migrations:
    """Moves sequences between ``instances``, from which the dead are removed before ``instance_died`` is called."""

    def __init__(
        self,
        loop: EventLoop,
        network: Network,
        instances: Mapping[str, SimulatedInstance],
        owners: Owners,
        *,
        profile: Profile,
        listener: MigrationListener,
        limits: Limits = _DEFAULT_LIMITS,
        max_outgoing: int = MAX_MIGRATIONS,
        max_incoming: int = MAX_MIGRATIONS,
    ) -> None:
        self._loop = loop
        self._network = network
        self._instances = instances
        self._owners = owners
        self._layout = profile.layout
        self._listener = listener
        self._limits = limits
        self._max_outgoing = max_outgoing
        self._moving: dict[str, tuple[Migration, SourceMigration]] = {}
        self._outgoing: Counter[str] = Counter()
        self._begun = 0
        self._incoming = IncomingMigrations(
            loop,
            network,
            owners,
            instances,
            layout=profile.layout,
            limits=limits,
            most=max_incoming,
            confirm=self._holds,
            on_start=self._started,
        )

    def outgoing(self, instance_id: str) -> int:
        """How many are under way from an instance."""
        return self._outgoing[instance_id]

    def incoming(self, instance_id: str) -> int:
        """How many are under way to an instance."""
        return self._incoming.count(instance_id)

    def migrated(self, instance_id: str) -> int:
        """How many sequences have moved to an instance."""
        return self._incoming.started[instance_id]

    def start(self, migration: Migration) -> bool:
        """Begin a migration; the way of the order to the source is the caller's to model. Returns whether the source
        takes it: not for a sequence that it does not have under this epoch, that is on its way or has just come, nor
        with as many under way as may be."""
        source_id, request_id = migration.source, migration.request_id
        instance = self._instances.get(source_id)
        if instance is None or migration.target == source_id or request_id in self._moving:
            return False
        if (
            self._outgoing[source_id] >= self._max_outgoing
            or self._incoming.under_way(source_id, request_id) is not None
        ):
            return False
        counts = _counts(SequenceLoads.of(instance.load().sequences), request_id)
        if counts is None or counts[_EPOCH] != migration.epoch:
            return False
        self._begun += 1
        terms = Terms(
            reservation_id=str(self._begun),
            request_id=request_id,
            epoch=migration.epoch,
            source_id=source_id,
            target_id=migration.target,
            reason=migration.reason,
        )
        shell = SourceShell(
            loop=self._loop,
            network=self._network,
            owners=self._owners,
            instance=instance,
            layout=self._layout,
            receiver=self._incoming,
            tell_moved=self._tell_moved,
            on_end=self._ended,
        )
        source = SourceMigration(
            shell,
            terms,
            self._limits,
            tokens=counts[_PROMPT] + counts[_OUTPUT],
            max_tokens=counts[_PROMPT] + counts[_MAX_OUTPUT],
        )
        self._moving[request_id] = (migration, source)
        self._outgoing[source_id] += 1
        source.begin()
        return True

    def sequence_ended(self, request_id: str) -> None:
        """A sequence of a request has ended by itself on its instance."""
        self._on_sequence(request_id, Finished())

    def sequence_preempted(self, request_id: str) -> None:
        """A sequence of a request has lost its blocks on its instance."""
        self._on_sequence(request_id, Preempted())

    def instance_died(self, instance_id: str) -> None:
        """An instance is not there any more. Call this before anyone claims what it had."""
        moved = [target.terms for target in self._incoming.unattached(instance_id)]
        self._incoming.target_died(instance_id)
        for _, source in list(self._moving.values()):
            if source.terms.source_id == instance_id:
                source.kill()
                self._end(source, moved=source.terms in moved, cause=None)
            elif source.terms.target_id == instance_id:
                source.target_died()
        for terms in moved:
            self._look_for(terms)

    def _on_sequence(self, request_id: str, event: Finished | Preempted) -> None:
        if request_id in self._moving:
            self._moving[request_id][1].on_sequence(event)

    def _holds(self, terms: Terms, ticket: KvTicket) -> bool:
        _, source = self._moving.get(terms.request_id, (None, None))
        return source is not None and source.holds(ticket)

    def _started(self, target: TargetMigration) -> None:
        terms = target.terms
        self._listener.migration_moved(terms.request_id, terms.source_id, terms.target_id, terms.moved.epoch)
        if terms.source_id not in self._instances:
            self._look_for(terms)

    def _ended(self, source: SourceMigration) -> None:
        self._end(source, moved=source.end.state is SourceState.MOVED, cause=source.end.cause)

    def _end(self, source: SourceMigration, *, moved: bool, cause: Cause | None) -> None:
        migration, _ = self._moving.pop(source.terms.request_id)
        self._outgoing[migration.source] -= 1
        now_s = self._loop.now_s
        self._listener.migration_ended(
            migration,
            moved=moved,
            cause=cause,
            duration_s=now_s - source.began_s,
            size_bytes=source.transfer_bytes,
            stood_still_s=0.0 if source.frozen_at_s is None else now_s - source.frozen_at_s,
        )

    # The router's part.

    def _tell_moved(self, terms: Terms) -> None:
        self._network.message(terms.source_id, ROUTER, lambda: self._attach(terms))

    def _look_for(self, terms: Terms) -> None:
        def found(owner: Ownership | None) -> None:
            if owner == terms.moved:
                self._attach(terms)

        self._owners.ask(terms.request_id, lambda answer: found(answer.owner))

    def _attach(self, terms: Terms) -> None:
        self._network.message(ROUTER, terms.target_id, lambda: self._incoming.attach(terms))


def _counts(sequences: SequenceLoads, request_id: str) -> list[int] | None:
    """A sequence's row of numbers."""
    if request_id not in sequences.request_ids:
        return None
    index = sequences.request_ids.index(request_id)
    return [memoryview(column).cast("q")[index] for column in sequences.columns]

"""The sequences that simulated instances take in: which are, how many may be, and what is refused.

Owns the registry of migrations by their target, and what a call for one that is not known is told. What one of them
does is ``target_migration``'s. The live counterpart is ``services.decode.incoming``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from starmesh.migration.target_effects import AnswerRefused
from starmesh.migration.target_record import AbortAsked, Attached, CommitAsked, CopyAsked, TargetState
from starmesh.migration.terms import Cause, Limits, Refusal, Terms
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.network import Network
from starmesh.sim.owners import Owners
from starmesh.sim.target_calls import Reply
from starmesh.sim.target_migration import TargetMigration, TargetShell
from starmesh.types import InstanceState, KvLayout, KvTicket

# Until the commit call a source that begins anew has given its former attempt up. After it only a newer epoch of the
# sequence says so.
_NOT_COMMITTED: Final = frozenset({TargetState.RESERVING, TargetState.RESERVED, TargetState.PULLING})


class IncomingMigrations:
    """Takes sequences in, at any instance; implements ``Receiver``."""

    def __init__(
        self,
        loop: EventLoop,
        network: Network,
        owners: Owners,
        instances: Mapping[str, SimulatedInstance],
        *,
        layout: KvLayout,
        limits: Limits,
        most: int,
        confirm: Callable[[Terms, KvTicket], bool],
        on_start: Callable[[TargetMigration], None],
    ) -> None:
        """At most ``most`` at a time per instance; ``confirm`` and ``on_start`` as in ``TargetShell``."""
        self.started: Counter[str] = Counter()
        """Sequences that have moved to each instance."""
        self._loop = loop
        self._network = network
        self._owners = owners
        self._instances = instances
        self._layout = layout
        self._limits = limits
        self._most = most
        self._confirm = confirm
        self._on_start = on_start
        self._at: dict[str, dict[str, TargetMigration]] = {}

    def count(self, instance_id: str) -> int:
        """How many are under way at an instance."""
        return len(self._at.get(instance_id, ()))

    def under_way(self, instance_id: str, request_id: str) -> TargetMigration | None:
        """The migration that brings a request to an instance."""
        here = self._at.get(instance_id, {})
        return next((each for each in here.values() if each.terms.request_id == request_id), None)

    def unattached(self, source_id: str) -> list[TargetMigration]:
        """Those that have won their sequence from an instance, and whose router has not come."""
        return [
            each
            for here in self._at.values()
            for each in here.values()
            if each.terms.source_id == source_id and each.end.state is TargetState.STARTED
        ]

    # What sources ask for, once it has come to the target.

    def reserve(self, terms: Terms, *, blocks: int, max_tokens: int, reply: Reply) -> None:
        """Set blocks aside, or refuse."""
        instance = self._instances[terms.target_id]
        refusal = self._refusal(instance, terms, max_tokens)
        if refusal is not None:
            reply(AnswerRefused(refusal))
            return
        shell = TargetShell(
            loop=self._loop,
            network=self._network,
            owners=self._owners,
            instance=instance,
            layout=self._layout,
            confirm=self._confirm,
            on_start=self._note_start,
            on_end=self._forget,
        )
        migration = TargetMigration(shell, terms, self._limits, blocks=blocks, reply=reply)
        self._at.setdefault(terms.target_id, {})[terms.reservation_id] = migration
        migration.begin()

    def ask(self, terms: Terms, asked: CopyAsked | CommitAsked, reply: Reply) -> None:
        """Pull, and commit. For a migration that is not known that is no answer."""
        migration = self._find(terms)
        if migration is None:
            reply(None)
        else:
            migration.ask(asked, reply)

    def abort(self, terms: Terms, asked: AbortAsked) -> None:
        """Give it up; an unknown one is ignored."""
        migration = self._find(terms)
        if migration is not None:
            migration.on(asked)

    # What routers do, and what happens to instances.

    def attach(self, terms: Terms) -> None:
        """A router has come for a sequence. One that is not known has ended, or waits no more."""
        migration = self._find(terms)
        if migration is not None:
            migration.on(Attached())

    def target_died(self, instance_id: str) -> None:
        """What comes to it comes to nothing."""
        for migration in self._at.pop(instance_id, {}).values():
            migration.kill()

    def _find(self, terms: Terms) -> TargetMigration | None:
        return self._at.get(terms.target_id, {}).get(terms.reservation_id)

    def _refusal(self, instance: SimulatedInstance, terms: Terms, max_tokens: int) -> Refusal | None:
        if instance.info.state is not InstanceState.READY:
            return Refusal.NOT_READY
        if max_tokens > instance.info.max_sequence_tokens:
            return Refusal.TOO_LONG
        other = self.under_way(terms.target_id, terms.request_id)
        if other is not None:
            newer = terms.epoch > other.terms.epoch
            if newer or (terms.epoch == other.terms.epoch and other.end.state in _NOT_COMMITTED):
                other.on(AbortAsked(Cause.SUPERSEDED))
        if self.under_way(terms.target_id, terms.request_id) is not None:
            return Refusal.ALREADY_HERE
        if self.count(terms.target_id) >= self._most:
            return Refusal.TOO_MANY_MIGRATIONS
        return None

    def _note_start(self, migration: TargetMigration) -> None:
        self.started[migration.terms.target_id] += 1
        self._on_start(migration)

    def _forget(self, migration: TargetMigration) -> None:
        here = self._at.get(migration.terms.target_id)
        if here is not None:
            here.pop(migration.terms.reservation_id, None)

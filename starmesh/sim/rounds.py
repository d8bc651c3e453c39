"""The rescheduler of a simulated cluster: rounds of the live ``plan`` at their interval.

Owns the memory from round to round and what became of its migrations. Decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable

from starmesh.migration.terms import GONE, Cause
from starmesh.policy.rescheduling import PlanMemory, ReschedulingConfig, plan
from starmesh.sim.events import EventLoop
from starmesh.sim.views import Views
from starmesh.types import Migration, Role


class Rounds:
    """``begin`` starts a migration and returns whether its source has taken the order."""

    def __init__(
        self,
        loop: EventLoop,
        views: Views,
        config: ReschedulingConfig,
        *,
        interval_s: float,
        begin: Callable[[Migration], bool],
        over: Callable[[], bool],
    ) -> None:
        """Rounds end once ``over`` says so."""
        self.memory = PlanMemory()
        self.rounds = 0
        self._loop = loop
        self._views = views
        self._config = config
        self._interval_s = interval_s
        self._begin = begin
        self._over = over
        self._own: dict[str, Migration] = {}
        loop.after(interval_s, self._round)

    def migration_ended(self, migration: Migration, *, moved: bool, cause: Cause | None, duration_s: float) -> None:
        """A migration has ended; others' are nothing to remember."""
        if self._own.get(migration.request_id) != migration:
            return
        del self._own[migration.request_id]
        self.memory = remembered(
            self.memory,
            migration,
            self._config,
            moved=moved,
            cause=cause,
            duration_s=duration_s,
            now_s=self._loop.now_s,
        )

    def _round(self) -> None:
        if self._over():
            return
        self.rounds += 1
        self._loop.after(self._interval_s, self._round)
        decided = plan(self._views.of((Role.DECODE,)), self.memory, self._config)
        self.memory = decided.memory
        for migration in decided.migrations:
            self._own[migration.request_id] = migration
            if not self._begin(migration):
                del self._own[migration.request_id]
                self.memory = self.memory.withdrawn(migration.request_id)


def remembered(
    memory: PlanMemory,
    migration: Migration,
    config: ReschedulingConfig,
    *,
    moved: bool,
    cause: Cause | None,
    duration_s: float,
    now_s: float,
) -> PlanMemory:
    """The memory with what became of a migration, as the live rescheduler notes it."""
    if moved:
        return memory.succeeded(migration.request_id, duration_s=duration_s, now_s=now_s, config=config)
    if cause in GONE:
        return memory.withdrawn(migration.request_id)
    return memory.failed(migration.request_id, now_s=now_s, config=config)

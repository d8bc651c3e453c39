"""What rescheduling remembers from round to round, as a value: moves under way, cool-downs, and what moves really cost.

Owns how that memory changes when a migration starts, succeeds, fails or is found done in a report. Owns no decision.
The live loop and the simulator tell outcomes with ``succeeded``, ``failed`` and ``withdrawn``; ``reconciled`` notices
those that nobody told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.types import Migration

_MOST_DOUBLINGS = 6
_FACTOR_LIMITS = (0.1, 100.0)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A migration that was planned at ``started_at_s`` and is not known to have ended; ``estimate_s`` is what the cost
    model alone says that it takes."""

    migration: Migration
    started_at_s: float
    estimate_s: float


@dataclass(frozen=True, slots=True)
class CoolDown:
    """A move that ended. The sequence rests until ``until_s``, and its ends keep their direction until ``settled_s``: 0
    for one that failed, which has moved nothing. ``failures`` counts failed moves in a row, 0 after one that
    succeeded."""

    request_id: str
    source: str
    target: str
    until_s: float
    failures: int = 0
    settled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanMemory:
    """State that goes into a round and comes out of it; both tuples ordered by request id, one entry for each.

    ``transfer_factor`` is the duration of migrations over the cost model's estimate, averaged over about ten.
    """

    in_flight: tuple[InFlight, ...] = ()
    cool_downs: tuple[CoolDown, ...] = ()
    transfer_factor: float = 1.0

    @property
    def request_ids(self) -> frozenset[str]:
        """The requests that anything is remembered of."""
        return frozenset(
            [entry.migration.request_id for entry in self.in_flight] + [cool.request_id for cool in self.cool_downs]
        )

    def succeeded(self, request_id: str, *, duration_s: float, now_s: float, config: ReschedulingConfig) -> PlanMemory:
        """A migration committed after ``duration_s``. Changes nothing if it is not in flight."""
        entry = self._find(request_id)
        if entry is None:
            return self
        factor = self.transfer_factor
        if entry.estimate_s > 0:
            factor += 0.1 * (duration_s / entry.estimate_s - factor)
        low, high = _FACTOR_LIMITS
        ended = self._moved(entry, now_s, config)
        return replace(ended, transfer_factor=min(max(factor, low), high))

    def failed(self, request_id: str, *, now_s: float, config: ReschedulingConfig) -> PlanMemory:
        """A migration was refused or aborted. Changes nothing if it is not in flight."""
        entry = self._find(request_id)
        if entry is None:
            return self
        failures = 1 + next((cool.failures for cool in self.cool_downs if cool.request_id == request_id), 0)
        rest_s = config.failure_cool_down_s * 2 ** min(failures - 1, _MOST_DOUBLINGS)
        migration = entry.migration
        return self._ended(
            entry, CoolDown(migration.request_id, migration.source, migration.target, now_s + rest_s, failures)
        )

    def withdrawn(self, request_id: str) -> PlanMemory:
        """A migration came to nothing by nobody's fault: it was not begun, or its sequence has ended. Changes nothing
        if it is not in flight."""
        entry = self._find(request_id)
        return replace(self, in_flight=tuple(known for known in self.in_flight if known != entry))

    def started(self, entries: tuple[InFlight, ...]) -> PlanMemory:
        """Migrations were planned."""
        in_flight = sorted((*self.in_flight, *entries), key=lambda entry: entry.migration.request_id)
        return replace(self, in_flight=tuple(in_flight))

    def reconciled(
        self, owners: Mapping[str, tuple[int, str]], *, now_s: float, config: ReschedulingConfig
    ) -> PlanMemory:
        """End what ``owners`` (by request id the newest reported epoch and its instance) shows as done and what has
        timed out; forget what is long over."""
        memory = self
        for entry in self.in_flight:
            migration = entry.migration
            epoch, instance_id = owners.get(migration.request_id, (0, ""))
            if epoch > migration.epoch and instance_id == migration.target:
                memory = memory._moved(entry, now_s, config)
            elif now_s - entry.started_at_s >= config.in_flight_timeout_s:
                memory = memory.failed(migration.request_id, now_s=now_s, config=config)
        # Failures are remembered as long again as they rested, so that the next one rests longer.
        longest_s = config.failure_cool_down_s * 2**_MOST_DOUBLINGS
        kept = (
            cool
            for cool in memory.cool_downs
            if now_s < max(cool.until_s, cool.settled_s) + (longest_s if cool.failures else 0.0)
        )
        return replace(memory, cool_downs=tuple(kept))

    def _find(self, request_id: str) -> InFlight | None:
        return next((entry for entry in self.in_flight if entry.migration.request_id == request_id), None)

    def _moved(self, entry: InFlight, now_s: float, config: ReschedulingConfig) -> PlanMemory:
        migration = entry.migration
        cool = CoolDown(
            migration.request_id,
            migration.source,
            migration.target,
            until_s=now_s + config.cool_down_s,
            settled_s=now_s + config.settle_s,
        )
        return self._ended(entry, cool)

    def _ended(self, entry: InFlight, cool: CoolDown) -> PlanMemory:
        others = (known for known in self.cool_downs if known.request_id != cool.request_id)
        return replace(
            self,
            in_flight=tuple(known for known in self.in_flight if known != entry),
            cool_downs=tuple(sorted((*others, cool), key=lambda known: known.request_id)),
        )

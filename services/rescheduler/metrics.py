"""What a rescheduler measures: its lead, its rounds, what they decide and what becomes of it.

Owns the instruments. Gauges read single values, from the thread that answers a scrape; all else is for the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum

from services.rescheduler.ending import Ending
from starmesh.policy.rescheduling import Plan
from starmesh.telemetry import instruments, names
from starmesh.telemetry.metrics import Metrics
from starmesh.telemetry.registry import rescheduler


class RoundOutcome(Enum):
    """What came of a round."""

    PLANNED = "planned"
    STANDBY = "standby"
    SUPERSEDED = "superseded"
    NO_LEDGER = "no_ledger"
    FAILED = "failed"


class ReschedulerMetrics:
    """``leads`` and ``active`` are asked from any thread: whether this process leads, and how many of its migrations
    are under way."""

    def __init__(self, metrics: Metrics, *, leads: Callable[[], bool], active: Callable[[], int]) -> None:
        meter = metrics.meter
        self._spread: tuple[float, float] | None = None
        self._rounds = instruments.counter(meter, rescheduler.ROUNDS)
        self._round = instruments.histogram(meter, rescheduler.ROUND_DURATION)
        self._planned = instruments.counter(meter, rescheduler.PLANNED_MIGRATIONS)
        self._ended = instruments.counter(meter, rescheduler.ENDED_MIGRATIONS)
        self._skipped_sequences = instruments.counter(meter, rescheduler.SKIPPED_SEQUENCES)
        self._skipped_instances = instruments.counter(meter, rescheduler.SKIPPED_INSTANCES)
        instruments.gauge(meter, rescheduler.LEADER, lambda: [(int(leads()), {})])
        instruments.gauge(meter, rescheduler.ACTIVE_MIGRATIONS, lambda: [(active(), {})])
        instruments.gauge(meter, rescheduler.SPREAD, self._read_spread)

    def round(self, outcome: RoundOutcome) -> None:
        """A round is over."""
        self._rounds.add(1, {names.OUTCOME: outcome.value})
        if outcome is not RoundOutcome.PLANNED:
            # What another may be doing now is not this process's to show.
            self._spread = None

    def planned(self, decided: Plan, duration_s: float) -> None:
        """So is one of a leader, with this decision."""
        self.round(RoundOutcome.PLANNED)
        self._round.record(duration_s)
        self._spread = (decided.spread_before_tokens, decided.spread_after_tokens)
        for reason, moves in Counter(migration.reason.value for migration in decided.migrations).items():
            self._planned.add(moves, {names.MIGRATION_REASON: reason})
        for reason, instances in Counter(skip.reason.value for skip in decided.skipped_instances).items():
            self._skipped_instances.add(instances, {names.REASON: reason})
        sequences: Counter[str] = Counter()
        for skip in decided.skipped:
            sequences[skip.reason.value] += len(skip.request_ids)
        for reason, count in sequences.items():
            self._skipped_sequences.add(count, {names.REASON: reason})

    def ended(self, ending: Ending) -> None:
        """The end of a migration was told."""
        self._ended.add(1, {names.OUTCOME: ending.outcome.value})

    def _read_spread(self) -> list[tuple[float, instruments.Attributes]]:
        spread = self._spread
        return [] if spread is None else list(zip(spread, ({names.WHEN: "before"}, {names.WHEN: "after"}), strict=True))

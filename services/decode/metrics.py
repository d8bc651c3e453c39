"""What a decode instance measures beside its load and steps: predictions, KV that comes, migrations.

Owns the instruments. All methods are for the event loop; gauges read the last load, whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from services.decode.migration_progress import MigrationProgress
from starmesh.rpc.status import StatusError
from starmesh.telemetry import instruments, names
from starmesh.telemetry.metrics import Metrics
from starmesh.telemetry.registry import decode
from starmesh.transfer import PullResult
from starmesh.types import InstanceLoad, MigrationReason


class DecodeMetrics:
    """``load`` is asked from any thread: the last load, None before the first."""

    def __init__(self, metrics: Metrics, load: Callable[[], InstanceLoad | None]) -> None:
        meter = metrics.meter
        self._handoff = instruments.histogram(meter, decode.HANDOFF_DURATION)
        self._transfer_bytes = instruments.counter(meter, decode.TRANSFER_BYTES)
        self._transfer = instruments.histogram(meter, decode.TRANSFER_DURATION)
        self._transfer_failures = instruments.counter(meter, decode.TRANSFER_FAILURES)
        self._migrations = instruments.counter(meter, decode.MIGRATIONS)
        self._migration = instruments.histogram(meter, decode.MIGRATION_DURATION)
        self._gap = instruments.histogram(meter, decode.MIGRATION_GAP)
        self._migration_bytes = instruments.counter(meter, decode.MIGRATION_BYTES)
        self._rounds = instruments.histogram(meter, decode.MIGRATION_ROUNDS)

        def of_load(read: Callable[[InstanceLoad], Iterable[tuple[float, instruments.Attributes]]]) -> instruments.Read:
            def read_last() -> Iterable[tuple[float, instruments.Attributes]]:
                last = load()
                return [] if last is None else read(last)

            return read_last

        instruments.gauge(meter, decode.PREDICTED_TOKENS, of_load(_predicted))
        instruments.gauge(meter, decode.PREDICTION_AGE, of_load(_ages))
        instruments.gauge(meter, decode.UNPREDICTED_SEQUENCES, of_load(_unpredicted))
        instruments.gauge(meter, decode.ACTIVE_MIGRATIONS, of_load(_under_way))

    async def measure_handoff(self, handoff: Awaitable[None]) -> None:
        """Await a handoff; what goes wrong is raised as it is."""
        began_s = time.monotonic()
        attributes: dict[str, str] = {}
        try:
            await handoff
        except StatusError as error:
            attributes = {names.ERROR_TYPE: error.code.name}
            raise
        except asyncio.CancelledError:
            attributes = {names.ERROR_TYPE: "CANCELLED"}
            raise
        finally:
            self._handoff.record(time.monotonic() - began_s, attributes)

    def pulled(self, result: PullResult | None) -> None:
        """KV was pulled, for a handoff or a migration; None: it failed."""
        if result is None:
            self._transfer_failures.add(1)
            return
        attributes = {names.TRANSFER_BACKEND: result.backend.value}
        self._transfer_bytes.add(result.bytes, attributes)
        self._transfer.record(result.duration_s, attributes)

    def migrated(self, reason: MigrationReason, how: MigrationProgress, duration_s: float) -> None:
        """A migration away from here is over."""
        outcome = {names.MIGRATION_OUTCOME: how.state.name.lower()}
        why = how.refusal or how.cause
        cause = {names.MIGRATION_CAUSE: why.value} if why is not None else {}
        self._migrations.add(1, {names.MIGRATION_REASON: reason.value} | outcome | cause)
        self._migration.record(duration_s, outcome)
        self._migration_bytes.add(how.transfer_bytes)
        self._rounds.record(how.rounds)
        if how.frozen_s:
            self._gap.record(how.frozen_s, outcome)


def _predicted(load: InstanceLoad) -> Iterable[tuple[float, instruments.Attributes]]:
    yield sum(sequence.remaining_tokens or 0 for sequence in load.sequences), {names.QUANTILE: "0.5"}
    yield sum(sequence.remaining_tokens_upper or 0 for sequence in load.sequences), {names.QUANTILE: "0.9"}


def _ages(load: InstanceLoad) -> Iterable[tuple[float, instruments.Attributes]]:
    ages = [sequence.prediction_age_tokens for sequence in load.sequences if sequence.prediction_age_tokens is not None]
    return [(sum(ages) / len(ages), {})] if ages else [(0.0, {})]


def _unpredicted(load: InstanceLoad) -> Iterable[tuple[float, instruments.Attributes]]:
    return [(sum(sequence.remaining_tokens is None for sequence in load.sequences), {})]


def _under_way(load: InstanceLoad) -> Iterable[tuple[float, instruments.Attributes]]:
    yield load.incoming_migrations, {names.DIRECTION: "in"}
    yield load.outgoing_migrations, {names.DIRECTION: "out"}

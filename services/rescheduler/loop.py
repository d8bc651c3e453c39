"""The rescheduler's loop: observe, plan, act, as long as it leads.

Owns the order of a round, its pace, and the memory that goes from round to round. Owns no decision (``plan``), no call
to an instance (``commander``) and no lease (``lead``).

A round acts only as a leader that the ledger has confirmed since the plan was made; should another have taken over in
the moment since, instances refuse the older term. Who leads anew begins with an empty memory: what a former leader has
under way shows in the loads, and counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import Span

from services.rescheduler.commander import Commander, Order
from services.rescheduler.ending import Ending, Outcome
from services.rescheduler.lead import Lead
from services.rescheduler.metrics import ReschedulerMetrics, RoundOutcome
from services.rescheduler.recorder import Recorder
from services.rescheduler.shown_rounds import ShownRounds
from starmesh.ledger import Ledger, LedgerError
from starmesh.policy.rescheduling import Plan, PlanMemory, ReschedulingConfig, plan
from starmesh.policy.rescheduling.record import RecordedRound
from starmesh.rpc.credentials import Credentials
from starmesh.telemetry import names
from starmesh.telemetry.metrics import NO_METRICS, Metrics
from starmesh.telemetry.setup import span, traceparent_of
from starmesh.types import ClusterView, Role

log = logging.getLogger(__name__)

_INLINE_SEQUENCES: Final = 2048
"""Larger clusters are planned in a thread: some 5 ms on the event loop hold nothing up."""


class Rescheduler:
    """Rounds over one ledger. ``recorder`` may be None."""

    def __init__(
        self,
        ledger: Ledger,
        lead: Lead,
        config: ReschedulingConfig,
        *,
        interval_s: float,
        recorder: Recorder | None = None,
        credentials: Credentials | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.memory = PlanMemory()
        self._ledger = ledger
        self._lead = lead
        self._config = config
        self._interval_s = interval_s
        self._recorder = recorder
        self._commander = Commander(timeout_s=config.in_flight_timeout_s, credentials=credentials)
        self._metrics = ReschedulerMetrics(
            metrics, leads=lambda: lead.term is not None, active=lambda: len(self._commander)
        )
        self._shown = ShownRounds(ledger, lead.instance_id)
        self._term: int | None = None
        self._ledger_answers = True

    async def run(self, stop: asyncio.Event) -> None:
        """Rounds until ``stop``; then resign. Never two at a time: a slow one skips the beginnings that it misses."""
        loop = asyncio.get_running_loop()
        first_s = loop.time()
        try:
            while not stop.is_set():
                try:
                    await self.round()
                except Exception:
                    self._metrics.round(RoundOutcome.FAILED)
                    # The next view may be another; without rounds the cluster would go out of balance for good.
                    log.exception("a round failed")
                wait_s = until_next(first_s, loop.time(), self._interval_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await stop.wait()
        finally:
            await self._commander.close()
            await self._lead.resign()

    async def round(self) -> Plan | None:
        """One round. Returns its plan, None for a standby and while the ledger does not answer."""
        try:
            return await self._round()
        except LedgerError as error:
            if self._ledger_answers:
                log.warning("the ledger does not answer, rounds wait: %s", error)
            self._ledger_answers = False
            self._metrics.round(RoundOutcome.NO_LEDGER)
            return None

    async def _round(self) -> Plan | None:
        began_s = time.monotonic()
        term = await self._lead.ask()
        if not self._ledger_answers:
            self._ledger_answers = True
            log.info("the ledger answers again")
        await self._enter(term)
        if term is None:
            self._metrics.round(RoundOutcome.STANDBY)
            return None
        view = await self._ledger.view()
        for ending in self._commander.take_endings():
            self._shown.ended(ending)
            self._metrics.ended(ending)
            self.memory = remembered(self.memory, ending, now_s=view.now_s, config=self._config)
        # A trace of its own: it belongs to none of the requests that it moves, and they link to it.
        with span(names.SPAN_ROUND, Context()) as current:
            before = self.memory
            decided = await self._plan(view)
            if self._recorder is not None and view.of_role(Role.DECODE):
                self._recorder.add(RecordedRound(view, before, self._config, decided))
            _describe(current, term, view, decided)
            if decided.migrations:
                await self._enter(await self._lead.ask())
                if self._term != term:
                    self._metrics.round(RoundOutcome.SUPERSEDED)
                    return None
            self.memory = decided.memory
            await self._commander.retain((entry.migration for entry in self.memory.in_flight), view)
            self._issue(view, decided, term, traceparent_of(current))
        self._metrics.planned(decided, time.monotonic() - began_s)
        await self._shown.add(term, view, decided)
        return decided

    async def _enter(self, term: int | None) -> None:
        """Act under ``term`` from now on. What was remembered under another one is for nobody."""
        if term != self._term:
            self._term = term
            self.memory = PlanMemory()
            await self._commander.abandon()
            if term is not None:
                await self._shown.go_on()

    async def _plan(self, view: ClusterView) -> Plan:
        sequences = sum(len(found.load.sequences) for found in view.instances if found.load is not None)
        if sequences <= _INLINE_SEQUENCES:
            return plan(view, self.memory, self._config)
        return await asyncio.to_thread(plan, view, self.memory, self._config)

    def _issue(self, view: ClusterView, decided: Plan, term: int, traceparent: str) -> None:
        addresses = {instance.info.instance_id: instance.info.address for instance in view.instances}
        for migration in decided.migrations:
            source, target = addresses[migration.source], addresses[migration.target]
            self._commander.issue(Order(migration, source, target, term, traceparent))
        if decided.migrations:
            log.info(
                "%s moves %s; spread of its load %.0f to %.0f tokens",
                decided.policy,
                ", ".join(
                    f"{m.request_id} from {m.source} to {m.target} ({m.reason.value}, gain {m.gain_tokens:.0f} tokens)"
                    for m in decided.migrations
                ),
                *(decided.spread_before_tokens, decided.spread_after_tokens),
            )


def until_next(first_s: float, now_s: float, interval_s: float) -> float:
    """Seconds until the next beginning of a round after ``now_s``; they are ``interval_s`` apart from ``first_s`` on,
    whatever rounds take."""
    return interval_s - (now_s - first_s) % interval_s


def remembered(memory: PlanMemory, ending: Ending, *, now_s: float, config: ReschedulingConfig) -> PlanMemory:
    """The memory with what became of a migration; unchanged if it is not that one which is in flight."""
    migration = ending.migration
    if not any(entry.migration == migration for entry in memory.in_flight):
        return memory
    match ending.outcome:
        case Outcome.MOVED:
            return memory.succeeded(migration.request_id, duration_s=ending.duration_s, now_s=now_s, config=config)
        case Outcome.FAILED:
            return memory.failed(migration.request_id, now_s=now_s, config=config)
        case Outcome.GONE:
            return memory.withdrawn(migration.request_id)


def _describe(span: Span, term: int, view: ClusterView, decided: Plan) -> None:
    """What the round saw and decided, as attributes."""
    if not span.is_recording():
        return
    span.set_attribute(names.RESCHEDULING_POLICY, decided.policy)
    span.set_attribute(names.LEADER_TERM, term)
    span.set_attribute(names.INSTANCES, len(view.of_role(Role.DECODE)))
    span.set_attribute(names.MIGRATIONS, len(decided.migrations))
    span.set_attribute(names.SPREAD_BEFORE_TOKENS, decided.spread_before_tokens)
    span.set_attribute(names.SPREAD_AFTER_TOKENS, decided.spread_after_tokens)
    skipped: dict[str, int] = {}
    for instance in decided.skipped_instances:
        skipped[instance.reason.value] = skipped.get(instance.reason.value, 0) + 1
    for sequences in decided.skipped:
        skipped[sequences.reason.value] = skipped.get(sequences.reason.value, 0) + len(sequences.request_ids)
    for reason, count in sorted(skipped.items()):
        span.set_attribute(f"{names.SKIPPED}.{reason}", count)

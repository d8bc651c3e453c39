"""Moves sequences away from an instance that drains, or that is about to run out of blocks.

Owns when to look, what is under way on its own account and what failed a short while ago. Owns no choice of what goes
where (``starmesh.policy.evacuation``) and no migration (``migrator``). Needs no rescheduler: an instance that is asked
to leave has only its grace period, and one that runs dry preempts with its next step.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span

from services.decode.config import EvacuationConfig
from services.decode.migration_progress import MigrationProgress
from services.decode.migrator import Migrator
from services.decode.outgoing import MoveAsked
from starmesh.clock import WallClock
from starmesh.instance.instance import Instance
from starmesh.ledger import LedgerError
from starmesh.migration.terms import GONE
from starmesh.policy.evacuation import drain_plan, relief_plan
from starmesh.policy.rescheduling import Plan, PlanMemory
from starmesh.rpc.status import StatusError
from starmesh.telemetry import names
from starmesh.telemetry.setup import link_to, span, traceparent_of
from starmesh.types import ClusterView, InstanceLoad, InstanceState, Migration

log = logging.getLogger(__name__)


class Evacuator:
    """Looks at each load of its instance and begins what must move."""

    def __init__(self, instance: Instance, migrator: Migrator, config: EvacuationConfig) -> None:
        self._instance = instance
        self._migrator = migrator
        self._config = config
        self._memory = PlanMemory()
        # What became of migrations since the last plan was begun, as many at most as were under way then. Not noted in
        # the memory at once: a plan that is being made replaces that.
        self._endings: list[Callable[[PlanMemory], PlanMemory]] = []
        self._clock = WallClock()
        self._ledger_ahead_s = 0.0  # the ledger's clock less ours, as of the last view
        self._looking = False
        self._no_relief_until_s = 0.0

    def look(self, load: InstanceLoad) -> None:
        """Begin to move sequences away if ``load`` asks for it, unless a look is under way. Every load comes here."""
        if not self._looking and self._needed(load):
            self._looking = True
            self._instance.background(self._evacuate(load))

    def _needed(self, load: InstanceLoad) -> bool:
        if not load.running_sequences:
            return False
        if self._instance.state is not InstanceState.READY:
            return True
        if self._clock.now_s() < self._no_relief_until_s:
            return False
        # Each sequence fills at most so many blocks more within the horizon; what exactly must go is the plan's.
        growth = -(-self._steps(load) // self._instance.layout.block_tokens) + 1
        return load.running_sequences > 1 and load.running_sequences * growth > load.free_blocks

    def _steps(self, load: InstanceLoad) -> int:
        """Decode steps within the horizon."""
        if load.step_duration_s <= 0:
            return 1
        steps = math.ceil(self._config.relief_horizon_s / load.step_duration_s)
        return min(steps, self._config.rescheduling.horizon_steps)

    async def _evacuate(self, load: InstanceLoad) -> None:
        try:
            view = await self._instance.ledger.view()
            self._ledger_ahead_s = view.now_s - self._clock.now_s()
            endings, self._endings = self._endings, []
            for remember in endings:
                self._memory = remember(self._memory)
            plan = await self._plan(view, load)
            self._memory = plan.memory
            if plan.migrations:
                self._begin(plan, view)
            else:
                # A full cluster would otherwise be read and planned with each report of each of its instances.
                self._no_relief_until_s = self._clock.now_s() + self._config.relief_horizon_s / 4
        except LedgerError as error:
            log.debug("nothing can move without the ledger: %s", error)
        finally:
            self._looking = False

    async def _plan(self, view: ClusterView, load: InstanceLoad) -> Plan:
        """In a thread: with a large cluster's view it takes as long as a round of rescheduling."""
        instance_id, config = self._instance.instance_id, self._config.rescheduling
        if self._instance.state is not InstanceState.READY:
            return await asyncio.to_thread(drain_plan, view, instance_id, load, self._memory, config)
        order = await self._instance.engine.call(lambda core: core.preempted_first())
        return await asyncio.to_thread(
            relief_plan,
            view,
            instance_id,
            load,
            self._memory,
            config,
            steps=self._steps(load),
            preempted_first=order,
        )

    def _begin(self, plan: Plan, view: ClusterView) -> None:
        addresses = {instance.info.instance_id: instance.info.address for instance in view.instances}
        attributes: dict[str, str | int] = {
            names.INSTANCE_ID: self._instance.instance_id,
            names.MIGRATIONS: len(plan.migrations),
            names.MIGRATION_REASON: plan.migrations[0].reason.value,
        }
        # A trace of its own, as a round of the rescheduler: the migrations link to it, and it to them.
        with span(names.SPAN_EVACUATION, Context(), attributes=attributes) as current:
            for migration in plan.migrations:
                self._move(migration, addresses[migration.target], current)

    def _move(self, migration: Migration, address: str, current: Span) -> None:
        asked = MoveAsked(
            request_id=migration.request_id,
            target_id=migration.target,
            address=address,
            reason=migration.reason,
            epoch=migration.epoch,
            traceparent=traceparent_of(current),
        )
        try:
            begun = self._migrator.migrate(asked)
        except StatusError as error:
            # Somebody else moves it, it has just ended, or as many as may are on their way: the next look sees.
            log.debug("%s is not moved to %s: %s", migration.request_id, migration.target, error)
            self._memory = self._memory.withdrawn(migration.request_id)
            return
        link_to(current, begun.traceparent)
        self._instance.background(self._remember(migration, begun.outcome()))

    async def _remember(self, migration: Migration, ending: Coroutine[Any, Any, MigrationProgress]) -> None:
        started_s = self._clock.now_s()
        progress = await ending
        now_s, config = self._clock.now_s() + self._ledger_ahead_s, self._config.rescheduling
        request_id = migration.request_id
        if progress.moved:
            duration_s = self._clock.now_s() - started_s
            log.info("moved %s to %s (%s)", request_id, migration.target, migration.reason.value)
            self._endings.append(
                lambda memory: memory.succeeded(request_id, duration_s=duration_s, now_s=now_s, config=config)
            )
        elif progress.cause in GONE:
            self._endings.append(lambda memory: memory.withdrawn(request_id))
        else:
            why = progress.refusal or progress.cause
            log.info("%s stays: %s", request_id, why.value if why is not None else progress.state.name)
            self._endings.append(lambda memory: memory.failed(request_id, now_s=now_s, config=config))

"""What simulated instances decide by themselves: to leave when they drain, and to make room before they would preempt.

Owns when an instance looks and what it remembers of its own moves; the choice is the live ``policy.evacuation``. Live,
an instance looks at each of its reports. Here it looks when its blocks could first run short: until then every look
would find nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from starmesh.migration.terms import Cause
from starmesh.policy.evacuation import drain_plan, relief_plan
from starmesh.policy.rescheduling import Plan, PlanMemory, ReschedulingConfig
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.rounds import remembered
from starmesh.sim.views import Views
from starmesh.types import InstanceLoad, InstanceState, Migration, Role

RELIEF_HORIZON_S = 2.0
"""How far ahead blocks must suffice (live: ``relief_horizon_s``)."""

MAX_MIGRATIONS = 4
"""Moves from and to one instance at a time (live: ``max_outgoing_migrations``)."""


@dataclass(slots=True)
class _Look:
    instance: SimulatedInstance
    next: Event | None = None
    memory: PlanMemory = field(default_factory=PlanMemory)
    no_relief_until_s: float = 0.0


class Evacuations:
    """``relieve``: whether instances move sequences away before they would preempt; a draining one always does."""

    def __init__(
        self,
        loop: EventLoop,
        views: Views,
        config: ReschedulingConfig,
        *,
        interval_s: float,
        relieve: bool,
        begin: Callable[[Migration], bool],
    ) -> None:
        self._loop = loop
        self._views = views
        self._config = replace(
            config,
            failure_cool_down_s=1.0,
            max_in_flight_per_source=MAX_MIGRATIONS,
            max_in_flight_per_target=MAX_MIGRATIONS,
        )
        self._interval_s = interval_s
        self._relieve = relieve
        self._begin = begin
        self._looks: dict[str, _Look] = {}
        self._own: dict[str, Migration] = {}

    def add(self, instance: SimulatedInstance) -> None:
        """Look after a decode instance."""
        self._looks[instance.info.instance_id] = _Look(instance)

    def remove(self, instance_id: str) -> None:
        """It is gone."""
        look = self._looks.pop(instance_id, None)
        if look is not None and look.next is not None:
            look.next.cancel()

    def changed(self, instance_id: str) -> None:
        """It has another sequence or state than it had: look at its next report."""
        look = self._looks.get(instance_id)
        if look is None or not (self._relieve or _leaves(look)):
            return
        due_s = self._loop.now_s + self._interval_s
        if look.next is not None and look.next.do is not None:
            if look.next.at_s <= due_s:
                return
            look.next.cancel()
        look.next = self._loop.at(due_s, lambda: self._turn(look))

    def migration_ended(self, migration: Migration, *, moved: bool, cause: Cause | None, duration_s: float) -> None:
        """A migration has ended; others' are nothing to remember."""
        if self._own.get(migration.request_id) != migration:
            return
        del self._own[migration.request_id]
        look = self._looks.get(migration.source)
        if look is not None:
            look.memory = remembered(
                look.memory,
                migration,
                self._config,
                moved=moved,
                cause=cause,
                duration_s=duration_s,
                now_s=self._loop.now_s,
            )
            self.changed(migration.source)

    def _turn(self, look: _Look) -> None:
        if not look.instance.alive:
            return
        instance_id = look.instance.info.instance_id
        load = self._views.load_now(instance_id)
        if not load.running_sequences:
            return
        if _leaves(look):
            self._evacuate(look, load)
            look.next = self._loop.after(self._interval_s, lambda: self._turn(look))
            return
        wait_s = self._slack_s(load)
        if wait_s <= 0:
            if self._loop.now_s >= look.no_relief_until_s:
                self._evacuate(look, load)
            wait_s = self._interval_s
        # With one sequence alone there is nobody to make room for, until another comes.
        if wait_s < math.inf:
            look.next = self._loop.after(max(wait_s, self._interval_s), lambda: self._turn(look))

    def _slack_s(self, load: InstanceLoad) -> float:
        """How long blocks cannot run short within the horizon, whatever its present sequences do; 0 or less when they
        may now (the live ``Evacuator`` asks the same of each report)."""
        if load.running_sequences < 2:
            return math.inf
        growth = -(-self._steps(load) // self._views.block_tokens) + 1
        spare = load.free_blocks - load.running_sequences * growth
        if spare < 0:
            return 0.0
        # Each sequence takes at most one block at once, and then one in so many steps.
        steps = (spare // load.running_sequences - 1) * self._views.block_tokens
        return max(self._interval_s, 0.9 * steps * load.step_duration_s)

    def _steps(self, load: InstanceLoad) -> int:
        if load.step_duration_s <= 0:
            return 1
        return min(math.ceil(RELIEF_HORIZON_S / load.step_duration_s), self._config.horizon_steps)

    def _evacuate(self, look: _Look, load: InstanceLoad) -> None:
        plan = self._plan(look, load)
        look.memory = plan.memory
        if not plan.migrations:
            look.no_relief_until_s = self._loop.now_s + RELIEF_HORIZON_S / 4
        for migration in plan.migrations:
            self._own[migration.request_id] = migration
            if not self._begin(migration):
                del self._own[migration.request_id]
                look.memory = look.memory.withdrawn(migration.request_id)

    def _plan(self, look: _Look, load: InstanceLoad) -> Plan:
        instance_id = look.instance.info.instance_id
        view = self._views.of((Role.DECODE,))
        if _leaves(look):
            return drain_plan(view, instance_id, load, look.memory, self._config)
        return relief_plan(
            view,
            instance_id,
            load,
            look.memory,
            self._config,
            steps=self._steps(load),
            preempted_first=look.instance.core.preempted_first(),
        )


def _leaves(look: _Look) -> bool:
    return look.instance.info.state is not InstanceState.READY

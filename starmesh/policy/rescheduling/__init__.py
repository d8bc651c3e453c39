"""Rescheduling: which running sequences move to which decode instance, and why the others stay.

``plan`` is a plain function: time comes in as ``view.now_s``, state comes in and goes out as ``PlanMemory``. A round
goes through small steps: measure -> classify -> candidates -> amortisation -> room over the horizon -> simulate and
select -> budget. ``POLICIES`` holds the policies by name. Ties break by id, and no order of instances or sequences in
the view matters. Owns no clock, no transport and no storage: the live rescheduler and the simulator act on the plan and
tell the memory what became of it.
"""

from __future__ import annotations

from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import measure, reported_owners, usable_instances
from starmesh.policy.rescheduling.memory import CoolDown, InFlight, PlanMemory
from starmesh.policy.rescheduling.outcome import (
    InstanceSkip,
    Plan,
    SequenceSkip,
    SkippedInstance,
    SkippedSequences,
)
from starmesh.policy.rescheduling.policies import POLICIES, ReschedulingPolicy
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.unplanned import make_way, unplanned_migrations
from starmesh.types import ClusterView

__all__ = [
    "POLICIES",
    "CoolDown",
    "InFlight",
    "InstanceSkip",
    "Plan",
    "PlanMemory",
    "ReschedulingConfig",
    "ReschedulingPolicy",
    "SequenceSkip",
    "SkippedInstance",
    "SkippedSequences",
    "plan",
]


def plan(view: ClusterView, memory: PlanMemory, config: ReschedulingConfig) -> Plan:
    """Decide one round. Raises ValueError for an unknown ``config.policy``.

    Instances of different layouts cannot exchange KV: each layout is balanced by itself, within one budget.
    """
    policy = POLICIES.get(config.policy)
    if policy is None:
        raise ValueError(f"no rescheduling policy is named {config.policy!r}; there are {', '.join(sorted(POLICIES))}")
    groups, skipped_instances = usable_instances(view, config)
    memory = memory.reconciled(reported_owners(groups, memory), now_s=view.now_s, config=config)
    if not policy.steps:
        return Plan(policy=policy.name, memory=memory, skipped_instances=skipped_instances)
    unplanned = unplanned_migrations(groups, memory)
    rounds: list[Round] = []
    for instances in groups:
        round_ = Round(measure(instances, config, policy.foresight), memory, now_s=view.now_s)
        make_way(round_, unplanned)
        for step in policy.steps:
            step(round_)
        memory = memory.started(tuple(round_.migrations))
        rounds.append(round_)
    return Plan(
        policy=policy.name,
        memory=memory,
        migrations=tuple(entry.migration for round_ in rounds for entry in round_.migrations),
        skipped_instances=skipped_instances,
        skipped=tuple(skip for round_ in rounds for skip in round_.skipped()),
        spread_before_tokens=_together([round_.spread_before for round_ in rounds]),
        spread_after_tokens=_together([round_.spread for round_ in rounds]),
    )


def _together(spreads: list[float]) -> float:
    """The spread of several layouts: the worst one's."""
    return max(spreads, default=0.0)

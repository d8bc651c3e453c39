"""Rescheduling: which running sequences move to which decode instance, and why the others stay.

``plan`` is a plain function: time comes in as ``view.now_s``, state comes in and goes out as ``PlanMemory``. A round
goes through small steps: measure -> classify -> candidates -> amortisation -> room over the horizon -> simulate and
select -> budget. ``POLICIES`` holds the policies by name. Ties break by id, and no order of instances or sequences in
the view matters. Owns no clock, no transport and no storage: the live rescheduler and the simulator act on the plan and
tell the memory what became of it.
"""

from __future__ import annotations

from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import Group, measure, reported_owners, usable_instances
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
    usable, skipped_instances = usable_instances(view, config)
    groups = [measure(instances, config, policy.foresight) for instances in usable]
    remembered = [group.sequences.rows_named(memory.request_ids) for group in groups]
    memory = memory.reconciled(reported_owners(groups, remembered), now_s=view.now_s, config=config)
    budget = config.max_in_flight - _under_way(groups, memory)
    rounds: list[Round] = []
    for group, rows in zip(groups, remembered, strict=True):
        round_ = Round(group, memory, rows, now_s=view.now_s, budget=budget)
        for step in policy.steps:
            step(round_)
        budget = round_.budget
        rounds.append(round_)
    for round_ in rounds:
        memory = memory.started(tuple(round_.migrations))
    return Plan(
        policy=policy.name,
        memory=memory,
        migrations=tuple(entry.migration for round_ in rounds for entry in round_.migrations),
        skipped_instances=skipped_instances,
        skipped=tuple(skip for round_ in rounds for skip in round_.skipped()),
        spread_before_tokens=_together([round_.spread_before for round_ in rounds]),
        spread_after_tokens=_together([round_.spread for round_ in rounds]),
    )


def _under_way(groups: list[Group], memory: PlanMemory) -> int:
    """How many migrations are under way in the cluster: what is remembered, and what instances report beyond it, for a
    predecessor, an operator or a draining instance may have started them. Each is counted at the end where more are
    seen."""
    out = into = len(memory.in_flight)
    for group in groups:
        outgoing, incoming = group.outgoing.copy(), group.incoming.copy()
        for entry in memory.in_flight:
            for name, unplanned in ((entry.migration.source, outgoing), (entry.migration.target, incoming)):
                if name in group.index:
                    unplanned[group.index[name]] -= 1
        out += int(outgoing.clip(min=0).sum())
        into += int(incoming.clip(min=0).sum())
    return max(out, into)


def _together(spreads: list[float]) -> float:
    """The spread of several layouts: the worst one's."""
    return max(spreads, default=0.0)

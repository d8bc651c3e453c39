"""What a rescheduler shows: its lead, its rounds, and what they decide."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import WAITS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = (Role.RESCHEDULER,)

LEADER = Metric(
    name="starmesh.rescheduler.leader",
    kind=Kind.GAUGE,
    unit="{leader}",
    description="1 while this process leads, as the ledger last said; 0 for a standby.",
    roles=_ROLES,
)
ROUNDS = Metric(
    name="starmesh.rescheduler.rounds",
    kind=Kind.COUNTER,
    unit="{round}",
    description="Rounds: planned, standby (another leads), superseded (another had taken over when it was to act), "
    "no_ledger or failed.",
    roles=_ROLES,
    attributes=(names.OUTCOME,),
)
ROUND_DURATION = Metric(
    name="starmesh.rescheduler.round.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Duration of a leader's round: view, plan, commands.",
    roles=_ROLES,
    buckets=WAITS_S,
)
PLANNED_MIGRATIONS = Metric(
    name="starmesh.rescheduler.planned_migrations",
    kind=Kind.COUNTER,
    unit="{migration}",
    description="Migrations commanded.",
    roles=_ROLES,
    attributes=(names.MIGRATION_REASON,),
)
ENDED_MIGRATIONS = Metric(
    name="starmesh.rescheduler.ended_migrations",
    kind=Kind.COUNTER,
    unit="{migration}",
    description="Commanded migrations whose end was told: moved, failed or gone (the request had ended).",
    roles=_ROLES,
    attributes=(names.OUTCOME,),
)
ACTIVE_MIGRATIONS = Metric(
    name="starmesh.rescheduler.active_migrations",
    kind=Kind.GAUGE,
    unit="{migration}",
    description="Commanded migrations whose end was not told yet.",
    roles=_ROLES,
)
SKIPPED_SEQUENCES = Metric(
    name="starmesh.rescheduler.skipped_sequences",
    kind=Kind.COUNTER,
    unit="{sequence}",
    description="Candidates that stayed where they were, added up over rounds, by the first reason that applied.",
    roles=_ROLES,
    attributes=(names.REASON,),
)
SKIPPED_INSTANCES = Metric(
    name="starmesh.rescheduler.skipped_instances",
    kind=Kind.COUNTER,
    unit="{instance}",
    description="Instances that were not considered, added up over rounds, by reason.",
    roles=_ROLES,
    attributes=(names.REASON,),
)
SPREAD = Metric(
    name="starmesh.rescheduler.spread",
    kind=Kind.GAUGE,
    unit="{token}",
    description="Root mean square of the instances' distance from the mean load, before the last round's migrations "
    "and as predicted after them.",
    roles=_ROLES,
    attributes=(names.WHEN,),
)

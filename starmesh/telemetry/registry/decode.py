"""What decode instances alone show: predictions of their load, KV that comes, migrations."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import ROUNDS, WAITS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = (Role.DECODE,)

PREDICTED_TOKENS = Metric(
    name="starmesh.predicted_tokens",
    kind=Kind.GAUGE,
    unit="{token}",
    description="Tokens that the sequences here are predicted to generate still, by the quantile of the prediction.",
    roles=_ROLES,
    attributes=(names.QUANTILE,),
)
PREDICTION_AGE = Metric(
    name="starmesh.prediction.age",
    kind=Kind.GAUGE,
    unit="{token}",
    description="Tokens that a sequence has generated since its last prediction, at the mean over those that have one.",
    roles=_ROLES,
)
UNPREDICTED_SEQUENCES = Metric(
    name="starmesh.prediction.missing_sequences",
    kind=Kind.GAUGE,
    unit="{sequence}",
    description="Sequences here without a prediction.",
    roles=_ROLES,
)
HANDOFF_DURATION = Metric(
    name="starmesh.handoff.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Of a prefilled sequence: reserving blocks and pulling its KV. error.type is why it failed.",
    roles=_ROLES,
    attributes=(names.ERROR_TYPE,),
    buckets=WAITS_S,
)
TRANSFER_BYTES = Metric(
    name="starmesh.transfer.bytes",
    kind=Kind.COUNTER,
    unit="By",
    description="KV pulled from other instances, for handoffs and migrations.",
    roles=_ROLES,
    attributes=(names.TRANSFER_BACKEND,),
)
TRANSFER_DURATION = Metric(
    name="starmesh.transfer.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Duration of a pull of KV that succeeded.",
    roles=_ROLES,
    attributes=(names.TRANSFER_BACKEND,),
    buckets=WAITS_S,
)
TRANSFER_FAILURES = Metric(
    name="starmesh.transfer.failures",
    kind=Kind.COUNTER,
    unit="{transfer}",
    description="Pulls of KV that failed; what waited for them was tried again elsewhere.",
    roles=_ROLES,
)
MIGRATIONS = Metric(
    name="starmesh.migrations",
    kind=Kind.COUNTER,
    unit="{migration}",
    description="Migrations that have ended, at their source: why they were begun, how they ended and, where the "
    "sequence did not move, why not.",
    roles=_ROLES,
    attributes=(names.MIGRATION_REASON, names.MIGRATION_OUTCOME, names.MIGRATION_CAUSE),
)
MIGRATION_DURATION = Metric(
    name="starmesh.migration.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the command to the end of a migration, at its source.",
    roles=_ROLES,
    attributes=(names.MIGRATION_OUTCOME,),
    buckets=WAITS_S,
)
MIGRATION_GAP = Metric(
    name="starmesh.migration.gap",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="How long a sequence that moved, or was to move, was in no batch: what its client may notice.",
    roles=_ROLES,
    attributes=(names.MIGRATION_OUTCOME,),
    buckets=WAITS_S,
)
MIGRATION_BYTES = Metric(
    name="starmesh.migration.bytes",
    kind=Kind.COUNTER,
    unit="By",
    description="KV that was pulled from here by migrations, failed ones included.",
    roles=_ROLES,
)
MIGRATION_ROUNDS = Metric(
    name="starmesh.migration.rounds",
    kind=Kind.HISTOGRAM,
    unit="{round}",
    description="Copy rounds of a migration before its sequence stood still.",
    roles=_ROLES,
    buckets=ROUNDS,
)
ACTIVE_MIGRATIONS = Metric(
    name="starmesh.migrations.active",
    kind=Kind.GAUGE,
    unit="{migration}",
    description="Migrations under way, to (in) and from (out) the instance.",
    roles=_ROLES,
    attributes=(names.DIRECTION,),
)

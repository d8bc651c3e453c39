"""What the predictor shows: load, latency, and how well it does."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import BATCHES, CALLS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = (Role.PREDICTOR,)

PREDICTIONS = Metric(
    name="starmesh.predictor.predictions",
    kind=Kind.COUNTER,
    unit="{sample}",
    description="Samples answered.",
    roles=_ROLES,
)
DROPPED_SAMPLES = Metric(
    name="starmesh.predictor.dropped_samples",
    kind=Kind.COUNTER,
    unit="{sample}",
    description="Samples left unanswered.",
    roles=_ROLES,
    attributes=(names.REASON,),
)
ENDED_REQUESTS = Metric(
    name="starmesh.predictor.ended_requests",
    kind=Kind.COUNTER,
    unit="{request}",
    description="Requests whose end was told.",
    roles=_ROLES,
    attributes=(names.FINISHED,),
)
QUEUED_SAMPLES = Metric(
    name="starmesh.predictor.queued_samples",
    kind=Kind.GAUGE,
    unit="{sample}",
    description="Samples that wait.",
    roles=_ROLES,
)
BATCH_SAMPLES = Metric(
    name="starmesh.predictor.batch_samples",
    kind=Kind.HISTOGRAM,
    unit="{sample}",
    description="Samples in a forward.",
    roles=_ROLES,
    buckets=BATCHES,
)
LATENCY = Metric(
    name="starmesh.predictor.latency",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a call to its answer.",
    roles=_ROLES,
    buckets=CALLS_S,
)
SAMPLE_AGE = Metric(
    name="starmesh.predictor.sample_age",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a call to a forward with samples of it.",
    roles=_ROLES,
    buckets=CALLS_S,
)
MAE = Metric(
    name="starmesh.predictor.mae",
    kind=Kind.GAUGE,
    unit="{token}",
    description="Mean absolute error of the median, by the part of its output that a request had.",
    roles=_ROLES,
    attributes=(names.PROGRESS,),
)
COVERAGE = Metric(
    name="starmesh.predictor.coverage",
    kind=Kind.GAUGE,
    unit="1",
    description="Part of the estimates whose 0.9 quantile was not exceeded, by the part of its output that a request "
    "had.",
    roles=_ROLES,
    attributes=(names.PROGRESS,),
)
ACTIVE_VERSION = Metric(
    name="starmesh.predictor.active",
    kind=Kind.GAUGE,
    unit="{version}",
    description="1 for the version that answers.",
    roles=_ROLES,
    attributes=(names.VERSION, names.KIND),
)
COLLECTED_SAMPLES = Metric(
    name="starmesh.predictor.collected_samples",
    kind=Kind.GAUGE,
    unit="{sample}",
    description="Samples stored.",
    roles=_ROLES,
)
COLLECTED_BYTES = Metric(
    name="starmesh.predictor.collected_bytes",
    kind=Kind.GAUGE,
    unit="By",
    description="Bytes stored.",
    roles=_ROLES,
)

"""What prefill and decode instances share: KV blocks, sequences, steps."""

from __future__ import annotations

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import BATCHES, ENGINES, GAPS_S, Kind, Metric

KV_TOTAL_BLOCKS = Metric(
    name="starmesh.kv.total_blocks",
    kind=Kind.GAUGE,
    unit="{block}",
    description="KV blocks of the pool.",
    roles=ENGINES,
)
KV_USED_BLOCKS = Metric(
    name="starmesh.kv.used_blocks",
    kind=Kind.GAUGE,
    unit="{block}",
    description="KV blocks that sequences, leases or reservations hold; cached ones that could be evicted are not.",
    roles=ENGINES,
)
SEQUENCES = Metric(
    name="starmesh.sequences",
    kind=Kind.GAUGE,
    unit="{sequence}",
    description="Sequences in the batch (running), and those that wait for blocks or a place in it (waiting).",
    roles=ENGINES,
    attributes=(names.STATE,),
)
RESIDENT_TOKENS = Metric(
    name="starmesh.resident_tokens",
    kind=Kind.GAUGE,
    unit="{token}",
    description="Tokens whose KV is here.",
    roles=ENGINES,
)
OUTPUT_TOKENS = Metric(
    name="starmesh.output_tokens",
    kind=Kind.OBSERVED_COUNTER,
    unit="{token}",
    description="Tokens generated.",
    roles=ENGINES,
)
STEP_DURATION = Metric(
    name="starmesh.step.duration",
    kind=Kind.OBSERVED_HISTOGRAM,
    unit="s",
    description="Duration of a step: one forward of the batch, and what is made of it.",
    roles=ENGINES,
    buckets=GAPS_S,
)
STEP_SEQUENCES = Metric(
    name="starmesh.step.sequences",
    kind=Kind.OBSERVED_HISTOGRAM,
    unit="{sequence}",
    description="Sequences in a step: the batch size.",
    roles=ENGINES,
    buckets=BATCHES,
)
PREEMPTIONS = Metric(
    name="starmesh.preemptions",
    kind=Kind.OBSERVED_COUNTER,
    unit="{preemption}",
    description="Sequences that lost their blocks to others, to be computed again later.",
    roles=ENGINES,
)
INSTANCE_STATE = Metric(
    name="starmesh.instance.state",
    kind=Kind.GAUGE,
    unit="{instance}",
    description="1 for the state that the instance is in: ready, draining or drained.",
    roles=ENGINES,
    attributes=(names.STATE,),
)

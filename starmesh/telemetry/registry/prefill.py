"""What prefill instances alone show: prompts, and what they leave to be pulled."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import WAITS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = (Role.PREFILL,)

PREFILL_DURATION = Metric(
    name="starmesh.prefill.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a sequence to its next token; error.type is why it failed, or was cancelled.",
    roles=_ROLES,
    attributes=(names.ERROR_TYPE,),
    buckets=WAITS_S,
)
PREFILL_WAIT = Metric(
    name="starmesh.prefill.wait",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="How long a sequence waited for its first step.",
    roles=_ROLES,
    buckets=WAITS_S,
)
PREFILL_TOKENS = Metric(
    name="starmesh.prefill.tokens",
    kind=Kind.COUNTER,
    unit="{token}",
    description="Tokens of prompts, by whether they were computed or found in the prefix cache.",
    roles=_ROLES,
    attributes=(names.CACHED,),
)
KV_LEASES = Metric(
    name="starmesh.kv.leases",
    kind=Kind.GAUGE,
    unit="{lease}",
    description="Sequences whose blocks wait to be pulled by a decode instance.",
    roles=_ROLES,
)

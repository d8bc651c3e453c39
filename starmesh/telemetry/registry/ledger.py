"""What every service shows: how its ledger answers."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import CALLS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = tuple(Role)

LEDGER_DURATION = Metric(
    name="starmesh.ledger.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Duration of an operation on the ledger, failed ones included.",
    roles=_ROLES,
    attributes=(names.LEDGER_OPERATION,),
    buckets=CALLS_S,
)
LEDGER_ERRORS = Metric(
    name="starmesh.ledger.errors",
    kind=Kind.COUNTER,
    unit="{error}",
    description="Operations on the ledger that failed, by the kind of error; a refusal is none.",
    roles=_ROLES,
    attributes=(names.LEDGER_OPERATION, names.ERROR_TYPE),
)

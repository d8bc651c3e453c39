"""Every metric of every service, once: name, kind, unit, description, attributes, who shows it.

Owns data. Instruments are made from the rows (``starmesh.telemetry.instruments``) by the services, each in its own
``metrics`` module; docs/metrics.md, the Grafana dashboards and the checks of the alert rules read the same rows. Names
follow OpenTelemetry's GenAI conventions where they exist (``gen_ai.*``); the rest is ``starmesh.*``.
"""

from __future__ import annotations

from types import ModuleType

from starmesh.telemetry.registry import decode, instance, ledger, predictor, prefill, rescheduler, router, tls
from starmesh.telemetry.registry.metric import Metric


def _rows(module: ModuleType) -> tuple[Metric, ...]:
    return tuple(row for row in vars(module).values() if isinstance(row, Metric))


METRICS: tuple[Metric, ...] = tuple(
    row for module in (router, instance, prefill, decode, predictor, rescheduler, ledger, tls) for row in _rows(module)
)
"""All rows, in the order in which the docs show them."""

"""How the ledger answers, of any service. Hears of operations as ``RedisLedger.on_operation``."""

from __future__ import annotations

from opentelemetry.metrics import Meter

from starmesh.telemetry import instruments, names
from starmesh.telemetry.registry import ledger


class LedgerMetrics:
    """Called after each operation, on the event loop."""

    def __init__(self, meter: Meter) -> None:
        self._duration = instruments.histogram(meter, ledger.LEDGER_DURATION)
        self._errors = instruments.counter(meter, ledger.LEDGER_ERRORS)

    def __call__(self, operation: str, duration_s: float, error: Exception | None) -> None:
        attributes = {names.LEDGER_OPERATION: operation}
        self._duration.record(duration_s, attributes)
        if error is not None:
            self._errors.add(1, attributes | {names.ERROR_TYPE: type(error).__name__})

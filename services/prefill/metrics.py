"""What a prefill instance measures beside its load and steps: prompts, and the blocks that wait to be pulled."""

from __future__ import annotations

from collections.abc import Callable

from starmesh.telemetry import instruments, names
from starmesh.telemetry.metrics import Metrics
from starmesh.telemetry.registry import prefill


class PrefillMetrics:
    """All methods are for the event loop. ``leases`` is asked from any thread: how many are out, None before any can
    be."""

    def __init__(self, metrics: Metrics, leases: Callable[[], int | None]) -> None:
        meter = metrics.meter
        self._duration = instruments.histogram(meter, prefill.PREFILL_DURATION)
        self._wait = instruments.histogram(meter, prefill.PREFILL_WAIT)
        self._tokens = instruments.counter(meter, prefill.PREFILL_TOKENS)

        def read_leases() -> list[tuple[float, instruments.Attributes]]:
            out = leases()
            return [] if out is None else [(out, {})]

        instruments.gauge(meter, prefill.KV_LEASES, read_leases)

    def prefilled(self, duration_s: float, *, wait_s: float, tokens: int, cached_tokens: int) -> None:
        """A sequence of ``tokens`` tokens has its next one, ``wait_s`` of the time without a step."""
        self._duration.record(duration_s)
        self._wait.record(wait_s)
        self._tokens.add(tokens - cached_tokens, {names.CACHED: False})
        self._tokens.add(cached_tokens, {names.CACHED: True})

    def failed(self, duration_s: float, error: BaseException) -> None:
        """A sequence was refused, given up or cancelled."""
        self._duration.record(duration_s, {names.ERROR_TYPE: type(error).__name__})

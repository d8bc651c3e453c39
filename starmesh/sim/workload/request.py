"""A request as the simulator sees it, and what a workload is described by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """Arrives at ``arrives_s``. ``output_tokens`` is what it will generate, which only its engine and an oracle know;
    ``max_output_tokens`` is the limit that everyone knows."""

    request_id: str
    arrives_s: float
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """``requests`` requests; ``arrivals`` is "poisson", "gamma" (with ``variation``, the coefficient of variation of
    the gaps) or "trace"; ``rate`` is their mean number per second (a trace is sped up or slowed down to it; None
    replays it as it is). ``lengths`` names a length model: "reasoning", "chat", or "trace". ``trace_path`` names the
    file for either."""

    requests: int
    rate: float | None = None
    arrivals: str = "poisson"
    variation: float = 1.0
    lengths: str = "reasoning"
    trace_path: str | None = None

"""A request as the simulator sees it, and what a workload is described by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from starmesh.lengths import LENGTH_MODELS

TRACE: Final = "trace"
"""Arrivals or lengths that are read from ``WorkloadConfig.trace_path``."""

ARRIVALS: Final = ("poisson", "gamma", TRACE)

MOST_TOKENS: Final = 10_000_000
"""Longer prompts, outputs and limits are mistakes: far beyond any model's context, and their sums stay small."""


class WorkloadError(ValueError):
    """A workload that cannot be, or a trace file that cannot be read; the message says what to do."""


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
    replays it as it is).

    ``lengths`` names a length model of ``LENGTH_MODELS``, or "trace". Output lengths are multiplied by
    ``output_scale`` and then cut at ``max_output_tokens``, the limit that each request has unless its trace gives one;
    prompts are cut at ``max_prompt_tokens``. A mix made for 32,768 output tokens keeps its shape below another cap when
    both are scaled alike.

    ``trace_path`` names the file for either; its format is told from its first line, or named by ``trace_format``. A
    file with fewer requests ends the workload there.

    Raises WorkloadError for values that cannot be.
    """

    requests: int
    rate: float | None = None
    arrivals: str = "poisson"
    variation: float = 1.0
    lengths: str = "reasoning"
    output_scale: float = 1.0
    max_output_tokens: int = 32_768
    max_prompt_tokens: int = 98_304
    trace_path: str | None = None
    trace_format: str | None = None

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise WorkloadError(f"a workload has at least one request, not {self.requests}")
        if self.arrivals not in ARRIVALS:
            raise WorkloadError(f"arrivals are {', '.join(ARRIVALS)}, not {self.arrivals!r}")
        if self.lengths not in (*LENGTH_MODELS, TRACE):
            raise WorkloadError(f"length models are {', '.join(LENGTH_MODELS)} and {TRACE}, not {self.lengths!r}")
        if self.rate is None and self.arrivals != TRACE:
            raise WorkloadError(f"{self.arrivals} arrivals need a rate, in requests per second")
        for name in ("rate", "variation", "output_scale"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise WorkloadError(f"{name} is a number above 0, not {value}")
        for name in ("max_output_tokens", "max_prompt_tokens"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise WorkloadError(f"{name} is 1 to {MOST_TOKENS}, not {getattr(self, name)}")
        if self.trace_path is None and TRACE in (self.arrivals, self.lengths):
            raise WorkloadError("arrivals or lengths from a trace need its file: set trace_path")

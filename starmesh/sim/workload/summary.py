"""What a workload is like, for reports: quantiles of its lengths, and how unevenly it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starmesh.sim.workload.draw import draw_requests
from starmesh.sim.workload.output_cap import output_cap
from starmesh.sim.workload.request import WorkloadConfig, WorkloadError

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Tokens: the mean, the quantiles at ``LEVELS``, and the longest."""

    mean: float
    quantiles: tuple[float, ...]
    longest: int

    def __str__(self) -> str:
        levels = " / ".join(f"p{level * 100:g}" for level in LEVELS)
        values = " / ".join(f"{value:,.0f}" for value in self.quantiles)
        return f"mean {self.mean:,.0f}, {levels} {values}, longest {self.longest:,}"


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """Of the first ``requests`` requests: ``rate`` per second (0 when all arrive at once), ``variation`` of the gaps,
    and the part that is ``cut`` at its limit. Of all: ``output_cap``, which the errors of simulated predictors are
    relative to."""

    requests: int
    rate: float
    variation: float
    prompts: LengthSummary
    outputs: LengthSummary
    cut: float
    output_cap: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, {self.rate:.3g}/s (variation {self.variation:.2f}); prompts: {self.prompts}; "
            f"outputs: {self.outputs}, {self.cut:.1%} at their limit; "
            f"predictors reckon with outputs of up to {self.output_cap:,} tokens"
        )


def describe(config: WorkloadConfig, *, seed: int, most_requests: int = 20_000) -> WorkloadSummary:
    """Draws up to ``most_requests`` of them and counts. Raises WorkloadError, also for a trace without requests."""
    drawn = list(itertools.islice(draw_requests(config, seed=seed), most_requests))
    if not drawn:
        raise WorkloadError(f"{config.trace_path} holds no request that generated anything")
    gaps = np.diff([request.arrives_s for request in drawn])
    mean_gap_s = float(gaps.mean()) if len(gaps) else 0.0
    return WorkloadSummary(
        requests=len(drawn),
        rate=1.0 / mean_gap_s if mean_gap_s else 0.0,
        variation=float(gaps.std()) / mean_gap_s if mean_gap_s else 0.0,
        prompts=_lengths([request.prompt_tokens for request in drawn]),
        outputs=_lengths([request.output_tokens for request in drawn]),
        cut=sum(request.output_tokens == request.max_output_tokens for request in drawn) / len(drawn),
        output_cap=output_cap(config),
    )


def _lengths(tokens: Sequence[int]) -> LengthSummary:
    return LengthSummary(float(np.mean(tokens)), tuple(map(float, np.quantile(tokens, LEVELS))), max(tokens))

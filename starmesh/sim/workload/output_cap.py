"""How long a workload's outputs get: what a predictor that learned from such outputs has seen.

Owns the number that the errors of simulated predictors are relative to. The limit itself is often far beyond it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

from starmesh.lengths import LENGTH_MODELS
from starmesh.sim.workload.draw import draw_requests
from starmesh.sim.workload.request import WorkloadConfig

REACHED: Final = 0.999
"""The part of a trace's outputs that are no longer: a few much longer than all others set no scale."""


def output_cap(config: WorkloadConfig) -> int:
    """Output tokens: where the length model ends, or the 99.9 % quantile of the trace's requests that are used; in
    either case scaled as the outputs are, and the limit if that is less.

    A trace is read once for it, in memory that grows with the limit and not with the file. Raises WorkloadError for a
    trace that cannot be read.
    """
    model = LENGTH_MODELS.get(config.lengths)
    if model is not None:
        return max(1, min(config.max_output_tokens, round(model.cap_tokens * config.output_scale)))
    # When they arrive changes no length, and finding out may take a second look at the file.
    lengths_alone = dataclasses.replace(config, arrivals="poisson", rate=1.0)
    counts = Counter(request.output_tokens for request in draw_requests(lengths_alone, seed=0))
    beyond = counts.total() * (1 - REACHED)
    for tokens in sorted(counts, reverse=True):
        beyond -= counts[tokens]
        if beyond < 0:
            return tokens
    return config.max_output_tokens  # nobody generates anything

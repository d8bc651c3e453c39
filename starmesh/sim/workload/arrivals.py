"""When requests come, open loop: nobody waits for an answer before the next one asks.

Owns the drawn arrival processes. Both are drawn for a rate of one per second and then sped up, so that a request keeps
its place among the others whatever the rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from starmesh.sim.workload.request import WorkloadConfig
from starmesh.sim.workload.streams import stream

CHUNK: Final = 1024
"""How many are drawn at once. Another number draws the same."""


def draw_arrivals(config: WorkloadConfig, *, seed: int) -> Iterator[float]:
    """Seconds since the run began, without end, for ``config.arrivals`` "poisson" or "gamma".

    Gamma gaps of shape 1 / variation^2 have that coefficient of variation: 1 is Poisson, above it comes in bursts.
    """
    assert config.rate is not None  # WorkloadConfig demands it of both
    shape = 1.0 if config.arrivals == "poisson" else 1.0 / config.variation**2
    draw = stream(seed, f"{config.arrivals} arrivals")
    reached = 0.0
    while True:
        gaps = draw.standard_gamma(shape, CHUNK) / shape
        gaps[0] += reached
        times = np.add.accumulate(gaps)
        reached = float(times[-1])
        yield from (times / config.rate).tolist()

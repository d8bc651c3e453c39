"""One simulation from beginning to end.

Owns when it ends and what is told on the way. The cluster is ``cluster``'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starmesh.sim.cluster import Cluster
from starmesh.sim.config import SimulationConfig
from starmesh.sim.events import EventLoop
from starmesh.sim.measurements import Measurements
from starmesh.sim.predictors import make_predictor
from starmesh.sim.result import SimulationResult
from starmesh.sim.workload import SimulatedRequest, draw_requests, output_cap

PROGRESS_EVERY_EVENTS = 2048

SAMPLE_S = 1.0
"""How often the instances' loads are looked at for the series over time."""


class Stuck(RuntimeError):
    """Requests are left but nothing will happen any more: a bug."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. ``ended_requests`` of ``requests`` are over."""

    now_s: float
    ended_requests: int
    requests: int


def run_simulation(
    config: SimulationConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    measurements: Measurements | None = None,
    prepare: Callable[[Cluster], None] | None = None,
) -> SimulationResult:
    """Run ``config`` until its last request is over. The same config gives the same result, but for ``wall_s``.
    ``measurements`` is for those who want to hear of more than the result holds, and ``prepare`` changes the cluster in
    ways that no config asks for, before anything happens.

    Raises ProfileError, or another ValueError, for a config that cannot be, and Stuck.
    """
    started_s = time.perf_counter()
    loop = EventLoop()
    measurements = measurements or Measurements(config)
    predictor = make_predictor(config.strategy.predictor, seed=config.seed, cap_tokens=output_cap(config.workload))
    cluster = Cluster(loop, config, predictor, measurements)
    if prepare is not None:
        prepare(cluster)
    arrivals = _Arrivals(loop, cluster, draw_requests(config.workload, seed=config.seed))
    sampler = _Sampler(loop, cluster, measurements)
    events = 0
    while not cluster.over:
        if not loop.turn():
            raise Stuck(f"{len(cluster.router.flights)} requests are left at {loop.now_s:.1f} s")
        events += 1
        cluster.over = arrivals.over and not cluster.router.flights
        if progress is not None and events % PROGRESS_EVERY_EVENTS == 0:
            progress(Progress(loop.now_s, arrivals.arrived - len(cluster.router.flights), config.workload.requests))
    ended_at_s = loop.now_s
    # What is under way between instances still comes to its end: nothing may be left behind.
    sampler.stop()
    while loop.turn():
        pass
    cluster.check_at_rest()
    return measurements.result(ended_at_s=ended_at_s, wall_s=time.perf_counter() - started_s)


class _Arrivals:
    """Lets requests arrive, each asked for when the one before it has come."""

    def __init__(self, loop: EventLoop, cluster: Cluster, requests: Iterator[SimulatedRequest]) -> None:
        self.arrived = 0
        self.over = False
        self._loop = loop
        self._cluster = cluster
        self._requests = requests
        self._expect()

    def _expect(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.over = True
        else:
            self._loop.at(max(request.arrives_s, self._loop.now_s), lambda: self._arrive(request))

    def _arrive(self, request: SimulatedRequest) -> None:
        number = self.arrived
        self.arrived += 1
        self._expect()
        self._cluster.arrive(number, request)


class _Sampler:
    """Looks at the decode instances' loads."""

    def __init__(self, loop: EventLoop, cluster: Cluster, measurements: Measurements) -> None:
        self._loop = loop
        self._cluster = cluster
        self._measurements = measurements
        self._next = loop.after(SAMPLE_S, self._sample)

    def stop(self) -> None:
        """No more looks."""
        self._next.cancel()

    def _sample(self) -> None:
        self._measurements.sample(self._loop.now_s, self._cluster.views.loads())
        self._next = self._loop.after(self._measurements.sample_interval_s, self._sample)

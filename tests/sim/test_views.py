"""How old what the router knows is, and that it counts each of its requests once."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.sim.cluster import Cluster
from starmesh.sim.config import Strategy
from starmesh.sim.events import EventLoop
from starmesh.sim.measurements import Measurements
from starmesh.sim.run import run_simulation
from starmesh.types import ClusterView, Role
from tests.sim.runs import config_of

pytestmark = pytest.mark.fast

DECODES = (Role.DECODE,)


def free_blocks(view: ClusterView) -> int:
    (instance,) = view.instances
    assert instance.load is not None
    return instance.load.free_blocks


def test_the_router_goes_by_its_last_look_and_the_ledger_by_the_last_report() -> None:
    loop = EventLoop()
    config = config_of(decode_instances=1)
    cluster = Cluster(loop, config, None, Measurements(config))
    found: dict[float, tuple[int, int]] = {}

    def look() -> None:
        views = cluster.views
        found[round(loop.now_s, 3)] = (free_blocks(views.of(DECODES)), free_blocks(views.routed(DECODES)))

    loop.at(0.21, lambda: cluster.instances["decode-0"].call(lambda core: core.reserve("a", 1, 160)))
    loop.at(0.24, look)
    loop.at(0.30, lambda: cluster.views.report("decode-0"))
    loop.at(0.35, look)
    loop.at(0.41, look)
    while 0.41 not in found:
        assert loop.turn()
    assert found == {0.24: (1000, 1000), 0.35: (990, 1000), 0.41: (990, 990)}


@pytest.mark.parametrize("rescheduling", ["none", "current_load"])
def test_each_request_counts_once_where_it_was_placed(rescheduling: str) -> None:
    strategy = Strategy(name="tested", rescheduling=rescheduling)
    config = config_of(rate=20.0, decode_instances=3, round_interval_s=0.3)
    workload = dataclasses.replace(config.workload, output_scale=0.02, max_output_tokens=600)
    looks = 0

    def prepare(cluster: Cluster) -> None:
        def look() -> None:
            nonlocal looks
            looks += 1
            counted: dict[str, list[str]] = {}
            for instance in cluster.views.routed(DECODES).instances:
                assert instance.load is not None
                names = [each.request_id for each in instance.load.sequences]
                for name in (*names, *(each.request_id for each in instance.reservations)):
                    counted.setdefault(name, []).append(instance.info.instance_id)
            for request_id, flight in cluster.router.flights.items():
                if flight.decode_id is not None and not flight.outcome.migrations:
                    # Where it moves to it may be seen before it is told of.
                    assert counted[request_id].count(flight.decode_id) == 1, request_id
            if not cluster.over:
                cluster.loop.after(0.037, look)

        cluster.loop.at(0.01, look)

    run_simulation(dataclasses.replace(config, strategy=strategy, workload=workload), prepare=prepare)
    assert looks > 100

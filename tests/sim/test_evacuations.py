"""Instances that relieve themselves and instances that drain, in whole simulations without rounds."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.sim.config import Fault, FaultKind, SimulationConfig
from starmesh.sim.measurements import Measurements
from starmesh.sim.run import run_simulation
from starmesh.sim.strategies import STRATEGIES
from starmesh.types import Migration, MigrationReason
from tests.sim.test_run import SMALL, small

pytestmark = pytest.mark.fast

NO_ROUNDS_S = 1e9


class Order(Measurements):
    """Notes in which order sequences move and lose their blocks."""

    def __init__(self, config: SimulationConfig) -> None:
        super().__init__(config)
        self.events: list[str] = []

    def migration_ended(self, migration: Migration, **rest: object) -> None:
        self.events.append(migration.reason.value)
        super().migration_ended(migration, **rest)  # type: ignore[arg-type]

    def preempted(self, count: int) -> None:
        self.events.append("preempted")
        super().preempted(count)


def order_of(config: SimulationConfig) -> list[str]:
    order = Order(config)
    run_simulation(config, measurements=order)
    return order.events


def test_an_instance_makes_room_before_it_would_preempt() -> None:
    # Memory for nearly all that come, but not evenly: whoever has the long ones runs short while others have room.
    static_config = small(
        "round_robin", seed=3, round_interval_s=NO_ROUNDS_S, profile=dataclasses.replace(SMALL, total_blocks=520)
    )
    relieving = dataclasses.replace(STRATEGIES["star_plus_oracle"], dispatch="round_robin")
    config = dataclasses.replace(static_config, strategy=relieving)
    events = order_of(config)
    assert events[0] == MigrationReason.MEMORY.value
    static = order_of(static_config)
    assert set(static) == {"preempted"}
    assert events.count("preempted") < static.count("preempted")


@pytest.mark.parametrize("at_s", [0.0, 0.5, 2.0, 4.0])
def test_whatever_comes_to_a_draining_instance_leaves_it_again(at_s: float) -> None:
    faults = (Fault(at_s, FaultKind.DRAIN, "decode-0"),)
    config = small("least_tokens", profile=dataclasses.replace(SMALL, total_blocks=4000), faults=faults)
    still = run_simulation(dataclasses.replace(config, faults=()))
    drained = run_simulation(config)
    assert drained.finished == still.finished == config.workload.requests
    assert all(count.reason is MigrationReason.DRAIN for count in drained.migrations.counts)
    # Two of three instances have the whole load from then on: the first is empty soon, and long before the end.
    assert drained.tpot.mean > still.tpot.mean

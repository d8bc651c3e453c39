"""Results made by hand: what tests of measurements, reports and sweeps read without a simulation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.sim.config import SimulationConfig, Strategy
from starmesh.sim.measurements import Measurements
from starmesh.sim.outcome import RequestOutcome
from starmesh.sim.result import SimulationResult
from starmesh.sim.workload import WorkloadConfig
from starmesh.types import InstanceLoad, KvLayout, Migration, MigrationReason

PROFILE = Profile(
    name="tiny",
    cost=CostModel(0.01, 1e-4, 1e-7, 0.001, 1e9, 1e-5, 1e-10),
    layout=KvLayout("tiny", "bfloat16", layers=2, kv_heads=1, head_dim=64, block_tokens=16),
    total_blocks=1000,
    link=Link(1e9, 1e-4),
    max_sequences=16,
    max_step_tokens=256,
    max_sequence_tokens=4096,
    provenance={"profile": "made up for tests"},
)


def config_of(strategy: str = "round_robin", *, rate: float | None = 1.0, **changes: Any) -> SimulationConfig:
    """A small configuration; without a rate, of a trace as it is."""
    arrivals = "trace" if rate is None else "poisson"
    trace_path = "trace.csv" if rate is None else None
    workload = WorkloadConfig(requests=40, rate=rate, arrivals=arrivals, trace_path=trace_path)
    return SimulationConfig(profile=PROFILE, strategy=Strategy(name=strategy), workload=workload, **changes)


def outcome(request_id: str, *, arrived_s: float, **changes: Any) -> RequestOutcome:
    """A request of 11 tokens that got the first after 0.5 s and the others 0.1 s apart."""
    record = RequestOutcome(
        request_id=request_id,
        arrived_s=arrived_s,
        prompt_tokens=5,
        output_tokens=11,
        placed_s=arrived_s,
        first_token_s=arrived_s + 0.5,
        finished_s=arrived_s + 1.5,
        longest_gap_s=0.1,
    )
    return dataclasses.replace(record, **changes)


def result_of(config: SimulationConfig, *, slowness: float = 1.0) -> SimulationResult:
    """What a run of ``config`` could have found: outputs ``slowness`` times as slow as usual, drawn by its seed."""
    draw, chance = np.random.default_rng(config.seed), np.random.default_rng(config.seed)
    measurements = Measurements(config)
    uneven = slowness - 1.0
    for number in range(config.workload.requests):
        arrived_s = number / (config.workload.rate or 1.0)
        first_token_s = arrived_s + float(draw.lognormal(-1.0, 0.4)) * slowness
        output_tokens = int(draw.integers(2, 2000))
        tpot_s = float(draw.lognormal(-3.5, 0.3)) * slowness
        record = outcome(
            f"request-{number}",
            arrived_s=arrived_s,
            first_token_s=first_token_s,
            finished_s=first_token_s + tpot_s * (output_tokens - 1),
            output_tokens=output_tokens,
            preemptions=int(chance.poisson(uneven)),
        )
        measurements.finished(record)
        measurements.gaps(np.full(output_tokens - 1, tpot_s), 1)
        measurements.preempted(record.preemptions)
    for second in range(100):
        loads = {}
        for instance in range(config.decode_instances):
            tokens = int(8000 * (1 + uneven * np.sin(second / 40 + 2 * instance)) * min(1.0, second / 60))
            loads[f"decode-{instance}"] = InstanceLoad(1000, 1000 - tokens // 16, 5, 0, max(0, tokens))
        measurements.sample(float(second), loads)
    if config.strategy.rescheduling != "none":
        for _ in range(10):
            measurements.migration_ended(
                Migration("request-1", "decode-0", "decode-1", 1, MigrationReason.LOAD),
                moved=True,
                cause=None,
                duration_s=0.3,
                size_bytes=10**6,
                stood_still_s=0.02,
            )
    return measurements.result(ended_at_s=300.0, wall_s=0.5)

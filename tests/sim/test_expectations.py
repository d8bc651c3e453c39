"""What simulated engines expect: what the predictor says as of now, and less preempted for it."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.profiles import load_profile
from starmesh.sim.config import SimulationConfig
from starmesh.sim.run import run_simulation
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import WorkloadConfig

SCARCE = SimulationConfig(
    profile=load_profile("h100-7b").with_memory(8_000),
    strategy=dataclasses.replace(STRATEGIES["least_tokens"], name="oracle", predictor="oracle"),
    workload=WorkloadConfig(requests=80, rate=12.0, output_scale=1 / 16, max_output_tokens=2048),
    prefill_instances=1,
    decode_instances=2,
    seed=100,
)


@pytest.mark.fast
def test_engines_that_know_ends_preempt_less_and_everything_ends() -> None:
    found = run_simulation(SCARCE)
    blind = run_simulation(dataclasses.replace(SCARCE, strategy=STRATEGIES["least_tokens"]))
    assert found.finished == blind.finished == 80
    assert 0 < found.preemptions < 0.7 * blind.preemptions


def test_leaps_preempt_as_single_steps_do() -> None:
    # Who is held back is asked again when a sequence leaves, not with each step.
    assert run_simulation(SCARCE).digest == run_simulation(dataclasses.replace(SCARCE, every_step=True)).digest

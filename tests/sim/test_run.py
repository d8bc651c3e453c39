"""Whole simulations: the same seed gives the same run, nothing is lost or left behind, and policies do what they are
for."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.sim.config import Fault, FaultKind, SimulationConfig
from starmesh.sim.result import SimulationResult
from starmesh.sim.run import run_simulation
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import WorkloadConfig
from starmesh.types import KvLayout

SMALL = Profile(
    name="small",
    cost=CostModel(
        step_base_s=0.005,
        step_sequence_s=0.0001,
        step_token_s=2e-7,
        transfer_setup_s=0.002,
        transfer_bytes_per_s=1e9,
        prefill_token_s=2e-5,
        prefill_pair_s=1e-9,
    ),
    layout=KvLayout("small", "bfloat16", layers=4, kv_heads=2, head_dim=64, block_tokens=16),
    total_blocks=400,
    link=Link(bytes_per_s=1e9, latency_s=1e-4),
    max_sequences=32,
    max_step_tokens=512,
    max_sequence_tokens=4096,
    step_noise=0.05,
)


def small(strategy: str, **changes: object) -> SimulationConfig:
    """Three decode instances whose memory is short."""
    workload = WorkloadConfig(requests=40, rate=10.0, max_output_tokens=1024)
    config = SimulationConfig(profile=SMALL, strategy=STRATEGIES[strategy], workload=workload, seed=1)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def run(config: SimulationConfig) -> SimulationResult:
    """Run it, and see that every request has come to an end."""
    result = run_simulation(config)
    assert result.finished + result.refused == config.workload.requests
    return result


@pytest.mark.parametrize("name", ["power_of_two", "llumnix", "star_plus", "perfect_balance"])
def test_leaps_and_single_steps_give_the_same_run(name: str) -> None:
    assert run(small(name, every_step=True)).digest == run(small(name)).digest


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    digest = run(small("star")).digest
    assert run(small("star")).digest == digest
    assert run(small("star", seed=2)).digest != digest


@pytest.mark.fast
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs(name: str) -> None:
    run(small(name, workload=WorkloadConfig(requests=12, rate=8.0, max_output_tokens=256, output_scale=1 / 128)))


@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    strategy=st.sampled_from(["vllm_round_robin", "least_tokens", "current_load", "star_plus_oracle"]),
    strikes=st.lists(
        st.tuples(
            st.floats(0.5, 12.0), st.sampled_from(FaultKind), st.sampled_from(["decode-0", "decode-1", "decode-9"])
        ),
        max_size=4,
    ),
)
def test_whoever_dies_joins_or_drains_every_request_ends(
    seed: int, strategy: str, strikes: list[tuple[float, FaultKind, str]]
) -> None:
    faults = tuple(Fault(at_s, kind, instance_id) for at_s, kind, instance_id in strikes)
    result = run(small(strategy, seed=seed, faults=faults))
    assert result.refused == 0


def test_short_memory_makes_static_placement_preempt_and_foresight_preempts_less() -> None:
    static, foreseeing = run(small("round_robin")), run(small("star_plus_oracle"))
    assert static.migrations_moved == 0
    assert 0 < foreseeing.preemptions < static.preemptions


def test_what_reschedules_moves() -> None:
    assert run(small("current_load")).migrations_moved > 0


@pytest.mark.fast
@pytest.mark.parametrize("every_step", [False, True])
def test_an_output_that_memory_ends_has_the_tokens_that_were_made(every_step: bool) -> None:
    workload = WorkloadConfig(requests=12, rate=0.5, max_output_tokens=8000)
    result = run(small("least_tokens", profile=SMALL.with_memory(1024), workload=workload, every_step=every_step))
    counts = result.requests
    assert 0 < counts.cut < counts.finished
    assert result.output_lengths.edges[-2] <= 1024
    assert counts.output_tokens == result.execution.simulated_tokens
    # A request's mean gap is no less than its least one, but for the rounding of the histograms.
    assert result.tpot.least >= result.itl.least * 0.99


@pytest.mark.fast
@pytest.mark.parametrize("every_step", [False, True])
def test_an_output_whose_last_token_dies_with_its_instance_is_at_its_end(every_step: bool) -> None:
    workload = WorkloadConfig(requests=1, rate=1.0, max_output_tokens=8000)
    config = small("least_tokens", profile=SMALL.with_memory(256), workload=workload, seed=3, every_step=every_step)
    whole = run(config)
    assert whole.requests.cut == 1
    # The request arrives when the measured time ends; the last step has begun 1 ms before its own end.
    last_step_s = whole.measured_s + whole.end_to_end.most - 0.001
    struck = run(dataclasses.replace(config, faults=(Fault(last_step_s, FaultKind.DIE, "decode-0"),)))
    assert (struck.requests.recoveries, struck.requests.cut) == (1, 1)
    assert struck.requests.output_tokens == whole.requests.output_tokens
    assert struck.duration_s < whole.duration_s, "nothing is left to compute again"


@pytest.mark.fast
def test_what_is_refused_generates_nothing() -> None:
    workload = WorkloadConfig(requests=6, rate=4.0, lengths="chat", max_prompt_tokens=5000)
    refused = run(small("least_tokens", profile=SMALL.with_memory(16), workload=workload))
    assert refused.refused == 6
    assert refused.execution.simulated_tokens == refused.requests.output_tokens == 0


def test_perfect_balance_is_faster_than_any_policy_where_memory_suffices() -> None:
    ample = dataclasses.replace(SMALL, total_blocks=4000)
    bound = run(small("perfect_balance", profile=ample))
    assert bound.preemptions == 0
    for name in ("round_robin", "least_tokens", "current_load", "star_plus_oracle"):
        result = run(small(name, profile=ample))
        assert result.preemptions == 0
        assert bound.tpot.mean <= result.tpot.mean

"""Timing steps, with an engine whose costs are known: the fit finds them."""

from __future__ import annotations

import pytest

from starmesh.clock import VirtualClock
from starmesh.engine.emulated import EmulatedExecutor, StepNoise
from starmesh.engine.engine import EngineConfig, EngineCore
from starmesh.instance.measuring import MeasuringFailed
from starmesh.instance.measuring.steps import MeasuredSteps, measure_steps
from starmesh.profiles import Profile, load_profile, profile_names
from starmesh.profiles.fit import fit_steps

QUICK = ("laptop-cpu", "h100-7b")
PROFILES = [pytest.param(name, marks=pytest.mark.fast if name in QUICK else ()) for name in profile_names()]
"""The fast lane measures two."""


def measure(profile: Profile, *, budget_s: float, noise: float = 0.0) -> tuple[MeasuredSteps, list[float]]:
    clock = VirtualClock()
    executor = EmulatedExecutor(
        layout=profile.layout,
        total_blocks=profile.total_blocks,
        cost=profile.cost,
        noise=StepNoise(noise, seed=1, stream=0),
        ends_at=lambda item: 1 << 62,
        wait=lambda seconds: clock.reach(clock.now_s() + seconds),
    )
    config = EngineConfig(
        eos_token_ids=frozenset(),
        max_sequence_tokens=profile.max_sequence_tokens,
        max_step_tokens=profile.max_step_tokens,
        max_sequences=profile.max_sequences,
    )
    core = EngineCore(executor, config, stop_checker=lambda spec: pytest.fail("no stop strings"), clock=clock)
    parts: list[float] = []
    steps = measure_steps(
        core,
        clock,
        max_sequences=profile.max_sequences,
        max_step_tokens=profile.max_step_tokens,
        vocabulary_tokens=1000,
        budget_s=budget_s,
        on_progress=parts.append,
    )
    core.check_integrity()
    assert core.idle
    return steps, parts


@pytest.mark.parametrize("name", PROFILES)
def test_the_costs_of_a_profile_are_found(name: str) -> None:
    profile = load_profile(name).with_memory(20_000)  # all of it would take long contexts, and long to test
    steps, parts = measure(profile, budget_s=0.1)
    cost = profile.cost
    assert fit_steps(steps.times).costs == pytest.approx(
        (cost.step_base_s, cost.step_sequence_s, cost.step_token_s, cost.prefill_token_s, cost.prefill_pair_s), rel=1e-6
    )
    assert steps.noise < 1e-3, "a step is longer than the one before by its new tokens only"
    assert parts == sorted(parts)


def test_noise_is_measured_and_averaged_out() -> None:
    profile = load_profile("laptop-cpu")
    steps, parts = measure(profile, budget_s=300.0, noise=0.1)
    assert steps.rounds > 3 and parts[-1] == pytest.approx(1.0, abs=0.3)
    assert steps.noise == pytest.approx(0.1, rel=0.5)
    fit = fit_steps(steps.times)
    assert fit.median_error < 0.05
    assert fit.step_token_s == pytest.approx(profile.cost.step_token_s, rel=0.1)


@pytest.mark.fast
def test_one_round_is_made_however_short_the_time() -> None:
    steps, parts = measure(load_profile("laptop-cpu"), budget_s=1e-3)
    assert steps.rounds == 1 and parts[-1] == 1.0


@pytest.mark.fast
@pytest.mark.parametrize("kv_tokens", [16, 64])
def test_a_pool_too_small_to_measure_is_refused(kv_tokens: int) -> None:
    with pytest.raises(MeasuringFailed, match="--kv-memory-mib"):
        measure(load_profile("laptop-cpu").with_memory(kv_tokens), budget_s=1.0)

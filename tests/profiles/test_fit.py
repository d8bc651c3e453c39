"""Fitting costs: what went in comes out, noise or not, and no cost is negative."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.cost import CostModel
from starmesh.profiles.fit import StepTime, fit_steps

pytestmark = pytest.mark.fast

costs = st.floats(1e-9, 1.0)


def times(cost: CostModel, *, noise: float = 0.0, seed: int = 0) -> list[StepTime]:
    draw = random.Random(seed)
    steps = []
    for sequences in (1, 4, 16, 64):
        for context in (32, 500, 2000):
            seconds = cost.step_s(sequences, sequences * context)
            steps.append(StepTime(seconds=seconds, sequences=sequences, resident_tokens=sequences * context))
    for chunk in (16, 64, 512):
        for start in (0, 1500):
            seconds = cost.step_s(0, 0) + cost.prefill_s(chunk, start)
            pairs = chunk * start + chunk * (chunk + 1) // 2
            steps.append(StepTime(seconds=seconds, prefill_tokens=chunk, prefill_pairs=pairs))
    return [
        StepTime(
            seconds=step.seconds * draw.lognormvariate(0, noise),
            sequences=step.sequences,
            resident_tokens=step.resident_tokens,
            prefill_tokens=step.prefill_tokens,
            prefill_pairs=step.prefill_pairs,
        )
        for step in steps
    ]


def of(base: float, sequence: float, token: float, prefill_token: float, prefill_pair: float) -> CostModel:
    return CostModel(base, sequence, token, 0.0, 1.0, prefill_token, prefill_pair)


@given(base=costs, sequence=costs, token=costs, prefill_token=costs, prefill_pair=costs)
def test_exact_times_give_the_exact_model(
    base: float, sequence: float, token: float, prefill_token: float, prefill_pair: float
) -> None:
    # A cost that makes up a millionth of every step is in no digit that counts: compare what the model says.
    measured = times(of(base, sequence, token, prefill_token, prefill_pair))
    fit = fit_steps(measured)
    assert min(fit.costs) >= 0
    for step, error in zip(measured, fit.errors, strict=True):
        assert np.dot(step.row, fit.costs) == pytest.approx(step.seconds, rel=1e-6)
        assert error == pytest.approx(0.0, abs=1e-6)


def test_the_laptops_model_comes_back() -> None:
    fit = fit_steps(times(of(0.079, 0.005, 9e-6, 0.0031, 2.4e-7)))
    assert fit.costs == pytest.approx((0.079, 0.005, 9e-6, 0.0031, 2.4e-7))
    assert fit.median_error < 1e-9


@given(seed=st.integers(0, 1 << 30))
def test_no_cost_is_negative_and_none_better_near_it(seed: int) -> None:
    # No cost of a sequence and hardly any of a token: noise would make plain least squares negative.
    measured = times(of(0.01, 0.0, 1e-9, 1e-5, 0.0), noise=0.2, seed=seed)
    fit = fit_steps(measured)
    assert min(fit.costs) >= 0
    rows = np.array([step.row for step in measured], dtype=float) / np.array([[step.seconds] for step in measured])
    errors = rows @ np.array(fit.costs) - 1
    # The optimum's own conditions: no slope where a cost is above 0, none downwards where it is 0.
    slopes = rows.T @ errors / np.linalg.norm(rows, axis=0)
    for cost, slope in zip(fit.costs, slopes, strict=True):
        assert slope == pytest.approx(0.0, abs=1e-6) if cost > 0 else slope >= -1e-6


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="4 different steps say too little"):
        fit_steps(times(of(1, 1, 1, 1, 1))[:4])

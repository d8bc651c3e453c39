"""Simulated predictors: what every one keeps to, and the errors that each is made to have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.sim.predictors import EVERY_TOKENS, PREDICTORS, SimulatedPredictor, make_predictor
from starmesh.sim.predictors.measured import measured_facts
from starmesh.sim.predictors.noise import Persistence, SlowNoise, correlation
from starmesh.sim.predictors.predictor import PIECE
from starmesh.sim.workload import SimulatedRequest, WorkloadConfig, WorkloadError, draw_requests

pytestmark = pytest.mark.fast

NAMES = [name for name in PREDICTORS if name != "none"]
Integers = npt.NDArray[np.int64]


def made(name: str, *, seed: int = 0, cap_tokens: int = 32_768) -> SimulatedPredictor:
    predictor = make_predictor(name, seed=seed, cap_tokens=cap_tokens)
    assert predictor is not None
    return predictor


REQUESTS = st.lists(
    st.tuples(st.integers(0, 10**9), st.integers(1, 60_000), st.floats(0, 1), st.integers(0, 5000)),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, seed=st.integers(0, 2**63), cap=st.integers(1, 100_000))
def test_estimates_are_bounded_and_belong_to_request_and_place(
    name: str, requests: list[tuple[int, int, float, int]], seed: int, cap: int
) -> None:
    keys, totals = (np.array([request[index] for request in requests]) for index in (0, 1))
    output = np.array([min(total - 1, int(total * part)) for _, total, part, _ in requests])
    limits = totals + np.array([request[3] for request in requests])
    predictor = made(name, seed=seed, cap_tokens=cap)
    median, upper, age = predictor.remaining(keys, output, totals, limits)
    assert median.dtype == upper.dtype == age.dtype == np.int64
    assert (age == output % EVERY_TOKENS).all()
    assert (median >= 0).all() and (upper >= median).all() and (upper <= limits - output).all()
    # At the sample itself there is a token to come, and what was said there is what ages.
    there = output - age
    first, first_upper, none = predictor.remaining(keys, there, totals, limits)
    assert (first >= 1).all() and not none.any()
    assert (median == np.maximum(first - age, 0)).all() and (upper == np.maximum(first_upper - age, 0)).all()
    # Alone, in another order or asked again by another predictor of that seed: the same.
    again = made(name, seed=seed, cap_tokens=cap).remaining(keys[::-1], output[::-1], totals[::-1], limits[::-1])
    assert (again[0][::-1] == median).all() and (again[1][::-1] == upper).all()
    request = SimulatedRequest("r", 0.0, 1, int(totals[0]), int(limits[0]))
    estimate = predictor.estimate(int(keys[0]), request, int(there[0]))
    assert estimate.output_tokens == there[0]
    assert (estimate.remaining_tokens, estimate.remaining_tokens_upper) == (first[0], first_upper[0])


@pytest.mark.parametrize("name", NAMES)
def test_many_are_predicted_like_few(name: str) -> None:
    draw = np.random.default_rng(0)
    count = 2 * PIECE + 17
    keys, totals = np.arange(count), draw.integers(1, 32_769, count)
    output, limits = draw.integers(0, totals), np.full(count, 32_768)
    predictor = made(name)
    whole = predictor.remaining(keys, output, totals, limits)
    some = slice(PIECE - 5, PIECE + 5)
    part = predictor.remaining(keys[some], output[some], totals[some], limits[some])
    for one, other in zip(whole, part, strict=True):
        assert (one[some] == other).all()
    nothing = np.zeros(0, dtype=np.int64)
    assert [len(column) for column in predictor.remaining(nothing, nothing, nothing, nothing)] == [0, 0, 0]


def test_the_oracle_is_exact() -> None:
    output, totals = np.array([0, 19, 20, 99]), np.array([100, 100, 100, 100])
    median, upper, _ = made("oracle").remaining(np.arange(4), output, totals, np.full(4, 5000))
    assert median.tolist() == upper.tolist() == (totals - output).tolist()


def test_none_is_none_and_others_are_unknown() -> None:
    assert make_predictor("none", seed=0, cap_tokens=1) is None
    with pytest.raises(WorkloadError, match="predictors are none, measured, paper, oracle, not 'guess'"):
        make_predictor("guess", seed=0, cap_tokens=1)


class Scored:
    """A predictor asked at every ``every_tokens`` of requests of these lengths."""

    def __init__(self, name: str, totals: Integers, *, cap_tokens: int, every_tokens: int, seed: int = 0) -> None:
        counts = -(-totals // every_tokens)
        self.request = np.repeat(np.arange(len(totals)), counts)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        self.output = (np.arange(len(self.request)) - firsts) * every_tokens
        self.total = totals[self.request]
        limits = np.full(len(self.request), cap_tokens)
        predictor = made(name, seed=seed, cap_tokens=cap_tokens)
        self.median, self.upper, _ = predictor.remaining(self.request, self.output, self.total, limits)
        self.truth = self.total - self.output
        self.errors = np.abs(self.median - self.truth)
        self.covered = self.truth <= self.upper

    def by_progress(self, values: npt.NDArray[np.generic]) -> list[float]:
        quarter = 4 * self.output // self.total
        return [float(values[quarter == index].mean()) for index in range(4)]


def test_the_measured_one_errs_as_was_measured() -> None:
    """On requests of the lengths that it was measured on, at their cap. What differs: quantiles of few samples at the
    ends, and correlations within a request that the noise has only in the mean."""
    measured = measured_facts()["measured"]
    cap = measured_facts()["provenance"]["cap_tokens"]
    totals = np.repeat(np.array(measured["lengths"]).astype(np.int64), 10)
    found = Scored("measured", totals, cap_tokens=cap, every_tokens=EVERY_TOKENS)
    assert found.errors.mean() == pytest.approx(measured["mae"], rel=0.08)
    assert found.by_progress(found.errors) == pytest.approx(measured["mae_by_progress"], rel=0.15)
    assert found.covered.mean() == pytest.approx(measured["coverage"], abs=0.03)
    assert found.by_progress(found.covered) == pytest.approx(measured["coverage_by_progress"], abs=0.06)


def test_the_measured_one_scales_with_the_cap() -> None:
    totals = np.repeat(np.arange(40, 1025, 41), 40)
    small = Scored("measured", totals, cap_tokens=1024, every_tokens=20)
    large = Scored("measured", 32 * totals, cap_tokens=32 * 1024, every_tokens=640)
    assert large.errors.mean() / 32 == pytest.approx(small.errors.mean(), rel=0.02)


def test_the_papers_one_errs_as_the_paper_says() -> None:
    mix = WorkloadConfig(requests=3000, rate=1.0, lengths="reasoning")
    totals = np.array([request.output_tokens for request in draw_requests(mix, seed=1)])
    every = Scored("paper", totals, cap_tokens=32_768, every_tokens=160, seed=1)
    assert every.errors.mean() == pytest.approx(3873, rel=0.1)
    assert every.covered.mean() == pytest.approx(0.9, abs=0.02)
    long = every.total >= 30_000
    assert every.errors[long & (every.output == 0)].mean() == pytest.approx(18_256, rel=0.1)
    assert every.errors[long & (every.output == 8000)].mean() == pytest.approx(2929, rel=0.1)


@pytest.mark.parametrize("name", ["measured", "paper"])
def test_errors_change_slowly_along_a_request_and_not_with_others(name: str) -> None:
    keys, cap = np.arange(3000), 32_768
    totals, limits = np.full(3000, 24_000), np.full(3000, cap)

    def ranks(output_tokens: int, seed: int = 0) -> Integers:
        predictor = made(name, seed=seed)
        return predictor.remaining(keys, np.full(3000, output_tokens), totals, limits)[0].argsort().argsort()

    def alike(one: Integers, other: Integers) -> float:
        return float(np.corrcoef(one, other)[0, 1])

    first = ranks(8000)
    assert alike(first, ranks(8020)) > 0.9
    assert 0.3 < alike(first, ranks(16_000)) < 0.7
    assert abs(alike(first, ranks(8000, seed=1))) < 0.08
    assert abs(alike(first[1:], first[:-1])) < 0.08


@pytest.mark.parametrize("lag", [0, 7, 20, 60, 100, 170, 300])
def test_the_noise_is_normal_and_as_persistent_as_asked(lag: int) -> None:
    parts = Persistence(request=0.3, slow=0.5, fast=0.2)
    noise = SlowNoise(seed=5, slow_tokens=100, fast_tokens=20, channels=(parts, Persistence(0.0, 0.0, 1.0)))
    keys = np.arange(40_000)
    places = keys % 977
    values, others = noise.draw(keys, places)
    assert values.mean() == pytest.approx(0, abs=0.03) and values.std() == pytest.approx(1, abs=0.03)
    assert (np.abs(values) < 1.2816).mean() == pytest.approx(0.8, abs=0.02)
    assert abs(np.corrcoef(values, others)[0, 1]) < 0.03
    wanted = 0.3 + 0.5 * float(correlation(lag / 100)) + 0.2 * float(correlation(lag / 20, held=True))
    assert (values * noise.draw(keys, places + lag)[0]).mean() == pytest.approx(wanted, abs=0.03)

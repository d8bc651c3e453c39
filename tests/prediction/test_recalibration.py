"""Recalibration on simulated, heavy-tailed requests: what is wrong becomes right, what is right stays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from starmesh.prediction.recalibration import BUCKET_EDGES, MIN_REQUESTS, Recalibration

_UNCUT = 1 << 40
_LEVELS = np.array([0.5, 0.9])
_SHAPE = 3.0


def true_quantiles(median: float, output_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of a log-logistic length, given that it exceeds what there is."""
    passed = (1.0 + (output_tokens / median) ** _SHAPE)[:, None]
    return median * (passed / (1.0 - _LEVELS) - 1.0) ** (1.0 / _SHAPE) - output_tokens[:, None]


def simulate(
    scale: tuple[float, float], *, requests: int, cap: int = _UNCUT, seed: int = 5
) -> tuple[Recalibration, npt.NDArray[np.float64]]:
    """Requests of log-logistic length whose scale is known to a predictor that is wrong by ``scale``. Returns what was
    learned, and the coverage of both corrected quantiles in each bucket over the last requests' samples."""
    generator = np.random.default_rng(seed)
    recalibration = Recalibration()
    inside: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(len(BUCKET_EDGES) + 1)]
    for number in range(requests):
        median = float(np.exp(generator.normal(5.0, 0.8)))
        part = generator.uniform()
        length = int(np.ceil(median * (part / (1.0 - part)) ** (1.0 / _SHAPE)))
        positions = np.arange(0, min(length, cap), 20)
        predicted = (true_quantiles(median, positions) * scale).astype(np.float32)
        corrected = recalibration.correct(positions, predicted)
        if number >= 400:
            covered = (length - positions)[:, None] <= corrected
            buckets = np.searchsorted(BUCKET_EDGES, positions, side="right")
            for bucket in np.unique(buckets):
                inside[bucket].append(covered[buckets == bucket])
        recalibration.observe(positions, predicted, total_output_tokens=min(length, cap), finished=length <= cap)
    return recalibration, np.array([np.concatenate(rows).mean(axis=0) for rows in inside if len(rows) >= 250])


@pytest.mark.parametrize(
    "scale", [(1.0, 1.0), (0.4, 0.3), (3.0, 2.0), pytest.param((0.5, 4.0), marks=pytest.mark.fast)], ids=str
)
def test_quantiles_hold_in_every_bucket(scale: tuple[float, float]) -> None:
    _, coverage = simulate(scale, requests=1200)
    assert len(coverage) == 4
    assert coverage[:, 0] == pytest.approx(0.5, abs=0.05)
    assert coverage[:, 1] == pytest.approx(0.9, abs=0.035)


def test_quantiles_hold_where_requests_are_cut() -> None:
    """Every sixth is cut. Counting those as ended would lower the 0.9 quantile."""
    _, coverage = simulate((0.5, 0.4), requests=1200, cap=400)
    assert coverage[:3, 0] == pytest.approx(0.5, abs=0.05)
    assert coverage[:3, 1] == pytest.approx(0.9, abs=0.04)


@pytest.mark.fast
def test_nothing_changes_before_enough_requests_have_ended() -> None:
    recalibration, _ = simulate((0.1, 0.1), requests=MIN_REQUESTS - 1)
    predicted = np.array([[5.0, 9.0], [0.0, 0.0]], dtype=np.float32)
    assert recalibration.correct(np.array([0, 100]), predicted).tolist() == predicted.tolist()
    recalibration.observe(np.array([0]), predicted[:1], total_output_tokens=100, finished=True)
    assert recalibration.correct(np.array([0, 100]), predicted)[0, 0] > 5.0


@pytest.mark.fast
def test_each_sample_weighs_the_same() -> None:
    """Two thirds of the requests have a sample that needs a factor of 10; the other third ``many`` that need 2."""
    for many, factors in ((1, [10.0, 10.0]), (3, [2.0, 10.0]), (30, [2.0, 2.0])):
        recalibration = Recalibration(min_requests=30)
        for number in range(90):
            positions = 64 + 2 * np.arange(many) if number % 3 == 0 else np.array([64])
            factor = 2 if number % 3 == 0 else 10
            predicted = np.tile((401.0 - positions[:, None]) / factor - 1.0, (1, 2)).astype(np.float32)
            recalibration.observe(positions, predicted, total_output_tokens=400, finished=True)
        corrected = recalibration.correct(np.array([100]), np.array([[9.0, 9.0]], dtype=np.float32))
        assert corrected[0].tolist() == pytest.approx([10 * factor - 1 for factor in factors], abs=1e-3)


@pytest.mark.fast
def test_quantiles_that_are_right_stay() -> None:
    """Of the requests that come to a bucket those that end soon must not outweigh those that stay."""
    recalibration, _ = simulate((1.0, 1.0), requests=600)
    predicted = np.full((3, 2), 99.0, dtype=np.float32)
    assert recalibration.correct(np.array([0, 40, 100]), predicted) == pytest.approx(predicted, rel=0.15)


@pytest.mark.fast
def test_requests_that_are_mostly_cut_lower_nothing() -> None:
    """One in fifty ends, as early as the others are cut: how long those would have become nobody knows."""
    recalibration = Recalibration()
    positions = np.array([0, 20, 40, 60])
    predicted = np.stack([200.0 - positions, 800.0 - positions], axis=1).astype(np.float32)
    for number in range(300):
        recalibration.observe(positions, predicted, total_output_tokens=64, finished=number % 50 == 0)
    assert recalibration.correct(positions, predicted).tolist() == predicted.tolist()


@pytest.mark.fast
def test_requests_that_were_all_cut_tell_nothing() -> None:
    recalibration = Recalibration(min_requests=5)
    for _ in range(20):
        recalibration.observe(
            np.array([0]), np.array([[1.0, 2.0]], dtype=np.float32), total_output_tokens=500, finished=False
        )
    predicted = np.array([[7.0, 8.0]], dtype=np.float32)
    assert recalibration.correct(np.array([0]), predicted).tolist() == predicted.tolist()


@pytest.mark.fast
def test_it_follows_the_traffic() -> None:
    recalibration = Recalibration(window=100, min_requests=50)
    predicted = np.array([[9.0, 9.0]], dtype=np.float32)
    for total in [99] * 100 + [4] * 100:
        recalibration.observe(np.array([0]), predicted, total_output_tokens=total, finished=True)
        recalibration.correct(np.array([0]), predicted)
    recalibration.observe(np.array([0]), predicted, total_output_tokens=4, finished=True)
    assert recalibration.correct(np.array([0]), predicted)[0].tolist() == pytest.approx([4.0, 4.0])


QUANTILES = hypothesis_numpy.arrays(np.float32, (3, 2), elements=st.floats(0, 1e6, width=32))


@pytest.mark.fast
@given(QUANTILES, QUANTILES, st.integers(0, 3000), st.booleans())
def test_quantiles_stay_in_order(
    observed: npt.NDArray[np.float32], predicted: npt.NDArray[np.float32], total: int, finished: bool
) -> None:
    recalibration = Recalibration(window=10, min_requests=1)
    positions = np.array([0, 100, 2000])
    recalibration.observe(positions, observed, total_output_tokens=total, finished=finished)
    corrected = recalibration.correct(positions, predicted)
    assert corrected.shape == (3, 2) and np.isfinite(corrected).all()
    assert (corrected[:, 0] >= 0).all() and (corrected[:, 1] >= corrected[:, 0]).all()


@pytest.mark.fast
def test_a_window_that_never_holds_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="never holds"):
        Recalibration(window=10, min_requests=11)

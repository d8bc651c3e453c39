"""Scores are what they are by hand, and intervals hold what they promise."""

from pathlib import Path

import numpy as np
import pytest

from starmesh.prediction.dataset import load_dataset
from starmesh.prediction.evaluation import HeldOut
from tests.prediction.samples import CAP, write_samples

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    dataset = load_dataset(write_samples(tmp_path_factory.mktemp("samples"), 200), ())
    return HeldOut(dataset, np.arange(len(dataset)), limit_tokens=CAP)


def pair(median: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return np.stack([median, upper], axis=1).astype(np.float32)


def test_the_truth_has_no_error(held_out: HeldOut) -> None:
    scores = held_out.scores(pair(held_out.truth, held_out.truth))
    assert (scores.mae.value, scores.coverage.value, scores.below_median.value) == (0, 1, 1)
    assert all(part.value == 0 for part in (*scores.by_progress, *scores.by_remaining) if not np.isnan(part.value))


def test_a_prediction_counts_within_what_may_be_generated(held_out: HeldOut) -> None:
    # Of a request that was cut, whoever says "very long" is right: it went on to the cap.
    very_long = pair(np.full(len(held_out.truth), 1e6), np.full(len(held_out.truth), 1e6))
    errors = held_out.errors(very_long)
    assert np.all(errors[~held_out.finished] == 0) and errors[held_out.finished].mean() > 50
    assert held_out.scores(very_long).coverage.value == 1


def test_the_mean_error_is_over_samples(held_out: HeldOut) -> None:
    off = held_out.truth + np.where(np.arange(len(held_out.truth)) % 2, 3, -3)
    inside = held_out.bounded(pair(off, off))[:, 0]
    scores = held_out.scores(pair(off, off))
    assert scores.mae.value == pytest.approx(np.abs(inside - held_out.truth).mean())
    assert scores.mae.low <= scores.mae.value <= scores.mae.high
    finished = np.abs(inside - held_out.truth)[held_out.finished]
    assert scores.mae_finished.value == pytest.approx(finished.mean())


def test_ratios_compare_on_the_same_requests(held_out: HeldOut) -> None:
    noise = np.random.default_rng(0).normal(size=len(held_out.truth)) * 20
    ours, theirs = (pair(held_out.truth + part * noise, held_out.truth + noise) for part in (0.5, 1.0))
    ratio = held_out.ratio(ours, theirs)
    assert ratio.value == pytest.approx(0.5, abs=0.05) and ratio.high - ratio.low < 0.1
    assert held_out.ratio(theirs, theirs).low == held_out.ratio(theirs, theirs).high == 1


def test_an_interval_widens_with_fewer_requests(tmp_path: Path) -> None:
    widths = []
    for number, requests in enumerate((40, 640)):
        dataset = load_dataset(write_samples(tmp_path / str(number), requests), ())
        scored = HeldOut(dataset, np.arange(len(dataset)), limit_tokens=CAP)
        zero = np.zeros((len(dataset), 2), dtype=np.float32)
        found = scored.scores(zero).mae
        widths.append(found.high - found.low)
    assert widths[0] > 2 * widths[1]

"""Bins cover every length, and quantiles of a distribution over them are where they must be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.prediction.lengths import bin_edges, bin_of, quantiles

pytestmark = pytest.mark.fast


@given(st.integers(1, 50_000), st.integers(0, 60_000))
def test_every_length_has_one_bin(longest: int, length: int) -> None:
    edges = bin_edges(longest)
    assert np.all(np.diff(edges) >= 1) and edges[0] == 0 and edges[-1] > longest
    place = int(bin_of(np.array([length]), edges)[0])
    assert edges[place] <= length and (length < edges[place + 1] or place == len(edges) - 2)


@given(st.lists(st.floats(0, 1), min_size=44, max_size=44).filter(lambda p: sum(p) > 1e-3))
def test_quantiles_do_not_cross_and_lie_in_their_bin(weights: list[float]) -> None:
    edges = bin_edges(1023)
    probabilities = np.array([weights[: len(edges) - 1]]) + 1e-9
    median, upper = quantiles(probabilities, edges, (0.5, 0.9))[0]
    assert 0 <= median <= upper <= edges[-1]
    cumulative = np.cumsum(probabilities[0]) / probabilities.sum()
    place = int(np.argmax(cumulative >= 0.5))
    assert max(0, edges[place] - 0.5) - 1e-3 <= median <= edges[place + 1] - 0.5 + 1e-3


def test_a_certain_length_is_its_own_median() -> None:
    edges = bin_edges(100)
    certain = np.zeros((1, len(edges) - 1))
    certain[0, bin_of(np.array([7]), edges)] = 1.0
    assert quantiles(certain, edges, (0.5, 0.9))[0].tolist() == pytest.approx([7.0, 7.4])


def test_drawn_lengths_get_their_quantiles_back() -> None:
    edges = bin_edges(4000)
    drawn = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64).clip(0, 4000)
    probabilities = np.bincount(bin_of(drawn, edges), minlength=len(edges) - 1)[None].astype(float)
    found = quantiles(probabilities, edges, (0.5, 0.9))[0]
    np.testing.assert_allclose(found, np.quantile(drawn, (0.5, 0.9)), rtol=0.03)

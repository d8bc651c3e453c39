"""Load over the coming steps, against the definition counted step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.forecast import bin_edges, peak_tokens, sample_steps, sum_at, token_steps, tokens_at
from starmesh.sequence_loads import UNKNOWN

pytestmark = pytest.mark.fast

sequences = st.lists(st.tuples(st.integers(1, 400), st.integers(-1, 90)), min_size=1, max_size=6)
horizons = st.integers(0, 70)


def held(tokens: int, remaining: int, step: int) -> int:
    """n(t) by its definition."""
    if remaining == UNKNOWN:
        return tokens
    return tokens + step if step <= remaining else 0


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def test_closed_form_by_hand() -> None:
    # 10 tokens, 2 remaining: 10 + 11 + 12, then nothing. Horizon 1 sees 10 + 11. Without a prediction it stays.
    assert token_steps(np.array([10]), np.array([2]), 4).tolist() == [33]
    assert token_steps(np.array([10]), np.array([2]), 1).tolist() == [21]
    assert token_steps(np.array([10]), np.array([UNKNOWN]), 4).tolist() == [50]


@given(sequences, horizons)
def test_closed_form_is_the_sum_over_steps(rows: list[tuple[int, int]], horizon: int) -> None:
    counted = [sum(held(tokens, remaining, t) for t in range(horizon + 1)) for tokens, remaining in rows]
    assert token_steps(*columns(rows), horizon).tolist() == counted


@given(sequences, horizons, st.integers(1, 9))
def test_samples_are_the_definition_and_span_the_horizon(rows: list[tuple[int, int]], horizon: int, count: int) -> None:
    steps = sample_steps(horizon, count)
    assert len(steps) <= count
    assert steps[0] == 0 and (steps[-1] == horizon or count == 1)
    assert tokens_at(*columns(rows), steps).tolist() == [[held(*row, t) for t in steps.tolist()] for row in rows]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400), st.integers(-1, 90)), max_size=9), horizons)
def test_sums_are_those_of_the_owners(rows: list[tuple[int, int, int]], horizon: int) -> None:
    steps = sample_steps(horizon, 8)
    owner, tokens, remaining = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    summed = [
        [sum(held(row[1], row[2], step) for row in rows if row[0] == one) for step in steps.tolist()]
        for one in range(4)
    ]
    assert sum_at(tokens, remaining, steps, owner, 4).tolist() == summed


@given(horizons, st.integers(1, 9))
def test_bins_are_the_horizon(horizon: int, count: int) -> None:
    first, last = bin_edges(horizon, count)
    spanned = [t for start, end in zip(first.tolist(), last.tolist(), strict=True) for t in range(start, end + 1)]
    assert spanned == list(range(horizon + 1))


@given(sequences, horizons, st.integers(1, 9), st.sampled_from([1, 4, 16]))
def test_peaks_bound_every_step(rows: list[tuple[int, int]], horizon: int, bins: int, block_tokens: int) -> None:
    rows = [(tokens, max(remaining, 0)) for tokens, remaining in rows]
    first, last = bin_edges(horizon, bins)
    peaks = peak_tokens(*columns(rows), (first, last), block_tokens).sum(axis=0)
    for peak, start, end in zip(peaks.tolist(), first.tolist(), last.tolist(), strict=True):
        true = (sum(-(-held(*row, t) // block_tokens) * block_tokens for row in rows) for t in range(start, end + 1))
        assert peak >= max(true)

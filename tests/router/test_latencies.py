"""Quantiles over the last minutes, against exact ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.latencies import LEAST_S, MAX_ERROR, MOST_S, SLICES, RecentLatencies

pytestmark = pytest.mark.fast

TIMES = st.lists(st.floats(LEAST_S, MOST_S), min_size=1, max_size=60)


def exact(times: list[float], part: float) -> float:
    """By nearest rank."""
    return sorted(times)[math.ceil(part * len(times)) - 1]


@given(TIMES)
def test_quantiles_are_as_near_as_a_bin_is_wide(times: list[float]) -> None:
    recent = RecentLatencies()
    for seconds in times:
        recent.add(seconds, now_s=5.0)
    found = recent.summary(now_s=5.0)
    assert found.count == len(times)
    for part, quantile in ((0.5, found.p50_s), (0.9, found.p90_s), (0.99, found.p99_s)):
        assert quantile == pytest.approx(exact(times, part), rel=MAX_ERROR + 1e-9)
    assert found.p99_history_s[-1] == found.p99_s


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0.001, 100)), max_size=40), st.floats(0, 20))
def test_only_the_window_counts(arrivals: list[tuple[float, float]], later_s: float) -> None:
    recent = RecentLatencies(slice_s=2.0, slices=5)
    arrivals.sort()
    for at_s, seconds in arrivals:
        recent.add(seconds, now_s=at_s)
    now_s = max([at_s for at_s, _ in arrivals], default=0.0) + later_s
    last = math.floor(now_s / 2.0)
    by_slice = [[s for at_s, s in arrivals if math.floor(at_s / 2.0) == last - 4 + place] for place in range(5)]
    found = recent.summary(now_s=now_s)
    assert found.count == sum(map(len, by_slice))
    assert len(found.p99_history_s) == 5
    for times, quantile in zip(by_slice, found.p99_history_s, strict=True):
        assert quantile == pytest.approx(exact(times, 0.99) if times else 0.0, rel=MAX_ERROR + 1e-9)
    assert len(recent._bins) <= 5


@given(st.lists(st.floats(allow_nan=False), max_size=20))
def test_memory_is_bounded_whatever_comes(times: list[float]) -> None:
    recent = RecentLatencies()
    for seconds in times:
        recent.add(seconds, now_s=1.0)
    found = recent.summary(now_s=1.0)
    assert found.count == len(times)
    assert all(0 <= quantile <= MOST_S * (1 + MAX_ERROR) for quantile in (found.p50_s, found.p90_s, found.p99_s))


def test_nothing_counted_is_nothing() -> None:
    found = RecentLatencies().summary(now_s=3.0)
    assert (found.count, found.p50_s, found.p99_s) == (0, 0.0, 0.0)
    assert found.p99_history_s == (0.0,) * SLICES

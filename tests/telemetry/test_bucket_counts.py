"""Histograms that their owners count: each value in the bucket that Prometheus would put it in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.telemetry.bucket_counts import BucketCounts

pytestmark = pytest.mark.fast

BOUNDS = (0.001, 0.01, 0.1)


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 1))))
def test_each_value_is_at_most_its_buckets_bound(values: list[float]) -> None:
    counts = BucketCounts(BOUNDS)
    for value in values:
        counts.add(value)
    in_buckets, total = counts.read()
    for place, bound in enumerate((*BOUNDS, math.inf)):
        assert sum(in_buckets[: place + 1]) == sum(value <= bound for value in values)
    assert total == pytest.approx(sum(values))


def test_what_was_read_stays_as_it_was() -> None:
    counts = BucketCounts(BOUNDS)
    before, _ = counts.read()
    counts.add(0.05)
    assert before == (0, 0, 0, 0)
    assert counts.read() == ((0, 0, 1, 0), 0.05)

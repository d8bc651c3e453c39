"""What is measured of a run, and that it comes back from its file as it was."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.migration.terms import Cause
from starmesh.sim.config import Slo
from starmesh.sim.histogram import QUANTILES, LogHistogram
from starmesh.sim.measurements import Measurements
from starmesh.sim.report import METRICS
from starmesh.sim.series import SeriesRecorder
from starmesh.types import InstanceLoad, Migration, MigrationReason
from tests.sim.runs import config_of, outcome

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@pytest.mark.fast
@settings(max_examples=40)
@given(values=VALUES, each=st.integers(1, 3), split=st.integers(0, 60))
def test_a_histogram_says_the_same_however_its_values_come(values: list[float], each: int, split: int) -> None:
    one_by_one, in_arrays = LogHistogram(), LogHistogram()
    for value in values:
        for _ in range(each):
            one_by_one.add(value)
    in_arrays.add_all(np.array(values[split:]), each)
    in_arrays.add_all(np.array(values[:split]), each)
    assert in_arrays.distribution() == one_by_one.distribution()
    assert np.array_equal(in_arrays.counts, one_by_one.counts)


@pytest.mark.fast
@settings(max_examples=40)
@given(values=st.lists(st.floats(2e-5, 9e4), min_size=1, max_size=80), quantile=st.sampled_from(QUANTILES))
def test_its_quantiles_are_as_near_as_a_bin_is_wide(values: list[float], quantile: float) -> None:
    histogram = LogHistogram()
    histogram.add_all(np.array(values))
    found = histogram.distribution()
    assert found.quantile(quantile) == pytest.approx(float(np.quantile(values, quantile)), rel=0.00201)
    assert (found.least, found.most, found.count) == (min(values), max(values), len(values))
    assert found.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert list(found.quantiles) == sorted(found.quantiles)


@pytest.mark.fast
def test_a_histogram_of_many_values_and_of_none() -> None:
    histogram = LogHistogram()
    assert math.isnan(histogram.distribution().p99) and math.isnan(histogram.distribution().mean)
    values = np.random.default_rng(0).lognormal(-3.5, 0.6, 100_000)
    histogram.add_all(values, 1000)
    assert histogram.count == 100_000_000
    assert histogram.quantile(0.99) == pytest.approx(float(np.quantile(values, 0.99)), rel=1e-3)
    assert histogram.total == pytest.approx(1000 * math.fsum(values), rel=1e-9)
    far = LogHistogram()
    far.add_all(np.array([1e6, 2e6]), 10**6)
    assert far.total == 3e12
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="no finite value"):
            far.add(wrong)
    far.add_all(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="no finite value"):
        _ = far.counts


@pytest.mark.fast
def test_only_requests_that_arrive_in_the_measured_time_are_measured() -> None:
    measurements = Measurements(config_of(warm_up_s=10.0, measure_until_s=30.0, slos=(Slo(1.0, 0.1), Slo(9.0, 9.0))))
    measurements.finished(outcome("early", arrived_s=9.0))
    measurements.finished(outcome("good", arrived_s=10.0))
    measurements.finished(
        outcome("slow", arrived_s=20.0, first_token_s=22.0, finished_s=24.0, migrations=3, preemptions=1)
    )
    measurements.finished(
        outcome("away", arrived_s=25.0, output_tokens=0, refused=True, first_token_s=None, finished_s=None)
    )
    measurements.finished(outcome("cut", arrived_s=26.0, finished_s=None))
    measurements.finished(outcome("late", arrived_s=50.0))
    result = measurements.result(ended_at_s=60.0, wall_s=1.0, recomputed_tokens=7)
    counts = result.requests
    assert (counts.arrived, counts.measured, counts.finished, counts.refused, counts.unfinished) == (6, 4, 2, 1, 1)
    assert (counts.output_tokens, result.execution.simulated_tokens) == (22, 55)
    assert METRICS["output_tokens_per_s"].value(result) == 1.1
    assert (counts.migrations, counts.preemptions, counts.migrations_per_request) == (3, 1, 0.75)
    assert result.measured_s == 20.0
    assert [(found.good, found.share, found.per_s) for found in result.goodput] == [(1, 0.25, 0.05), (2, 0.5, 0.1)]
    assert result.ttft.count == result.tpot.count == sum(result.output_lengths.counts) == 2
    assert (result.ttft.least, result.ttft.most) == (0.5, 2.0)
    assert (result.recomputed_tokens, result.duration_s) == (7, 60.0)


@pytest.mark.fast
def test_an_slo_is_met_to_the_last_moment_and_a_single_token_has_no_tpot_to_miss() -> None:
    measurements = Measurements(config_of(slos=(Slo(0.5, 0.1),)))
    measurements.finished(outcome("edge", arrived_s=0.0, first_token_s=0.5, finished_s=1.5, output_tokens=11))
    measurements.finished(outcome("one", arrived_s=8.0, first_token_s=8.5, finished_s=8.5, output_tokens=1))
    assert measurements.result(ended_at_s=9.0, wall_s=0.1).goodput[0].good == 2


@pytest.mark.fast
def test_migrations_count_by_reason_and_outcome() -> None:
    measurements = Measurements(config_of())
    load, memory = (Migration("r", "a", "b", 1, reason) for reason in (MigrationReason.LOAD, MigrationReason.MEMORY))
    for migration, cause in ((load, None), (load, None), (load, Cause.REFUSED), (memory, None)):
        measurements.migration_ended(
            migration, moved=cause is None, cause=cause, duration_s=0.2, size_bytes=100, stood_still_s=0.01
        )
    found = measurements.result(ended_at_s=1.0, wall_s=0.1).migrations
    assert [(count.reason, count.outcome, count.count) for count in found.counts] == [
        (MigrationReason.LOAD, "moved", 2),
        (MigrationReason.LOAD, "refused", 1),
        (MigrationReason.MEMORY, "moved", 1),
    ]
    assert (found.moved, found.failed, found.size_bytes, found.wasted_bytes) == (3, 1, 300, 100)
    assert found.stood_still.most == 0.01


@pytest.mark.fast
def test_the_digest_tells_runs_apart_and_no_more() -> None:
    def digests(*, gap_s: float = 0.1, wall_s: float = 1.0, every_step: bool = False) -> tuple[str, str]:
        measurements = Measurements(config_of(every_step=every_step))
        measurements.finished(outcome("r", arrived_s=0.0, longest_gap_s=gap_s))
        result = measurements.result(ended_at_s=1.0, wall_s=wall_s)
        return result.trace_digest, result.digest

    assert digests() == digests(wall_s=2.0, every_step=True)
    trace, whole = digests(gap_s=math.nextafter(0.1, 1.0))
    assert trace != digests()[0] and whole != digests()[1]


def load_of(resident_tokens: int, *, free_blocks: int = 60, running: int = 3) -> InstanceLoad:
    return InstanceLoad(100, free_blocks, running, waiting_sequences=1, resident_tokens=resident_tokens)


@pytest.mark.fast
def test_the_series_says_how_unevenly_tokens_lie() -> None:
    series = SeriesRecorder(instances=2)
    series.sample(0.1, {"a": load_of(300), "b": load_of(100, free_blocks=10)}, preemptions=0, migrations=0)
    series.sample(0.9, {"a": load_of(100), "b": load_of(100)}, preemptions=2, migrations=1)
    series.sample(2.5, {"b": load_of(7), "c": load_of(7)}, preemptions=2, migrations=4)
    found = series.series()
    assert found.instance_ids == ("a", "b", "c")
    assert found.resident_tokens == ((200.0, None, None), (100.0, None, 7.0), (None, None, 7.0))
    assert found.kv_use == ((0.4, None, None), (0.9, None, 0.4), (None, None, 0.4))
    assert (found.variation, found.max_over_mean) == ((0.25, None, 0.0), (1.25, None, 1.0))
    assert (found.preemptions, found.migrations) == ((2.0, None, 2.0), (1.0, None, 4.0))
    assert found.waiting_sequences == (2.0, None, 2.0)
    spread = series.spread(since_s=0.0, until_s=0.9)
    assert (spread.variation, spread.max_over_mean, spread.kv_use_most) == (0.25, 1.25, 0.9)
    assert series.spread(since_s=0.0, until_s=9.0).variation == pytest.approx(0.5 / 3)


def test_a_long_run_takes_no_more_points_and_loses_nothing() -> None:
    series = SeriesRecorder(instances=64)
    names = [f"decode-{number}" for number in range(64)]
    for second in range(1500):
        loads = {name: load_of(second, free_blocks=100 - second % 97) for name in names}
        series.sample(float(second), loads, preemptions=second, migrations=0)
        names = names[:63] if second == 1200 else names
    found = series.series()
    assert 200 <= found.points <= 512 and found.points * found.resolution_s >= 1500
    assert series.resolution_s == found.resolution_s
    assert found.resident_tokens[0][0] == round((found.resolution_s - 1) / 2)
    assert max(use for use in found.kv_use[0] if use is not None) == 0.96
    assert found.kv_use[63][-1] is None and found.preemptions[-1] == 1499


@pytest.mark.fast
def test_samples_become_rarer_but_leave_no_point_out() -> None:
    measurements = Measurements(config_of())
    now_s = intervals = 0.0
    while now_s < 4000:
        measurements.sample(now_s, {"a": load_of(5)})
        now_s += measurements.sample_interval_s
        intervals = max(intervals, measurements.sample_interval_s)
    series = measurements.result(ended_at_s=now_s, wall_s=1.0).series
    assert intervals == 4.0 and series.resolution_s == 16.0
    assert None not in series.variation


@pytest.mark.fast
def test_a_run_of_nothing_has_a_result() -> None:
    result = Measurements(config_of(warm_up_s=5.0)).result(ended_at_s=0.0, wall_s=0.0)
    assert result.goodput[0].per_s == result.goodput[0].share == result.execution.simulated_tokens_per_s == 0.0
    assert type(result).from_json(result.to_json()) == result
    assert dataclasses.is_dataclass(result) and result.series.points == 0

"""The arithmetic of load tests."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from starmesh.cli.bench import poisson_arrivals
from starmesh.cli.bench_report import Outcome, Report, percentile, report_table

pytestmark = pytest.mark.fast

TIMES = st.floats(0, 1e6)


@given(st.lists(TIMES, min_size=1), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], quantile: float) -> None:
    assert percentile(values, quantile) == pytest.approx(float(np.quantile(values, quantile)))


def test_latencies_of_a_request() -> None:
    outcome = Outcome(arrival_s=10.0, end_s=13.5, token_times_s=(11.0, 11.5, 12.5, 12.5, 13.5))
    assert outcome.ttft_s == 1.0
    assert outcome.tpot_s == 2.5 / 4
    assert outcome.itl_s == [0.5, 1.0, 0.0, 1.0]


@given(st.lists(TIMES, min_size=2).map(sorted))
def test_the_gaps_add_up_to_the_time_between_first_and_last_token(times: list[float]) -> None:
    outcome = Outcome(arrival_s=0.0, end_s=times[-1], token_times_s=tuple(times))
    assert sum(outcome.itl_s) == pytest.approx(times[-1] - times[0])
    assert outcome.tpot_s is not None
    assert outcome.tpot_s * (len(times) - 1) == pytest.approx(times[-1] - times[0])


@pytest.mark.parametrize(
    ("outcome", "good"),
    [
        (Outcome(arrival_s=0, end_s=3, token_times_s=(1.0, 2.0, 3.0)), True),
        (Outcome(arrival_s=0, end_s=3.2, token_times_s=(1.2, 2.2, 3.2)), False),  # TTFT
        (Outcome(arrival_s=0, end_s=4, token_times_s=(1.0, 2.0, 4.0)), False),  # TPOT
        (Outcome(arrival_s=0, end_s=1, token_times_s=(1.0,)), True),  # no TPOT to miss
        (Outcome(arrival_s=0, end_s=1), False),  # no token at all
        (Outcome(arrival_s=0, end_s=3, token_times_s=(1.0, 2.0, 3.0), error="UNAVAILABLE"), False),
    ],
)
def test_a_good_request_meets_all_its_slos(outcome: Outcome, good: bool) -> None:
    assert outcome.meets(slo_ttft_s=1.1, slo_tpot_s=1.0) is good


def test_the_report_counts_failures_and_rates_by_the_whole_test() -> None:
    report = Report(
        (
            Outcome(arrival_s=0.0, end_s=2.0, token_times_s=(1.0, 2.0), prompt_tokens=7, recoveries=1),
            Outcome(arrival_s=1.0, end_s=4.0, token_times_s=(2.0,), error="UNAVAILABLE"),
            Outcome(arrival_s=1.0, end_s=1.5, error="RESOURCE_EXHAUSTED"),
        ),
        slo_ttft_s=1.0,
        slo_tpot_s=1.0,
    )
    content = report.to_json()
    assert content["failures"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert content["duration_s"] == 4.0
    assert content["output_tokens_per_s"] == 0.75
    assert content["requests_per_s"] == 0.25
    assert content["goodput_requests_per_s"] == 0.25
    assert content["recoveries"] == 1
    assert content["ttft_s"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0, "mean": 1.0}
    assert len(content["by_request"]) == 3


def test_a_test_where_all_fails_is_still_a_report() -> None:
    report = Report((Outcome(arrival_s=0.0, end_s=0.0, error="UNAVAILABLE"),), slo_ttft_s=1.0, slo_tpot_s=1.0)
    assert "NaN" not in json.dumps(report.to_json())
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report_table(report))
    assert "UNAVAILABLE: 1" in capture.get()


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    first = list(itertools.islice(poisson_arrivals(4.0, seed=1), 2000))
    assert first == list(itertools.islice(poisson_arrivals(4.0, seed=1), 2000))
    assert first != list(itertools.islice(poisson_arrivals(4.0, seed=2), 2000))
    assert first[0] == 0.0
    gaps = np.diff(first)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)  # exponential: mean and deviation are equal

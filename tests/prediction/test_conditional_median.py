"""The reference predictor: its formula word by word, empirical quantiles, censored requests, and what it forgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.prediction.batch import SampleBatch
from starmesh.prediction.conditional_median import PRIOR_MEDIAN_TOKENS, PRIOR_SHAPE, ConditionalMedian
from starmesh.prediction.survival import quantile, survival

pytestmark = pytest.mark.fast

LITTLE = 1e-7
REQUESTS = st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=12)
LEVELS = (0.5, 0.9)


def exceeding(tokens: float, requests: list[tuple[int, bool]], prior: float) -> float:
    """S(t) by the formula of the module's text."""

    def prior_survival(at: float) -> float:
        return float(1.0 / (1.0 + (at / PRIOR_MEDIAN_TOKENS) ** PRIOR_SHAPE))

    def beyond(at: float) -> int:
        return sum(length > at for length, _ in requests)

    found = (prior * prior_survival(tokens) + beyond(tokens)) / (prior + len(requests))
    for cut in {length for length, finished in requests if not finished and length <= tokens}:
        count = sum(length == cut and not finished for length, finished in requests)
        found *= 1.0 + count / (prior * prior_survival(cut) + beyond(cut))
    return found


def learned(requests: list[tuple[int, bool]], **arguments: float) -> ConditionalMedian:
    predictor = ConditionalMedian(**arguments)  # type: ignore[arg-type]
    predictor.fit([length for length, _ in requests], [finished for _, finished in requests])
    return predictor


def remaining(predictor: ConditionalMedian, tokens: int) -> tuple[int, int]:
    median, upper = predictor.remaining(np.array([float(tokens)]))[0].tolist()
    assert median == int(median) and upper == int(upper)
    return int(median), int(upper)


@given(REQUESTS, st.integers(0, 80), st.sampled_from([0.5, 8.0, 40.0]))
def test_it_is_the_smallest_count_that_few_enough_exceed(
    requests: list[tuple[int, bool]], tokens: int, prior: float
) -> None:
    found = remaining(learned(requests, prior_requests=prior), tokens)
    left = exceeding(tokens, requests, prior)
    for count, level in zip(found, LEVELS, strict=True):
        target = left * (1.0 - level)
        assert count >= 1
        assert exceeding(tokens + count, requests, prior) <= target * (1.0 + LITTLE)
        assert count == 1 or exceeding(tokens + count - 1, requests, prior) >= target * (1.0 - LITTLE)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(0, 59))
def test_with_hardly_a_prior_it_is_the_quantile_of_those_that_got_further(lengths: list[int], tokens: int) -> None:
    further = sorted(length - tokens for length in lengths if length > tokens)
    if not further:
        return
    found = remaining(learned([(length, True) for length in lengths], prior_requests=1e-9), tokens)
    for count, level in zip(found, LEVELS, strict=True):
        assert count == further[int(np.ceil(len(further) * level - LITTLE)) - 1]


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=30))
def test_with_hardly_a_prior_it_is_the_product_limit_estimate(requests: list[tuple[int, bool]]) -> None:
    points, expected = survival(
        np.array([length for length, _ in requests], dtype=np.float64),
        np.array([finished for _, finished in requests]),
        np.ones(len(requests)),
    )
    found = [exceeding(point, requests, 1e-9) for point in points]
    # Beyond the last length the product-limit estimate knows nothing; there the prior, however light, decides.
    assert found[:-1] == pytest.approx(expected[:-1].tolist(), abs=1e-6)


def test_before_the_first_request_it_is_the_prior() -> None:
    assert remaining(ConditionalMedian(), 0) == (200, 790)
    assert remaining(ConditionalMedian(), 10_000)[0] > 1000


def test_a_request_that_outgrew_all_others_is_predicted() -> None:
    median, upper = remaining(learned([(50, True)] * 500), 4000)
    assert 500 < median < upper < 40_000


def test_cut_requests_are_no_lengths() -> None:
    generator = np.random.default_rng(3)
    lengths = np.ceil(np.exp(generator.normal(5.0, 1.0, 4000))).astype(int)
    cap = 300
    capped = [(min(length, cap), bool(length <= cap)) for length in lengths]
    true_median = float(np.median(lengths))
    assert sum(not finished for _, finished in capped) > 800
    assert remaining(learned(capped), 0)[0] == pytest.approx(true_median, rel=0.05)
    # A sequence near the cap still has as much to come as the prior says, and not the few tokens to the cap.
    assert remaining(learned(capped), 290)[0] > 100
    whole = [(length, True) for length, finished in capped if finished]
    assert remaining(learned(whole), 0)[0] < 0.85 * true_median


def test_it_follows_the_traffic() -> None:
    predictor = learned([(30, True)] * 50, window=20)
    for _ in range(20):
        predictor.observe(900, finished=True)
    assert predictor.parameters == 20
    assert remaining(predictor, 0)[0] > 500


def test_it_takes_samples_of_any_model() -> None:
    predictor = learned([(100, True)] * 100)
    assert predictor.layout is None and predictor.kind == "conditional_median"
    counts = np.array([0, 50, 99], dtype=np.int64)
    states = np.zeros((3, 0, 0), dtype=np.float16)
    batch = SampleBatch(hidden_states=states, prompt_tokens=np.ones(3, dtype=np.int64), output_tokens=counts)
    assert predictor.predict(batch).tolist() == [[100, 100], [50, 50], [1, 1]]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 tokens"):
        ConditionalMedian().observe(-1, finished=True)
    with pytest.raises(ValueError, match="window"):
        ConditionalMedian(window=0)
    with pytest.raises(ValueError, match="prior"):
        ConditionalMedian(prior_requests=0.0)


VALUES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=20)


@given(VALUES, st.floats(0.05, 0.95))
def test_of_observed_values_it_is_the_weighted_quantile(values: list[tuple[int, int]], level: float) -> None:
    repeated = sorted(value for value, weight in values for _ in range(weight))
    found = quantile(
        np.array([value for value, _ in values], dtype=np.float64),
        np.ones(len(values), dtype=np.bool_),
        np.array([weight for _, weight in values], dtype=np.float64),
        level,
    )
    assert found == repeated[int(np.ceil(len(repeated) * level - LITTLE)) - 1]


def test_where_too_many_are_cut_the_quantile_is_not_known() -> None:
    observed = np.array([True, False, False])
    assert quantile(np.array([1.0, 5.0, 9.0]), observed, np.ones(3), 0.3) == 1.0
    assert quantile(np.array([1.0, 5.0, 9.0]), observed, np.ones(3), 0.9) == np.inf
    with pytest.raises(ValueError, match="nothing"):
        quantile(np.array([]), np.array([], dtype=np.bool_), np.array([]), 0.5)

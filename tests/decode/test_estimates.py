"""What an estimate says as tokens come: less and less, never below 0; and what is believed of peers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.decode.estimates import aged, is_sound, newer, to_limit
from starmesh.types import RemainingEstimate, SequenceLoad

pytestmark = pytest.mark.fast

counts = st.integers(0, 2**31 - 1)


def load(output_tokens: int, *, limit: int = 2**31 - 1) -> SequenceLoad:
    return SequenceLoad("a", 1, 10, output_tokens, 10 + output_tokens, limit)


@given(counts, counts, counts, st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=6))
def test_an_estimate_ages_by_a_token_for_each(at: int, median: int, more: int, positions: list[int]) -> None:
    estimate = RemainingEstimate(at, median, median + more)
    seen = [aged(load(position), estimate) for position in sorted(positions)]
    for one in seen:
        assert one.remaining_tokens is not None and one.remaining_tokens_upper is not None
        assert one.prediction_age_tokens == max(0, one.output_tokens - at)
        assert 0 <= one.remaining_tokens <= one.remaining_tokens_upper <= median + more
        assert one.remaining_tokens == max(0, median - one.prediction_age_tokens)
    for earlier, later in itertools.pairwise(seen):
        assert earlier.remaining_tokens is not None and later.remaining_tokens is not None
        assert later.remaining_tokens <= earlier.remaining_tokens
        assert (later.prediction_age_tokens or 0) >= (earlier.prediction_age_tokens or 0)


def test_what_only_a_limit_ends_is_known() -> None:
    known = to_limit(load(30, limit=100), max_sequence_tokens=1000)
    assert (known.remaining_tokens, known.remaining_tokens_upper, known.prediction_age_tokens) == (70, 70, 0)
    assert to_limit(load(30, limit=100), max_sequence_tokens=60).remaining_tokens == 20
    assert to_limit(load(30, limit=30), max_sequence_tokens=20).remaining_tokens == 0


@pytest.mark.parametrize(
    ("estimate", "sound"),
    [
        (RemainingEstimate(0, 0, 0), True),
        (RemainingEstimate(5, 7, 9), True),
        (RemainingEstimate(6, 7, 9), False),
        (RemainingEstimate(-1, 7, 9), False),
        (RemainingEstimate(0, -1, 9), False),
        (RemainingEstimate(0, 9, 7), False),
    ],
)
def test_what_cannot_be_an_estimate_is_none(estimate: RemainingEstimate, sound: bool) -> None:
    assert is_sound(estimate, output_tokens=5) is sound


def test_the_later_position_counts_and_of_one_position_the_later_answer() -> None:
    older, other, later = (RemainingEstimate(at, median, 90) for at, median in ((0, 50), (0, 60), (20, 40)))
    assert newer(None, older) == older
    assert newer(older, later) == newer(later, older) == later
    assert newer(older, other) == other

"""Estimates meet their ends, within bounds; and are scored by how far their sequences were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.predictor.intake import End
from services.predictor.outcomes import Outcome, Outcomes
from services.predictor.quality import Quality, RollingQuality
from services.predictor.registry import Version
from starmesh.prediction.conditional_median import ConditionalMedian

pytestmark = pytest.mark.fast

VERSION = Version("one", ConditionalMedian(), None)
OTHER = Version("two", ConditionalMedian(), None)


def note(
    outcomes: Outcomes, name: str, position: int, median: float = 1.0, version: Version = VERSION, prompt: int = 5
) -> None:
    outcomes.note(
        name,
        version,
        prompt_tokens=prompt,
        position=position,
        predicted=(median / 2, median),
        answered=(median, 2 * median),
    )


def ended(outcomes: Outcomes, name: str, total: int, *, finished: bool = True) -> Outcome:
    outcome = outcomes.end(End(name, total, finished))
    assert outcome is not None
    return outcome


def test_an_end_finds_its_estimates() -> None:
    outcomes = Outcomes()
    for position in (0, 20, 40):
        note(outcomes, "a", position, position + 4.0)
    note(outcomes, "b", 20)
    outcome = ended(outcomes, "a", 55)
    assert (outcome.output_tokens, outcome.finished, outcome.version) == (55, True, VERSION)
    assert outcome.positions.tolist() == [0, 20, 40]
    assert outcome.predicted.tolist() == [[2, 4], [12, 24], [22, 44]]
    assert outcome.answered.tolist() == [[4, 8], [24, 48], [44, 88]]
    assert len(outcomes) == 1


def test_an_end_is_told_once() -> None:
    outcomes = Outcomes()
    note(outcomes, "a", 0)
    ended(outcomes, "a", 10)
    assert outcomes.end(End("a", 10, True)) is None
    # A name may come again.
    note(outcomes, "a", 0)
    assert ended(outcomes, "a", 30).positions.tolist() == [0]


def test_an_end_without_estimates_tells_a_length() -> None:
    outcome = ended(Outcomes(), "a", 10, finished=False)
    assert (outcome.output_tokens, outcome.finished, outcome.version) == (10, False, None)
    assert outcome.predicted.shape == outcome.answered.shape == (0, 2)


def test_a_sequence_that_went_back_replaces_what_was_said_since() -> None:
    outcomes = Outcomes()
    for position in (0, 20, 40, 60):
        note(outcomes, "a", position)
    note(outcomes, "a", 40, 9.0)
    outcome = ended(outcomes, "a", 70)
    assert outcome.positions.tolist() == [0, 20, 40]
    assert outcome.answered[-1].tolist() == [9, 18]


def test_what_was_said_beyond_the_end_does_not_count() -> None:
    outcomes = Outcomes()
    for position in (0, 20, 40):
        note(outcomes, "a", position)
    assert ended(outcomes, "a", 20).positions.tolist() == [0, 20]


def test_another_version_or_prompt_begins_anew() -> None:
    outcomes = Outcomes()
    note(outcomes, "a", 0)
    note(outcomes, "a", 20, version=OTHER)
    note(outcomes, "b", 0)
    note(outcomes, "b", 20, prompt=6)
    assert (ended(outcomes, "a", 30).version, ended(outcomes, "b", 30).positions.tolist()) == (OTHER, [20])


def test_the_request_that_was_silent_longest_is_forgotten() -> None:
    outcomes = Outcomes(max_requests=2)
    for name, position in (("a", 0), ("b", 0), ("a", 20), ("c", 0)):
        note(outcomes, name, position)
    assert len(outcomes) == 2
    found = {name: len(ended(outcomes, name, 50).positions) for name in "abc"}
    assert found == {"a": 2, "b": 0, "c": 1}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 40), st.booleans()), max_size=60))
def test_all_estimates_together_are_bounded(notes: list[tuple[str, int, bool]]) -> None:
    outcomes = Outcomes(max_estimates=8, max_held=12)
    for name, position, ends in notes:
        note(outcomes, name, position)
        if ends:
            ended(outcomes, name, 50)
        held = {request_id: len(known.by_position) for request_id, known in outcomes._running.items()}
        assert outcomes._held == sum(held.values()) <= 12
        assert ends or name in held


@given(st.integers(1, 300))
def test_a_long_request_keeps_some_estimates_of_all_its_life(count: int) -> None:
    outcomes = Outcomes(max_estimates=16)
    for number in range(count):
        note(outcomes, "a", 20 * number)
    positions = ended(outcomes, "a", 20 * count).positions
    assert min(count, 8) <= len(positions) <= 16
    assert positions[0] == 0
    assert len(set(np.diff(positions).tolist())) <= 1


def outcome_of(total: int, positions: list[int], medians: list[float], *, finished: bool = True) -> Outcome:
    answered = np.array([[median, 2 * median] for median in medians], dtype=np.float32).reshape(-1, 2)
    return Outcome("a", total, finished, VERSION, np.array(positions, dtype=np.int64), answered, answered)


def test_quality_is_by_quarter_and_each_estimate_weighs_the_same() -> None:
    quality = RollingQuality()
    quality.observe(outcome_of(100, [0, 20, 80], [90, 60, 0]))  # off by 10 and 20; by 20 and exceeded
    quality.observe(outcome_of(40, [0], [10]))  # off by 30 and exceeded
    assert len(quality) == 2
    assert quality.qualities == (Quality(0.0, 0.25, 3, 20.0, 2 / 3), Quality(0.75, 1.0, 1, 20.0, 0.0))


def test_cut_requests_are_not_scored() -> None:
    quality = RollingQuality()
    quality.observe(outcome_of(100, [0], [5], finished=False))
    quality.observe(outcome_of(100, [], []))
    quality.observe(outcome_of(0, [0], [5]))
    assert len(quality) == 0 and quality.qualities == ()


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 250)), min_size=1, max_size=20))
def test_only_the_last_requests_count(requests: list[tuple[int, int]]) -> None:
    rolling, fresh = RollingQuality(window=4), RollingQuality(window=4)
    outcomes = [
        outcome_of(total, list(range(0, total, 20)), [median] * len(range(0, total, 20))) for total, median in requests
    ]
    for outcome in outcomes:
        rolling.observe(outcome)
    for outcome in outcomes[-4:]:
        fresh.observe(outcome)
    assert len(rolling) == len(fresh)
    for found, expected in zip(rolling.qualities, fresh.qualities, strict=True):
        assert (found.progress_from, found.estimates) == (expected.progress_from, expected.estimates)
        assert found.mae_tokens == pytest.approx(expected.mae_tokens)
        assert found.coverage == pytest.approx(expected.coverage)

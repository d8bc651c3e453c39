"""The peak of KV over time: exact, against going through the steps one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.peak import peak_blocks, taken_remaining
from starmesh.sequence_loads import UNKNOWN

pytestmark = pytest.mark.fast

sequences = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=7)
instances = st.lists(sequences, min_size=1, max_size=4)
block_sizes = st.sampled_from([1, 2, 3, 16])


def at_worst(held: list[tuple[int, int]], block_tokens: int) -> int:
    """Step by step: whoever runs has as many tokens more as steps have passed."""
    last = max((remaining for _, remaining in held), default=0)
    return max(
        sum(-(-(tokens + step) // block_tokens) for tokens, remaining in held if step <= remaining)
        for step in range(last + 1)
    )


def peaks(found: list[list[tuple[int, int]]], block_tokens: int) -> list[int]:
    tokens, remaining = (np.array([each[at] for one in found for each in one], dtype=np.int64) for at in (0, 1))
    owner = np.repeat(np.arange(len(found)), [len(held) for held in found])
    # In no order: whose they are is all that matters.
    mixed = np.random.default_rng(len(owner)).permutation(len(owner))
    return [int(each) for each in peak_blocks(tokens[mixed], remaining[mixed], owner[mixed], len(found), block_tokens)]


@given(instances, block_sizes)
def test_the_peak_is_that_of_going_step_by_step(found: list[list[tuple[int, int]]], block_tokens: int) -> None:
    assert peaks(found, block_tokens) == [at_worst(held, block_tokens) for held in found]


@given(sequences)
def test_in_tokens_it_is_the_published_formula(held: list[tuple[int, int]]) -> None:
    held = sorted(held, key=lambda each: -each[1])
    published = [sum(c for c, _ in held[:k]) + k * held[k - 1][1] for k in range(1, len(held) + 1)]
    assert peaks([held], 1) == [max(published, default=0)]


@given(sequences, st.tuples(st.integers(1, 40), st.integers(0, 30)), block_sizes)
def test_another_sequence_never_needs_less_and_today_is_never_hidden(
    held: list[tuple[int, int]], another: tuple[int, int], block_tokens: int
) -> None:
    without, with_it = peaks([held, [*held, another]], block_tokens)
    now = sum(-(-tokens // block_tokens) for tokens, _ in held)
    assert now <= without <= with_it
    assert with_it <= without + -(-sum(another) // block_tokens)


known = st.tuples(
    st.integers(0, 500), st.integers(-1, 300), st.integers(-1, 300), st.integers(0, 300), st.integers(0, 400)
)


def read(drawn: tuple[int, int, int, int, int], caution: float) -> int:
    """The rules one after the other."""
    output, median, quantile, age, limit = drawn
    fresh = age <= 200
    if median > 0 and fresh:
        low = min(median, limit)
        high = min(max(quantile, median), limit) if quantile > 0 else limit
        return low + round(caution * (high - low))
    most = min(quantile, limit) if quantile > 0 and fresh else limit
    return min(output, most)


@given(st.lists(known, min_size=1, max_size=8), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_what_is_taken_to_remain(drawn: list[tuple[int, int, int, int, int]], caution: float) -> None:
    output, median, quantile, age, limit = np.array(drawn, dtype=np.int64).T
    taken = taken_remaining(output, median, quantile, age, limit, caution=caution, max_age_tokens=200)
    assert taken.tolist() == [read(each, caution) for each in drawn]


def test_without_estimates_a_batch_has_as_much_before_it_as_behind_it() -> None:
    draw = np.random.default_rng(7)
    lengths = draw.lognormal(6.0, 1.0, 40_000).astype(np.int64) + 1
    # A long one is more likely to be running at a random moment, and is anywhere within its life.
    seen = draw.choice(lengths, 2_500, p=lengths / lengths.sum())
    output = (draw.random(2_500) * seen).astype(np.int64)
    none = np.full(2_500, UNKNOWN)
    taken = taken_remaining(output, none, none, none, np.full(2_500, 10**9), caution=0.0, max_age_tokens=200)
    assert taken.sum() == pytest.approx((seen - output).sum(), rel=0.1)
    owner = np.arange(2_500) // 25
    estimated, true = (peak_blocks(output + 1, left, owner, 100, 16) for left in (taken, seen - output))
    assert np.mean(estimated / true) == pytest.approx(1.1, abs=0.1)

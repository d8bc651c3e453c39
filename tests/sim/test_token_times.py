"""Token times that are kept for a whole batch are those that are kept for each request."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.sim.token_times import SharedTimes, TokenTimes

pytestmark = pytest.mark.fast

REQUESTS = ("a", "b", "c", "d")
gaps = st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0])


def test_the_first_token_has_no_gap_and_forgetting_tells_the_longest() -> None:
    times = TokenTimes()
    assert times.token(["a", "b"], 1.0) == []
    assert times.token(["b"], 2.0) == [1.0]
    assert times.token(["a", "b"], 5.0) == [4.0, 3.0]
    assert times.token(["a"], 6.0) == [1.0]
    assert (times.forget("a"), times.forget("b"), times.forget("c")) == (4.0, 3.0, 0.0)
    assert times.token(["a"], 9.0) == []


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sets(st.sampled_from(REQUESTS), min_size=1), st.lists(gaps, min_size=1)))
)
def test_batches_of_two_instances_keep_the_times_that_single_tokens_have(
    batches: list[tuple[int, set[str], list[float]]],
) -> None:
    shared, single = TokenTimes(), TokenTimes()
    instances = [SharedTimes(shared), SharedTimes(shared)]
    shared_gaps: Counter[float] = Counter()
    single_gaps: Counter[float] = Counter()
    now_s = 0.0
    for number, members, between_s in batches:
        request_ids = sorted(members)
        for elsewhere in instances:  # a request is in one batch at a time
            if elsewhere is not instances[number]:
                elsewhere.keep([])
        ends_s = now_s + np.add.accumulate(between_s)
        now_s = float(ends_s[-1])
        for part in np.array_split(ends_s, 2):
            if len(part):
                for gaps_s, sequences in instances[number].tokens(request_ids, part):
                    shared_gaps.update(Counter(gaps_s.tolist() * sequences))
        for end_s in ends_s.tolist():
            single_gaps.update(single.token(request_ids, end_s))
    for instance in instances:
        instance.keep([])
    assert shared_gaps == single_gaps
    assert [shared.forget(each) for each in REQUESTS] == [single.forget(each) for each in REQUESTS]

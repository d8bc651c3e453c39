"""The average of a running sequence is that of training, whatever is sent twice, late or lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.prediction.averaging import RunningAverages, advance, averaged

pytestmark = pytest.mark.fast

positions = st.lists(st.integers(0, 5000), min_size=1, max_size=20, unique=True).map(sorted)


def states_for(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 2, 3)).astype(np.float16)


@given(positions, st.data())
def test_serving_averages_as_training_does(places: list[int], data: st.DataObject) -> None:
    states = states_for(len(places))
    wanted = averaged(states, np.array(places, dtype=np.int32))
    running = RunningAverages(4)
    for index, (place, state) in enumerate(zip(places, states, strict=True)):
        found = running.add("a", place, state)
        np.testing.assert_array_equal(found, wanted[index])
        seen = [place for place in places[: index + 1] if place]
        if seen and data.draw(st.booleans()):
            # Twice, or one from before: nothing changes.
            stale = data.draw(st.sampled_from(seen))
            np.testing.assert_array_equal(running.add("a", stale, state + np.float16(1)), wanted[index])


def test_the_average_is_a_weighted_mean() -> None:
    state = np.ones((1, 2), dtype=np.float16)
    once = advance(np.zeros((1, 2), dtype=np.float32), state, 20)
    np.testing.assert_allclose(once, 1 - np.exp(-0.5), rtol=1e-6)
    # Two steps of 20 tokens towards the same state are one of 40.
    np.testing.assert_allclose(advance(once, state, 20), advance(0 * once, state, 40), rtol=1e-6)


def test_another_request_of_the_same_name_begins_anew() -> None:
    running = RunningAverages(4)
    states = states_for(6)
    for place, state in zip((0, 20, 300), states[:3], strict=True):
        running.add("a", place, state)
    np.testing.assert_array_equal(running.add("a", 0, states[3]), states[3].astype(np.float32))
    wanted = averaged(states[3:5], np.array([0, 20], dtype=np.int32))
    np.testing.assert_array_equal(running.add("a", 20, states[4]), wanted[1])


def test_the_longest_silent_is_forgotten() -> None:
    running = RunningAverages(2)
    states = states_for(6)
    for name in ("a", "b"):
        running.add(name, 0, states[0])
    running.add("a", 20, states[1])
    running.add("c", 0, states[2])
    assert len(running) == 2
    # b starts anew.
    np.testing.assert_array_equal(running.add("b", 40, states[3]), states[3].astype(np.float32))
    running.end("b")
    running.end("unknown")
    assert len(running) == 1

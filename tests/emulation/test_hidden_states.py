"""Lengths travel as hidden states, and predictors of an emulated cluster read them again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.predictor.emulated import emulated_predictors
from starmesh.emulation.emulation import Emulation
from starmesh.emulation.hidden_states import hidden_layout, read_lengths, write_lengths
from starmesh.emulation.tokens import length_token_id
from starmesh.engine.batch import BatchItem
from starmesh.instance.hidden_state import pack_hidden_state
from starmesh.prediction.batch import SampleBatch
from starmesh.profiles import load_profile
from starmesh.types import SamplingParams

pytestmark = pytest.mark.fast

EMULATION = Emulation(profile=load_profile("h100-7b"))
LAYOUT = hidden_layout(EMULATION.layout)


def sampling_item(output_tokens: int | None, limit: int, request_id: str = "r", *, made: int = 0) -> BatchItem:
    """Of a prompt that asks for so many tokens, or for nothing, after ``made`` of them."""
    prompt = [5, 6, 7 if output_tokens is None else length_token_id(output_tokens)]
    history = [*prompt, *([9] * made)]
    sampling = SamplingParams(max_output_tokens=limit)
    return BatchItem(request_id, history[-1:], len(history) - 1, (0,), sampling, history, prompt_tokens=3)


def travelled(items: list[BatchItem]) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """The items' hidden states as the predictor has them."""
    packed = b"".join(map(pack_hidden_state, write_lengths(items)))
    assert len(packed) == len(items) * LAYOUT.state_bytes
    return np.frombuffer(packed, "<f2").reshape(len(items), len(LAYOUT.layers), LAYOUT.width)


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 21)), min_size=1, max_size=5))
def test_lengths_come_through_float16_unchanged(lengths: list[tuple[int, int]]) -> None:
    items = [sampling_item(own, limit, f"r{number}") for number, (own, limit) in enumerate(lengths)]
    known = read_lengths(travelled(items))
    assert list(known.output_tokens) == [min(own, limit) for own, limit in lengths]
    assert list(known.limits) == [limit for _, limit in lengths]
    assert len(set(known.keys)) == len(lengths)


def test_one_that_does_not_say_goes_on_to_its_limit() -> None:
    known = read_lengths(travelled([sampling_item(None, 700)]))
    assert list(known.output_tokens) == [700]


def test_other_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match="emulated"):
        read_lengths(np.zeros((2, 2, 6), np.float16))


def test_the_oracle_knows_and_others_err() -> None:
    items = [sampling_item(1000 + 100 * number, 30_000, f"r{number}", made=40) for number in range(50)]
    batch = SampleBatch(travelled(items), np.full(50, 3), np.full(50, 40))
    found = emulated_predictors(EMULATION, cap_tokens=32_000)
    assert set(found) == {"oracle", "measured", "paper"}
    exact = found["oracle"].predict(batch)
    assert [list(row) for row in exact] == [[960 + 100 * number] * 2 for number in range(50)]
    for name in ("measured", "paper"):
        predictor = found[name]
        assert predictor.layout == LAYOUT
        predicted = predictor.predict(batch)
        assert predicted.shape == (50, 2)
        assert not np.array_equal(predicted, exact)
        assert np.all(predicted[:, 0] <= predicted[:, 1]) and np.all(predicted >= 0)
        assert np.array_equal(predicted, predictor.predict(batch)), "the same sample, the same answer"

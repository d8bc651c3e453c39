"""Sequences in columns are the same as in rows, to whoever reads or compares them."""

from __future__ import annotations

import copy
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.sequence_loads import UNKNOWN, SequenceLoads
from starmesh.types import InstanceLoad, SequenceLoad

pytestmark = pytest.mark.fast

counts = st.integers(0, 2**53 - 1)
sequences = st.lists(
    st.builds(
        SequenceLoad,
        st.text(max_size=3),
        *[counts] * 5,
        *[st.none() | counts] * 3,
    ),
    max_size=4,
).map(tuple)


@given(sequences)
def test_columns_are_the_rows(rows: tuple[SequenceLoad, ...]) -> None:
    columns = SequenceLoads.of(rows)
    counts = [[None if n == UNKNOWN else n for n in array("q", column)] for column in columns.columns]
    assert [SequenceLoad(name, *row) for name, *row in zip(columns.request_ids, *counts, strict=True)] == list(rows)


@given(sequences)
def test_lacking_tokens_are_those_of_the_rows(rows: tuple[SequenceLoad, ...]) -> None:
    lacking = (row.prompt_tokens + row.output_tokens - row.resident_tokens for row in rows)
    columns = SequenceLoads.of(rows)
    assert columns.lacking_tokens == columns.lacking_tokens == sum(tokens for tokens in lacking if tokens > 0)


@given(sequences, sequences)
def test_reads_and_compares_like_a_tuple(rows: tuple[SequenceLoad, ...], others: tuple[SequenceLoad, ...]) -> None:
    kept = SequenceLoads.of(rows)
    made = copy.deepcopy(SequenceLoads(kept.request_ids, [array("q", column) for column in kept.columns]))
    assert SequenceLoads.of(made) is made
    for columns in (kept, made):
        assert (tuple(columns), len(columns), hash(columns), repr(columns)) == (rows, len(rows), hash(rows), repr(rows))
        assert columns[:2] == rows[:2] and columns[-1:] == rows[-1:]
        assert columns == rows and rows == columns and kept == columns
        assert (columns == others) == (rows == others) == (columns == SequenceLoads.of(others))
        assert columns != list(rows)
        assert InstanceLoad(1, 1, sequences=columns) == InstanceLoad(1, 1, sequences=rows)


def test_columns_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="8 counts"):
        SequenceLoads(["a"], [[1], *[[]] * 7])
    with pytest.raises(ValueError, match="8 counts"):
        SequenceLoads(["a"], [[1, 2]] * 8)
    with pytest.raises(ValueError, match="8 counts"):
        SequenceLoads(["a"], [[1]] * 7)
    with pytest.raises(OverflowError):
        SequenceLoads(["a"], [[2**63]] * 8)

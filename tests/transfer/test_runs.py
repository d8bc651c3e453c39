"""Runs of blocks that are contiguous on both sides become one descriptor."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.transfer.nixl import merge_runs

pytestmark = pytest.mark.fast


def test_a_contiguous_list_is_one_run() -> None:
    assert list(merge_runs([4, 5, 6], [0, 1, 2])) == [(4, 0, 3)]


def test_no_blocks_are_no_runs() -> None:
    assert list(merge_runs([], [])) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_runs_expand_to_the_pairs_and_none_could_be_longer(pairs: list[tuple[int, int]]) -> None:
    runs = list(merge_runs([remote for remote, _ in pairs], [local for _, local in pairs]))
    assert [(first + i, local + i) for first, local, blocks in runs for i in range(blocks)] == pairs
    for (first, local, blocks), (next_first, next_local, _) in itertools.pairwise(runs):
        assert (next_first, next_local) != (first + blocks, local + blocks)

"""The queue against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.predictor.sample_queue import SampleQueue

pytestmark = pytest.mark.fast

CAPACITY = 7
VERSIONS = ("old", "new")


class Queueing(RuleBasedStateMachine):
    """Calls come with rows, go, and are taken in batches."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: SampleQueue[str, str] = SampleQueue(CAPACITY)
        self.listed: list[tuple[str, int, str]] = []
        self.rows: dict[str, int] = {}

    @rule(call=st.sampled_from("abcd"), version=st.sampled_from(VERSIONS))
    def push(self, call: str, version: str) -> None:
        row = self.rows[call] = self.rows.get(call, -1) + 1
        dropped = self.queue.push(call, row, version)
        expected = self.listed.pop(0)[:2] if len(self.listed) == CAPACITY else None
        assert dropped == expected
        self.listed.append((call, row, version))

    @rule(limit=st.integers(1, 9))
    def take(self, limit: int) -> None:
        version, taken = self.queue.take(limit)
        expected: list[tuple[str, int]] = []
        while self.listed and len(expected) < limit and self.listed[0][2] == version:
            expected.append(self.listed.pop(0)[:2])
        assert taken == expected
        assert (version is None) == (not taken)

    @rule(call=st.sampled_from("abcd"))
    def discard(self, call: str) -> None:
        gone = self.queue.discard(call)
        kept = [entry for entry in self.listed if entry[0] != call]
        assert gone == len(self.listed) - len(kept)
        self.listed = kept

    @invariant()
    def is_bounded(self) -> None:
        assert len(self.queue) == len(self.listed) <= CAPACITY


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=30)


def test_a_queue_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds none"):
        SampleQueue(0)

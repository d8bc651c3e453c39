"""Who is preempted, by what is expected of the sequences: the order, and that everything still ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.engine.block_pool import BlockPool
from starmesh.engine.scheduler import Scheduler
from starmesh.engine.sequence import Sequence
from starmesh.types import SamplingParams, SequenceSpec

pytestmark = pytest.mark.fast

LIMIT = 40


def spec(request_id: str, prompt: int, *, priority: int = 0, limit: int = LIMIT) -> SequenceSpec:
    return SequenceSpec(request_id, 1, (1,) * prompt, (), SamplingParams(max_output_tokens=limit), priority)


def scheduler(*specs: SequenceSpec, total_blocks: int = 60) -> Scheduler:
    """All of them run, with one output token each if the pool and the step hold all prompts."""
    target = Scheduler(
        BlockPool(total_blocks, block_tokens=2),
        max_step_tokens=64,
        max_sequences=8,
        max_waiting_sequences=16,
        max_sequence_tokens=1000,
        watermark=0.0,
    )
    for each in specs:
        target.add(each, hold=False, now_s=0.0)
    step(target)
    return target


def step(target: Scheduler) -> set[str]:
    """One step; who was computed."""
    chunks = target.schedule().chunks
    for chunk in chunks:
        target.advance(chunk.sequence, chunk.tokens)
        if chunk.sequence.uncomputed_tokens == 0:
            chunk.sequence.token_ids.append(7)
    target.check_integrity()
    return {chunk.sequence.request_id for chunk in chunks}


def order(target: Scheduler) -> list[str]:
    return [sequence.request_id for sequence in target.preempted_first()]


def test_without_expectations_the_youngest_of_the_lowest_priority_goes_first() -> None:
    target = scheduler(spec("old", 3), spec("young", 9), spec("high", 2, priority=1), spec("low", 2, priority=-1))
    assert order(target) == ["low", "young", "old", "high"]
    target.expect({"somebody else": 10})
    assert order(target) == ["low", "young", "old", "high"]


def test_the_longest_goes_first_and_the_oldest_last() -> None:
    target = scheduler(spec("oldest", 4), spec("long", 4), spec("ending", 4), spec("longer", 4))
    target.expect({"oldest": 40, "long": 20, "ending": 6, "longer": 30})
    assert order(target) == ["longer", "long", "ending", "oldest"]


def test_one_of_which_nothing_is_known_runs_to_its_limit_and_nobody_beyond_it() -> None:
    target = scheduler(spec("oldest", 4), spec("known", 4), spec("unknown", 4, limit=20), spec("short", 4, limit=9))
    target.expect({"known": 30, "short": 99})
    assert order(target) == ["known", "unknown", "short", "oldest"]


def test_of_equals_the_younger_goes_and_who_outlives_what_was_expected_is_about_to_end() -> None:
    target = scheduler(spec("oldest", 4), spec("a", 4), spec("b", 4), spec("late", 4), spec("later", 4))
    target.expect({"a": 12, "b": 12, "late": 3, "later": 1})
    assert order(target) == ["b", "a", "later", "late", "oldest"]


def test_priority_weighs_more_than_length() -> None:
    target = scheduler(spec("high", 4, priority=2), spec("mid", 4, priority=1), spec("low", 4))
    target.expect({"high": 40, "mid": 40, "low": 6})
    assert order(target) == ["low", "mid", "high"]


def test_an_older_one_makes_way_for_one_that_is_about_to_end() -> None:
    target = scheduler(spec("oldest", 4), spec("long", 4), spec("ending", 4), total_blocks=8)
    target.expect({"oldest": 30, "long": 30, "ending": 7})
    assert step(target) == {"oldest", "ending"}
    assert [waiting.request_id for waiting in target.waiting] == ["long"]


requests = st.lists(
    st.tuples(
        st.integers(1, 12), st.integers(1, 25), st.sampled_from([-1, 0, 0, 0, 1]), st.none() | st.integers(0, 60)
    ),
    min_size=1,
    max_size=8,
)


@given(requests, st.integers(19, 40), st.integers(0, 3))
def test_the_highest_rank_is_in_every_step_and_all_come_to_their_ends(
    drawn: list[tuple[int, int, int, int | None]], total_blocks: int, redraw: int
) -> None:
    specs = [spec(f"r{at}", prompt, priority=priority) for at, (prompt, _, priority, _) in enumerate(drawn)]
    ends = {f"r{at}": prompt + outputs for at, (prompt, outputs, _, _) in enumerate(drawn)}
    target = scheduler(*specs, total_blocks=total_blocks)
    for steps in range(2000):
        guess = {f"r{at}": each[3] + steps * redraw % 17 for at, each in enumerate(drawn) if each[3] is not None}
        target.expect(guess)
        for sequence in [s for s in target.running if s.tokens >= ends[s.request_id]]:
            target.remove(sequence.request_id)
        if not target.sequences:
            return
        expected = target.preempted_first()
        first = target.running[0] if target.running else None
        assert not expected or expected[-1] is first
        assert sorted(expected, key=id) == sorted(target.running, key=id)
        before = list(expected)
        waited = set(target.waiting)
        ran = step(target)
        assert first is None or first.request_id in ran
        preempted = [s for s in before if s in target.waiting and s not in waited]
        assert preempted == before[: len(preempted)], "not in the order that was told"
    pytest.fail("they never end")


def read(sequences: list[Sequence], expected: dict[str, int]) -> list[str]:
    """The order, one rule after the other."""
    oldest, others = sequences[0], sequences[1:]
    left = list(others)
    found = []
    while left:
        lowest = min(s.priority for s in left)
        mates = [s for s in left if s.priority == lowest]
        if any(s.request_id in expected for s in others):
            limits = {s.request_id: s.prompt_tokens + s.sampling.max_output_tokens for s in mates}
            remaining = [max(0, min(expected.get(s.request_id, 10**9), limits[s.request_id]) - s.tokens) for s in mates]
            mates = [s for s, left_over in zip(mates, remaining, strict=True) if left_over == max(remaining)]
        victim = max(mates, key=lambda s: s.arrival)
        left.remove(victim)
        found.append(victim.request_id)
    return [*found, oldest.request_id]


@given(requests)
def test_the_order_is_the_readable_one(drawn: list[tuple[int, int, int, int | None]]) -> None:
    specs = [spec(f"r{at}", prompt, priority=priority) for at, (prompt, _, priority, _) in enumerate(drawn)]
    target = scheduler(*specs)
    expected = {f"r{at}": each[3] for at, each in enumerate(drawn) if each[3] is not None}
    target.expect(expected)
    if target.running:
        assert order(target) == read(target.running, expected)

"""What is expected of sequences decides who comes back after a preemption: by example, by steps, and never for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.engine.expected_ends import ExpectedEnds
from starmesh.engine.scheduler import Scheduler
from starmesh.engine.sequence import Sequence
from starmesh.types import SamplingParams, SequenceSpec

from .test_scheduler_victims import scheduler, spec, step

pytestmark = pytest.mark.fast


def preempting(**expected: int) -> Scheduler:
    """Three of 4 + 1 tokens on 8 blocks of 2, which are one too few: the longest has been preempted."""
    target = scheduler(spec("oldest", 4), spec("long", 4), spec("ending", 4), total_blocks=8)
    target.expect({"long": 14} | expected)
    step(target)
    assert [waiting.request_id for waiting in target.waiting] == ["long"]
    return target


def test_one_that_would_be_preempted_again_is_held_back() -> None:
    target = preempting(oldest=16, ending=7)
    assert step(target) == {"oldest", "ending"}
    target.remove("ending")
    # 6 tokens beside 7 fit 8 blocks now, and outgrow them before the oldest ends at 16.
    assert target.pool.free_blocks >= target.pool.blocks_for(5)
    assert step(target) == {"oldest"}
    # Once the oldest is expected to end soon, there is room for both.
    target.expect({"long": 14, "oldest": 9})
    assert step(target) == {"oldest", "long"}


def test_without_expectations_blocks_decide() -> None:
    target = preempting(oldest=16, ending=7)
    target.expect({})
    target.remove("ending")
    assert step(target) == {"oldest", "long"}


def test_one_that_outranks_all_that_run_is_not_held_back() -> None:
    target = preempting(oldest=16, ending=13)
    target.remove("oldest")
    # "ending" is younger: however long it stays, "long" waits only for blocks.
    assert step(target) == {"ending", "long"}


def test_newcomers_may_come_meanwhile_but_take_no_room_from_it() -> None:
    target = preempting(oldest=16, ending=7)
    target.remove("ending")
    assert step(target) == {"oldest"}
    free = target.pool.free_blocks - target.pool.blocks_for(target.sequences["long"].tokens)
    assert target.reserve("too much", 1, 2 * (free + 1)) is None
    assert target.reserve("little", 1, 2 * free) is not None


def running(*known: tuple[int, int]) -> list[Sequence]:
    """Sequences of (prompt, output) tokens, by rank."""
    return [
        Sequence.from_spec(
            SequenceSpec(f"r{at}", 1, (1,) * prompt, (1,) * output, SamplingParams(max_output_tokens=50)),
            arrival=at,
            queued_at_s=0.0,
        )
        for at, (prompt, output) in enumerate(known)
    ]


drawn = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9), st.none() | st.integers(0, 70)), min_size=2, max_size=6
)


@given(drawn, st.integers(1, 120), st.sampled_from([1, 2, 5]))
def test_who_comes_back_stays_if_all_end_as_expected(
    known: list[tuple[int, int, int | None]], blocks: int, block_tokens: int
) -> None:
    sequences = running(*((prompt, output) for prompt, output, _ in known))
    expected = {f"r{at}": end for at, (_, _, end) in enumerate(known) if end is not None}
    *others, back = sequences
    may = ExpectedEnds(expected).may_come_back(back, others, blocks=blocks, block_tokens=block_tokens)
    if not expected:
        assert may
        return
    remaining = []
    for sequence in sequences:
        end = expected.get(sequence.request_id)
        if end is None:
            remaining.append(sequence.output_tokens)
        else:
            remaining.append(max(0, min(end, sequence.prompt_tokens + 50) - sequence.tokens))
    needs = [
        sum(-(-(s.tokens + t) // block_tokens) for s, left in zip(sequences, remaining, strict=True) if t <= left)
        for t in range(max(remaining) + 1)
    ]
    if may:
        assert max(needs) <= blocks
    else:
        # Rounding is to the safe side, by less than a block for each.
        assert max(needs) + len(sequences) > blocks


requests = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 25), st.sampled_from([-1, 0, 0, 1]), st.integers(0, 60)),
    min_size=2,
    max_size=8,
)


@given(requests, st.integers(19, 30), st.integers(0, 5))
def test_whatever_is_expected_nobody_is_held_back_for_ever(
    each: list[tuple[int, int, int, int]], total_blocks: int, late: int
) -> None:
    """Though somebody new may come with each step for a while."""
    specs = [spec(f"r{at}", prompt, priority=priority) for at, (prompt, _, priority, _) in enumerate(each)]
    ends = {f"r{at}": prompt + outputs for at, (prompt, outputs, _, _) in enumerate(each)}
    target = scheduler(*specs, total_blocks=total_blocks)
    target.expect({f"r{at}": end for at, (*_, end) in enumerate(each)})
    for steps in range(2000):
        if steps < 20 * late and steps % 3 == 0 and target.reserve(f"n{steps}", 1, 5) is not None:
            target.start(spec(f"n{steps}", 3), 2, now_s=0.0)
            ends[f"n{steps}"] = 15
        for sequence in [s for s in target.running if s.tokens >= ends[s.request_id]]:
            target.remove(sequence.request_id)
        if not target.sequences and steps >= 20 * late:
            return
        step(target)
    pytest.fail("they never end")

"""Counted sequences on blocks that are owed: to the scheduler they are as those of the live engine."""

from __future__ import annotations

import pytest

from starmesh.engine.block_pool import IntegrityError, OutOfBlocks
from starmesh.engine.scheduler import Scheduler
from starmesh.engine.sequence import SequenceStatus
from starmesh.sim.leaping_sequence import LeapingSequence, OwingPool, SharedSteps
from starmesh.sim.token_count import TokenCount, counted_spec
from starmesh.types import SamplingParams

pytestmark = pytest.mark.fast


def test_a_count_is_as_a_list_that_grows_at_its_end() -> None:
    tokens = TokenCount(5)
    tokens.append(7)
    assert len(tokens) == len(list(tokens)) == 6
    assert (tokens[:2], tokens[4:], tokens[9:]) == (TokenCount(2), TokenCount(2), TokenCount(0))
    assert tokens[1:3] + tokens[:1] == TokenCount(3)
    assert hash(tokens) == hash(TokenCount(6))
    with pytest.raises(IndexError):
        tokens[6]
    with pytest.raises(TypeError):
        tokens.insert(0, 1)
    with pytest.raises(TypeError):
        tokens[0] = 1
    with pytest.raises(TypeError):
        del tokens[0]


def test_owed_blocks_count_as_taken_until_they_are_handed_out() -> None:
    pool = OwingPool(4, block_tokens=2)
    pool.owe(3)
    assert pool.free_blocks == 1
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    block_ids = pool.settle(2)
    assert pool.free_blocks == 1
    pool.owe(-1)
    pool.free(block_ids)
    assert pool.free_blocks == 4
    pool.check_integrity([])
    with pytest.raises(IntegrityError):
        pool.owe(5)


def running_sequence(prompt_tokens: int) -> tuple[Scheduler, SharedSteps, LeapingSequence]:
    pool = OwingPool(8, block_tokens=2)
    shared = SharedSteps(pool, ends_at=lambda spec: 12)
    scheduler = Scheduler(
        pool,
        max_step_tokens=8,
        max_sequences=4,
        max_waiting_sequences=4,
        max_sequence_tokens=16,
        make_sequence=shared.sequence,
    )
    sampling = SamplingParams(max_output_tokens=9)
    spec = counted_spec("a", 1, prompt_tokens=prompt_tokens, output_tokens=0, sampling=sampling)
    scheduler.add(spec, hold=False, now_s=0.0)
    scheduler.schedule()
    sequence = scheduler.running[0]
    assert isinstance(sequence, LeapingSequence)
    scheduler.advance(sequence, prompt_tokens)
    sequence.token_ids.append(3)
    return scheduler, shared, sequence


def test_a_running_sequence_goes_with_the_shared_steps_and_a_held_one_does_not() -> None:
    scheduler, shared, sequence = running_sequence(3)
    assert sequence.course() == (12 - 4, 1, 4)  # 8 steps to its end; one token more fits its two blocks
    shared.made += 4
    shared.pool.owe(2)
    assert (sequence.tokens, sequence.output_tokens, sequence.computed_tokens) == (8, 5, 7)
    assert (len(sequence.token_ids), sequence.uncomputed_tokens) == (8, 1)
    assert shared.pool.free_blocks == 4
    assert len(sequence.block_ids) == 4
    assert shared.pool.free_blocks == 4
    version = shared.version
    scheduler.hold(sequence)
    assert shared.version != version
    shared.made += 3
    assert (sequence.tokens, sequence.computed_tokens) == (8, 7)
    assert (len(sequence.spec().prompt_token_ids), len(sequence.spec().output_token_ids)) == (3, 5)
    scheduler.resume("a")
    shared.made += 1
    assert sequence.status is SequenceStatus.RUNNING
    assert (sequence.tokens, sequence.computed_tokens) == (9, 8)
    scheduler.check_integrity()


def test_blocks_that_are_owed_to_a_sequence_that_ends_are_never_handed_out() -> None:
    scheduler, shared, sequence = running_sequence(3)
    shared.made += 6
    shared.pool.owe(3)
    assert shared.pool.free_blocks == 3
    sequence.waive_owed_blocks()
    scheduler.remove("a")
    assert shared.pool.free_blocks == 8
    scheduler.check_integrity()

"""The scheduler alone: order, budget, room, preemption and refusals, one rule at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from starmesh.engine.block_pool import BlockPool
from starmesh.engine.scheduler import (
    CapacityError,
    DuplicateRequest,
    QueueFull,
    Schedule,
    Scheduler,
    UnknownRequest,
)
from starmesh.engine.sequence import SequenceStatus
from starmesh.types import SamplingParams, SequenceSpec

pytestmark = pytest.mark.fast


def spec(request_id: str, tokens: int, *, epoch: int = 1, priority: int = 0, outputs: int = 0) -> SequenceSpec:
    return SequenceSpec(
        request_id=request_id,
        epoch=epoch,
        prompt_token_ids=tuple(range(tokens)),
        output_token_ids=(7,) * outputs,
        sampling=SamplingParams(max_output_tokens=1000),
        priority=priority,
    )


def scheduler(total_blocks: int = 100, **limits: Any) -> Scheduler:
    defaults = {"max_step_tokens": 16, "max_sequences": 8, "max_waiting_sequences": 16, "max_sequence_tokens": 10_000}
    return Scheduler(BlockPool(total_blocks, block_tokens=4), **defaults | limits)


def add(target: Scheduler, *specs: SequenceSpec, hold: bool = False) -> None:
    for each in specs:
        target.add(each, hold=hold, now_s=0.0)


def run(target: Scheduler) -> dict[str, int]:
    """Schedule a step and carry it out; who computed how many tokens."""
    schedule: Schedule = target.schedule()
    for chunk in schedule.chunks:
        target.advance(chunk.sequence, chunk.tokens)
        if chunk.sequence.uncomputed_tokens == 0:
            chunk.sequence.token_ids.append(7)
    target.check_integrity()
    return {chunk.sequence.request_id: chunk.tokens for chunk in schedule.chunks}


def test_decodes_go_first_and_prompts_share_what_is_left_of_the_budget() -> None:
    target = scheduler()
    add(target, spec("a", 3))
    assert run(target) == {"a": 3}
    add(target, spec("b", 20), spec("c", 9))
    assert run(target) == {"a": 1, "b": 15}
    assert run(target) == {"a": 1, "b": 5, "c": 9}
    assert run(target) == {"a": 1, "b": 1, "c": 1}


def test_waiting_sequences_go_by_priority_then_first_come_first_served() -> None:
    target = scheduler(max_sequences=1)
    add(target, spec("low", 2, priority=-1), spec("first", 2), spec("second", 2), spec("high", 2, priority=5))
    order = []
    while target.waiting or target.running:
        order += list(run(target))
        target.remove(order[-1])
    assert order == ["high", "first", "second", "low"]


def test_a_sequence_is_admitted_only_with_the_blocks_of_all_its_tokens() -> None:
    target = scheduler(total_blocks=10, max_step_tokens=8)
    add(target, spec("a", 24), spec("b", 20), spec("small", 2))
    assert run(target) == {"a": 8}  # 6 blocks at once, though it computes 2 blocks' worth
    assert target.pool.free_blocks == 4
    assert [waiting.request_id for waiting in target.waiting] == ["b", "small"]  # nobody overtakes


def test_admission_keeps_the_watermark_free_unless_nothing_runs() -> None:
    target = scheduler(total_blocks=10, watermark=0.2)
    add(target, spec("a", 40))
    assert run(target) == {"a": 16}
    target.remove("a")
    add(target, spec("b", 20), spec("c", 13), spec("d", 12))
    run(target)
    assert [running.request_id for running in target.running] == ["b"]
    target.remove("c")
    run(target)
    assert [running.request_id for running in target.running] == ["b", "d"]


def test_the_youngest_of_the_lowest_priority_is_preempted_and_comes_back_first() -> None:
    target = scheduler(total_blocks=6, max_step_tokens=32)
    add(target, spec("old", 8), spec("young", 4), spec("high", 8, priority=1))
    assert set(run(target)) == {"old", "young", "high"}
    assert target.pool.free_blocks == 1
    add(target, spec("new", 4))
    assert set(run(target)) == {"old", "high"}  # both need a block: one is free, one is taken from "young"
    assert target.preemptions == 1
    assert [waiting.request_id for waiting in target.waiting] == ["young", "new"]
    assert target.sequences["young"].status is SequenceStatus.WAITING
    assert target.sequences["young"].block_ids == []
    target.remove("old")
    assert run(target) == {"high": 1, "young": 5, "new": 4}  # its output of one token is recomputed with the prompt
    assert target.sequences["young"].output_tokens == 2


def test_a_victim_that_was_already_in_the_step_gives_back_its_budget() -> None:
    target = scheduler(total_blocks=5, max_step_tokens=8, max_sequences=4)
    add(target, spec("high", 10, priority=1))
    assert run(target) == {"high": 8}
    add(target, spec("low", 4))
    assert run(target) == {"high": 2, "low": 4}
    # An import that is still catching up needs blocks after the decodes have been given theirs.
    target.remove("high")
    block_ids = target.reserve("import", 1, 4)
    assert block_ids is not None
    target.start(spec("import", 16, priority=1), 4, now_s=0.0)
    assert run(target) == {"low": 1, "import": 7}
    assert run(target) == {"import": 5}
    assert [waiting.request_id for waiting in target.waiting] == ["low"]


def test_blocks_that_only_others_can_free_stall_a_lone_sequence_without_losing_it() -> None:
    target = scheduler(total_blocks=3)
    add(target, spec("a", 4))
    run(target)
    assert target.reserve("incoming", 1, 8) is not None
    assert run(target) == {}  # it needs a second block and gives up its first
    assert run(target) == {}
    assert target.reserve("other", 1, 4) is None  # what is free is spoken for
    target.remove("incoming")
    assert run(target) == {"a": 5}


def test_reserving_overtakes_nobody_and_keeps_a_place_in_the_batch() -> None:
    target = scheduler(total_blocks=12, max_sequences=2, watermark=0.1)
    add(target, spec("a", 4))
    run(target)
    assert target.reserve("too much", 1, 44) is None
    assert target.reserve("b", 1, 32) is not None
    assert target.reserve("c", 1, 1) is None
    add(target, spec("d", 1))
    assert run(target) == {"a": 1}
    target.start(spec("b", 9), 8, now_s=0.0)
    assert run(target) == {"a": 1, "b": 1}


def test_starting_needs_a_reservation_of_the_same_epoch_and_tokens_that_fit_it() -> None:
    target = scheduler()
    with pytest.raises(UnknownRequest, match="reserve first"):
        target.start(spec("a", 8), 4, now_s=0.0)
    assert target.reserve("a", 2, 8) is not None
    with pytest.raises(UnknownRequest):
        target.start(spec("a", 8, epoch=1), 4, now_s=0.0)
    for resident_tokens in (-1, 9, 20):
        with pytest.raises(ValueError, match="resident tokens"):
            target.start(spec("a", 20, epoch=2), resident_tokens, now_s=0.0)
    target.start(spec("a", 9, epoch=2), 8, now_s=0.0)
    assert run(target) == {"a": 1}


def test_an_older_epoch_makes_way_and_the_same_or_a_newer_one_does_not() -> None:
    target = scheduler()
    add(target, spec("a", 8, epoch=2))
    run(target)
    for epoch in (1, 2):
        with pytest.raises(DuplicateRequest, match="epoch 2"):
            target.reserve("a", epoch, 4)
        with pytest.raises(DuplicateRequest):
            add(target, spec("a", 8, epoch=epoch))
    assert target.reserve("a", 3, 4) is not None
    assert target.sequences == {}
    with pytest.raises(DuplicateRequest):
        target.reserve("a", 3, 4)
    add(target, spec("a", 8, epoch=4))
    assert target.incoming == {}
    assert not target.remove("a", 3)
    assert target.remove("a", 4)
    assert target.pool.free_blocks == target.pool.total_blocks


def test_what_can_never_fit_is_refused_and_changes_nothing() -> None:
    target = scheduler(total_blocks=4, max_sequence_tokens=100)
    for hold in (False, True):
        add(target, spec("fits", 16, epoch=int(hold)), hold=hold)
        with pytest.raises(CapacityError, match="17 tokens"):
            add(target, spec("long", 17), hold=hold)
    with pytest.raises(CapacityError):
        target.reserve("long", 1, 17)
    with pytest.raises(CapacityError):
        add(scheduler(max_sequence_tokens=8), spec("long", 8))
    for empty in (spec("none", 0), replace(spec("done", 1, outputs=3), sampling=SamplingParams(max_output_tokens=3))):
        with pytest.raises(ValueError, match="nothing to generate"):
            add(target, empty)
    assert set(target.sequences) == {"fits"}


def test_the_queue_is_bounded_for_new_sequences_only() -> None:
    target = scheduler(total_blocks=3, max_waiting_sequences=1)
    add(target, spec("a", 4))
    run(target)
    add(target, spec("b", 4))
    assert run(target) == {"a": 1, "b": 4}
    add(target, spec("c", 4))
    with pytest.raises(QueueFull, match="another instance"):
        add(target, spec("d", 4))
    run(target)
    assert [waiting.request_id for waiting in target.waiting] == ["b", "c"]


def test_a_prefix_is_computed_once_but_never_the_whole_prompt() -> None:
    target = scheduler(total_blocks=20, prefix_caching=True)
    add(target, spec("a", 12))
    assert run(target) == {"a": 12}
    add(target, spec("same", 12), spec("longer", 15), spec("shorter", 11))
    assert run(target) == {"a": 1, "same": 4, "longer": 3, "shorter": 3}
    assert [target.sequences[name].cached_tokens for name in ("a", "same", "longer", "shorter")] == [0, 8, 12, 8]
    first_blocks = {tuple(each.block_ids[:2]) for each in target.sequences.values()}
    assert len(first_blocks) == 1


def test_what_was_generated_is_found_by_the_next_turn_of_a_conversation() -> None:
    target = scheduler(total_blocks=20, prefix_caching=True)
    add(target, spec("a", 6))
    for _ in range(8):
        run(target)
    conversation = tuple(target.sequences["a"].token_ids)
    target.remove("a")
    add(target, replace(spec("b", 1), prompt_token_ids=(*conversation, 99)))
    assert run(target) == {"b": 15 - 12}


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    target = scheduler(total_blocks=5, prefix_caching=True)
    add(target, spec("a", 8), spec("b", 8))
    target.sequences["b"].token_ids[0] = 99
    run(target)
    run(target)
    assert target.preemptions == 1
    target.remove("a")
    assert run(target) == {"b": 1}  # eight tokens of KV were still cached


def test_hold_keeps_blocks_and_resume_goes_on() -> None:
    target = scheduler()
    add(target, spec("a", 8))
    run(target)
    with pytest.raises(UnknownRequest, match="running, not held"):
        target.resume("a")
    target.hold(target.find("a", SequenceStatus.RUNNING))
    assert run(target) == {}
    assert target.pool.free_blocks == target.pool.total_blocks - 2
    target.resume("a")
    assert run(target) == {"a": 1}
    with pytest.raises(UnknownRequest, match="not here"):
        target.resume("b")


@pytest.mark.parametrize("limits", [{"max_sequences": 0}, {"max_sequences": 17}, {"watermark": 1.0}])
def test_limits_that_contradict_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        scheduler(**limits)

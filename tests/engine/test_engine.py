"""The engine core's rules, one at a time, on the checking executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from starmesh.clock import VirtualClock
from starmesh.engine.batch import Batch, StepResult
from starmesh.engine.engine import EngineConfig, EngineCore, SequenceOutput
from starmesh.engine.scheduler import CapacityError, DuplicateRequest, QueueFull, UnknownRequest
from starmesh.types import FinishReason, SamplingParams, SequenceSpec
from tests.engine.checking_executor import EOS, CheckingExecutor, hidden_state, reference_tokens

pytestmark = pytest.mark.fast

LONG_PROMPT = tuple(range(1, 20))


class StopAtToken:
    """Takes stop strings for token ids."""

    def __init__(self, spec: SequenceSpec) -> None:
        self._stops = {int(text) for text in spec.sampling.stop_strings}
        self.fed: list[int] = []

    def feed(self, token_id: int) -> bool:
        self.fed.append(token_id)
        return token_id in self._stops


def spec(request_id: str = "a", prompt: tuple[int, ...] = LONG_PROMPT, **fields: Any) -> SequenceSpec:
    outputs = fields.pop("outputs", ())
    epoch = fields.pop("epoch", 1)
    sampling = SamplingParams(**({"max_output_tokens": 20, "temperature": 0.0, "ignore_eos": True} | fields))
    return SequenceSpec(request_id, epoch, prompt, tuple(outputs), sampling)


def engine(executor: CheckingExecutor | None = None, **options: Any) -> EngineCore:
    checker: Callable[[SequenceSpec], Any] = options.pop("stop_checker", StopAtToken)
    clock = options.pop("clock", VirtualClock())
    config: dict[str, Any] = {
        "eos_token_ids": frozenset({EOS}),
        "max_sequence_tokens": 1000,
        "max_step_tokens": 16,
        "max_sequences": 8,
    }
    return EngineCore(
        executor or CheckingExecutor(100), EngineConfig(**config | options), stop_checker=checker, clock=clock
    )


def drain(core: EngineCore, steps: int = 1000) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    while core.runnable:
        steps -= 1
        assert steps, f"no end in sight: {core!r}"
        outputs += core.step()
        core.check_integrity()
    return outputs


def tokens_of(outputs: list[SequenceOutput], request_id: str = "a") -> list[int]:
    tokens: list[int] = []
    for output in outputs:
        if output.request_id == request_id:
            assert output.error is None
            tokens += output.token_ids
    return tokens


def free(core: EngineCore) -> bool:
    return core.load().free_blocks == core.load().total_blocks


def test_a_sequence_runs_to_its_length_with_offsets() -> None:
    core = engine()
    assert core.step() == []
    core.add(spec())
    outputs = drain(core)
    assert tokens_of(outputs) == reference_tokens(LONG_PROMPT, 20)
    assert [output.offset for output in outputs] == list(range(20))
    assert [output.finish_reason for output in outputs] == [None] * 19 + [FinishReason.LENGTH]
    assert all(output.hidden_state is None for output in outputs), "it ends at its limit, whatever is predicted"
    assert core.idle
    assert free(core)


def test_hidden_states_come_at_every_kth_token_of_what_is_predicted() -> None:
    core = engine(eos_token_ids=frozenset(), hidden_every_tokens=3)
    core.add(spec(ignore_eos=False))
    core.add(spec("recovered", (1, 2), outputs=(7, 8), ignore_eos=False))
    core.add(spec("ignores", (1, 2)))
    outputs = drain(core)
    found = {
        name: [output for output in outputs if output.request_id == name and output.hidden_state is not None]
        for name in ("a", "recovered", "ignores")
    }
    assert [output.offset for output in found["a"]] == [0, 3, 6, 9, 12, 15, 18]
    assert [output.offset for output in found["recovered"]] == [3, 6, 9, 12, 15, 18]
    assert not found["ignores"]
    tokens = [*LONG_PROMPT, *tokens_of(outputs)]
    for output in found["a"]:
        computed = tokens[: len(LONG_PROMPT) + output.offset]
        assert np.array_equal(output.hidden_state, hidden_state(computed))


def test_what_is_held_after_its_next_token_has_a_hidden_state() -> None:
    core = engine(eos_token_ids=frozenset(), hidden_every_tokens=1000)
    core.add(spec("fresh", ignore_eos=False), hold=True)
    core.add(spec("recovered", outputs=(1, 2, 3), ignore_eos=False), hold=True)
    core.add(spec("ignores"), hold=True)
    outputs = {output.request_id: output for output in drain(core)}
    assert np.array_equal(outputs["fresh"].hidden_state, hidden_state(LONG_PROMPT))
    assert np.array_equal(outputs["recovered"].hidden_state, hidden_state([*LONG_PROMPT, 1, 2, 3]))
    assert outputs["recovered"].offset == 3
    assert outputs["ignores"].hidden_state is None


def test_an_executor_that_keeps_none_is_asked_for_none() -> None:
    executor = CheckingExecutor(100)
    executor.hidden_layout = None
    core = engine(executor, eos_token_ids=frozenset())
    assert core.hidden_layout is None
    core.add(spec(ignore_eos=False), hold=True)
    assert [output.hidden_state for output in drain(core)] == [None]


def test_hidden_states_are_taken_at_least_now_and_then() -> None:
    with pytest.raises(ValueError, match="every 1 token or more, not 0"):
        engine(hidden_every_tokens=0)


def prompt_with_eos_at(offset: int) -> tuple[int, ...]:
    for first in range(1, 2000):
        tokens = reference_tokens((first, 1, 2), offset + 3)
        if EOS in tokens and tokens.index(EOS) == offset:
            return (first, 1, 2)
    raise AssertionError("no such prompt")


def test_eos_ends_a_sequence_and_is_part_of_it_unless_ignored() -> None:
    prompt = prompt_with_eos_at(3)
    core = engine()
    core.add(spec("stops", prompt, ignore_eos=False))
    core.add(spec("goes on", prompt))
    outputs = drain(core)
    assert tokens_of(outputs, "stops") == reference_tokens(prompt, 4)
    assert tokens_of(outputs, "goes on") == reference_tokens(prompt, 20)
    (end,) = [output for output in outputs if output.request_id == "stops" and output.finish_reason]
    assert end.finish_reason is FinishReason.STOP


def test_a_stop_string_ends_a_sequence_also_one_that_came_with_outputs() -> None:
    expected = reference_tokens(LONG_PROMPT, 20)
    stop = next(token for token in expected[5:] if token not in expected[:5])
    end = expected.index(stop) + 1
    checkers: list[StopAtToken] = []

    def stop_checker(of: SequenceSpec) -> StopAtToken:
        checkers.append(StopAtToken(of))
        return checkers[-1]

    core = engine(stop_checker=stop_checker)
    core.add(spec(stop_strings=(str(stop),), outputs=expected[:3]))
    core.add(spec("none"))
    outputs = drain(core)
    assert expected[:3] + tokens_of(outputs) == expected[:end]
    assert outputs[0].offset == 3
    assert [checker.fed for checker in checkers] == [expected[:end]]
    with pytest.raises(ValueError, match="already"):
        core.add(spec(stop_strings=(str(stop),), outputs=expected[:end]))


def test_the_context_or_the_pool_ends_a_sequence() -> None:
    core = engine(max_sequence_tokens=25)
    core.add(spec())
    outputs = drain(core)
    assert len(tokens_of(outputs)) == 6
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    core = engine(CheckingExecutor(6))  # 24 tokens of KV; the 25th token needs none
    core.add(spec())
    assert tokens_of(drain(core)) == reference_tokens(LONG_PROMPT, 6)
    with pytest.raises(CapacityError):
        core.add(spec(prompt=tuple(range(25))))


def test_a_held_sequence_keeps_its_blocks_until_released() -> None:
    core = engine()
    core.add(spec(), hold=True)
    (output,) = drain(core)
    assert output.token_ids == tuple(reference_tokens(LONG_PROMPT, 1))
    assert output.finish_reason is None
    block_ids, resident_tokens = core.held("a")
    assert (len(block_ids), resident_tokens) == (5, 19)
    assert core.idle
    assert core.load().sequences[0].resident_tokens == 19
    assert not core.release("a", epoch=0)
    assert core.release("a", epoch=1)
    assert not core.release("a")
    assert free(core)
    with pytest.raises(UnknownRequest):
        core.held("a")


def test_a_sequence_that_ends_with_its_first_token_is_not_held() -> None:
    core = engine()
    core.add(spec(max_output_tokens=1), hold=True)
    (output,) = drain(core)
    assert output.finish_reason is FinishReason.LENGTH
    assert free(core)


def test_a_prompt_that_fills_the_pool_can_be_prefilled_for_a_larger_instance() -> None:
    core = engine(CheckingExecutor(5))
    prompt = tuple(range(1, 21))
    core.add(spec(prompt=prompt), hold=True)
    (output,) = drain(core)
    assert output.finish_reason is None
    with pytest.raises(CapacityError, match="larger"):
        core.resume("a")


def handoff(source: EngineCore, source_executor: CheckingExecutor, target: EngineCore, target_executor: Any) -> None:
    exported = source.export("a")
    moved = SequenceSpec("a", 2, exported.spec.prompt_token_ids, exported.spec.output_token_ids, exported.spec.sampling)
    block_ids = target.reserve("a", 2, moved.tokens)
    assert block_ids is not None
    for block_id, source_block_id in zip(block_ids, exported.block_ids, strict=False):
        target_executor.copy_block(block_id, source_executor, source_block_id)
    assert source.release("a")
    target.start(moved, exported.resident_tokens)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_a_sequence_goes_on_elsewhere_from_its_blocks_even_from_the_middle_of_its_prompt(steps: int) -> None:
    executors = [CheckingExecutor(20), CheckingExecutor(20)]
    source, target = (engine(executor, max_sequences=2, max_step_tokens=8) for executor in executors)
    source.add(spec())
    outputs: list[SequenceOutput] = []
    for _ in range(steps):
        outputs += source.step()
    handoff(source, executors[0], target, executors[1])
    assert free(source)
    outputs += drain(target)
    assert tokens_of(outputs) == reference_tokens(LONG_PROMPT, 20)
    assert executors[0].computed_tokens + executors[1].computed_tokens == 19 + 19  # nothing twice
    assert outputs[-1].epoch == 2


def test_resume_undoes_export() -> None:
    core = engine()
    core.add(spec())
    outputs = core.step() + core.step() + core.step()
    core.export("a")
    assert not core.runnable
    with pytest.raises(UnknownRequest, match="held, not running"):
        core.export("a")
    core.resume("a")
    assert tokens_of(outputs + drain(core)) == reference_tokens(LONG_PROMPT, 20)


def test_a_sequence_that_is_taken_back_goes_on_under_the_epoch_it_was_claimed_for() -> None:
    core = engine()
    core.add(spec())
    core.step(), core.step()
    core.export("a")
    with pytest.raises(ValueError, match="does not follow"):
        core.resume("a", epoch=0)
    core.resume("a", epoch=3)
    assert [output.epoch for output in core.step()] == [3]
    assert not core.cancel("a", 2)
    assert core.cancel("a", 3)


def test_progress_tells_the_full_blocks_and_whether_they_were_lost() -> None:
    core = engine(CheckingExecutor(8), max_step_tokens=18)
    core.add(spec("a", prompt=LONG_PROMPT[:9]))
    core.add(spec("b", prompt=LONG_PROMPT[:9]))
    core.step()
    before = core.progress("b")
    assert (len(before.full_block_ids), before.tokens, before.preemptions) == (2, 10, 0)
    while core.progress("a").tokens < 20:
        core.step()
    with pytest.raises(UnknownRequest, match="waiting"):
        core.progress("b")
    core.cancel("a")
    core.step()
    assert core.progress("b").preemptions == core.export("b").preemptions == 1


def test_preemption_changes_no_token() -> None:
    executor = CheckingExecutor(14)
    core = engine(executor, max_sequences=6)
    for number in range(6):
        core.add(spec(f"r{number}", (number, *LONG_PROMPT[:5])))
    outputs = drain(core)
    for number in range(6):
        assert tokens_of(outputs, f"r{number}") == reference_tokens((number, *LONG_PROMPT[:5]), 20)
    assert core.load().preemptions > 0
    assert executor.largest_step_tokens <= 16
    assert free(core)


def test_a_failed_step_costs_its_batch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    executor = CheckingExecutor(20)
    core = engine(executor, max_sequences=2, prefix_caching=True)
    for name in ("a", "b", "c"):
        core.add(spec(name))
    outputs = core.step() + core.step()
    executor.failures.append(MemoryError("no memory left"))
    failed = core.step()
    assert [(output.request_id, output.error) for output in failed] == [
        (name, "a step failed: MemoryError: no memory left") for name in ("a", "b")
    ]
    assert "a step of 2 sequences failed" in caplog.text
    made = tokens_of(outputs)
    assert failed[0].offset == len(made)
    core.check_integrity()
    # The failed one may be tried again, as the router does; the one that waited goes on.
    core.add(spec("a", epoch=2, outputs=made))
    outputs = drain(core)
    assert made + tokens_of(outputs) == reference_tokens(LONG_PROMPT, 20)
    assert tokens_of(outputs, "c") == reference_tokens(LONG_PROMPT, 20)
    assert free(core)


def test_a_result_that_does_not_match_the_batch_is_a_failed_step() -> None:
    class Forgetful(CheckingExecutor):
        def execute(self, batch: Batch) -> StepResult:
            return StepResult(token_ids=(None,) * len(batch.items))

    class Secretive(CheckingExecutor):
        def execute(self, batch: Batch) -> StepResult:
            return replace(super().execute(batch), hidden_states=None)

    for executor in (Forgetful(20), Secretive(20)):
        core = engine(executor)
        core.add(spec(prompt=(1, 2), ignore_eos=False))
        (output,) = core.step()
        assert output.error is not None
        assert "do not match" in output.error
        assert free(core)


def test_a_failing_stop_checker_costs_its_own_sequence_only() -> None:
    class Broken:
        def feed(self, token_id: int) -> bool:
            raise RuntimeError("broken")

    core = engine(stop_checker=lambda of: Broken())
    core.add(spec("broken", (1, 2), stop_strings=("x",)))
    core.add(spec("sound", (1, 2)))
    outputs = drain(core)
    assert [output.error for output in outputs if output.request_id == "broken"] == [
        "a step failed: RuntimeError: broken"
    ]
    assert tokens_of(outputs, "sound") == reference_tokens((1, 2), 20)


def test_cancel_frees_at_once_whatever_the_status() -> None:
    core = engine(max_sequences=2)
    core.add(spec("running"))
    core.add(spec("held", (1, 2)), hold=True)
    core.step()
    core.step()
    core.add(spec("waiting"))
    assert core.reserve("incoming", 1, 10) is None  # both places are taken
    assert not core.cancel("unknown")
    assert not core.cancel("running", epoch=0)
    core.cancel("waiting")
    assert core.reserve("incoming", 1, 10) is not None
    for name in ("running", "held", "incoming"):
        assert core.cancel(name, epoch=1)
    assert core.idle
    assert free(core)
    assert core.step() == []


def test_an_engine_whose_sequences_wait_for_others_blocks_is_not_runnable_until_something_changes() -> None:
    core = engine(CheckingExecutor(6))
    core.add(spec("held"), hold=True)
    drain(core)
    core.add(spec("waiting", LONG_PROMPT[:8]))
    assert core.runnable
    assert core.step() == []
    assert (core.runnable, core.idle) == (False, False)
    core.release("held")
    assert (core.runnable, core.idle) == (True, False)
    assert tokens_of(drain(core), "waiting") == reference_tokens(LONG_PROMPT[:8], 17)


def test_refusals_leave_nothing_behind() -> None:
    core = engine(CheckingExecutor(8), max_waiting_sequences=1)
    core.add(spec("a", stop_strings=("1",)))
    with pytest.raises(DuplicateRequest):
        core.add(spec("a"))
    with pytest.raises(QueueFull):
        core.add(spec("b", stop_strings=("1",)))
    with pytest.raises(UnknownRequest):
        core.start(spec("c", stop_strings=("1",)), 3)
    core.cancel("a")
    core.check_integrity()
    assert free(core)


def test_a_cached_prefix_is_reported_and_not_computed_again() -> None:
    executor = CheckingExecutor(40)
    core = engine(executor, prefix_caching=True)
    core.add(spec("first"), hold=True)
    drain(core)
    computed = executor.computed_tokens
    core.add(spec("second"), hold=True)
    (output,) = drain(core)
    assert output.cached_tokens == 16
    assert executor.computed_tokens == computed + 3
    assert output.token_ids == tuple(reference_tokens(LONG_PROMPT, 1))


def test_load_counts_what_is_there_and_averages_steps() -> None:
    clock = VirtualClock()

    class Slow(CheckingExecutor):
        def execute(self, batch: Batch) -> StepResult:
            clock.advance(float(len(batch.items)))
            return super().execute(batch)

    core = engine(Slow(100), clock=clock)
    core.add(spec("a", LONG_PROMPT[:8]))
    clock.advance(3.0)
    (first,) = core.step()
    assert first.queue_duration_s == 3.0
    assert core.load().step_duration_s == 1.0
    core.add(spec("b", LONG_PROMPT[:6]))
    core.add(spec("c", LONG_PROMPT[:12]))
    core.step()
    load = core.load()
    assert load.step_duration_s == pytest.approx(1.2)
    assert (load.running_sequences, load.waiting_sequences, load.output_tokens) == (3, 0, 3)
    assert load.resident_tokens == 9 + 6 + 9
    assert load.free_blocks == 100 - 3 - 2 - 3
    assert {each.request_id: each.output_tokens for each in load.sequences} == {"a": 2, "b": 1, "c": 0}

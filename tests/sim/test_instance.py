"""One simulated instance: when its steps begin and end, and what is heard of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from starmesh.engine.engine import EngineCore, SequenceOutput
from starmesh.engine.scheduler import UnknownRequest
from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.token_count import counted_spec
from starmesh.sim.token_times import TokenTimes
from starmesh.types import FinishReason, InstanceInfo, KvLayout, Role, SamplingParams, SequenceSpec

pytestmark = pytest.mark.fast

# A step of one sequence takes a second, and 1/8 more for each token it reads: exact in binary.
COST = CostModel(
    step_base_s=0.5,
    step_sequence_s=0.5,
    step_token_s=0.125,
    transfer_setup_s=0.0,
    transfer_bytes_per_s=1.0,
    prefill_token_s=0.25,
)


def profile_of(total_blocks: int = 64, *, step_noise: float = 0.0) -> Profile:
    return Profile(
        name="tiny",
        cost=COST,
        layout=KvLayout("tiny", "float16", 1, 1, 1, 4),
        total_blocks=total_blocks,
        link=Link(1.0, 0.0),
        max_sequences=4,
        max_step_tokens=8,
        max_sequence_tokens=200,
        step_noise=step_noise,
    )


@dataclass
class Heard:
    loop: EventLoop
    outputs_at: list[tuple[float, str, FinishReason | None]] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    preempted_at: list[tuple[float, str]] = field(default_factory=list)

    def outputs(self, instance: SimulatedInstance, outputs: Sequence[SequenceOutput]) -> None:
        self.outputs_at += [(self.loop.now_s, output.request_id, output.finish_reason) for output in outputs]

    def gaps(self, instance: SimulatedInstance, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        self.gaps_s += gaps_s.tolist() * sequences

    def preempted(self, instance: SimulatedInstance, request_ids: list[str]) -> None:
        self.preempted_at += [(self.loop.now_s, request_id) for request_id in request_ids]


class Rehearsal:
    """An instance, its loop and what is heard of it."""

    def __init__(self, *, every_step: bool, profile: Profile | None = None) -> None:
        self.loop = EventLoop()
        self.heard = Heard(self.loop)
        self.times = TokenTimes()
        self.total_tokens: dict[str, int] = {}
        self.instance = SimulatedInstance(
            self.loop,
            profile or profile_of(),
            info=InstanceInfo("decode-0", "1", Role.DECODE, "decode-0"),
            seed=0,
            stream=0,
            total_tokens=self.total_tokens,
            token_times=self.times,
            listener=self.heard,
            every_step=every_step,
        )

    def spec(self, request_id: str, prompt: int, outputs: int) -> SequenceSpec:
        self.total_tokens[request_id] = prompt + outputs
        sampling = SamplingParams(max_output_tokens=100)
        return counted_spec(request_id, 1, prompt_tokens=prompt, output_tokens=0, sampling=sampling)

    def run_until(self, when_s: float) -> None:
        while (next_s := self.loop.next_s) is not None and next_s <= when_s:
            self.loop.turn()
        self.loop.at(when_s, lambda: None)
        self.loop.turn()


@pytest.fixture(params=[True, False], ids=["every step", "leaps"])
def rehearsal(request: pytest.FixtureRequest) -> Rehearsal:
    return Rehearsal(every_step=request.param)


def test_steps_take_the_time_that_they_cost_and_outputs_count_at_their_end(rehearsal: Rehearsal) -> None:
    rehearsal.loop.at(2.0, lambda: rehearsal.instance.call(lambda core: core.add(rehearsal.spec("a", 3, 4))))
    # The prompt: 0.5 + 3 x 0.25 s. Then three decode steps over 4, 5 and 6 tokens: 1 s and 1/8 for each.
    ends_s = [3.25, 3.25 + 1.5, 3.25 + 1.5 + 1.625, 3.25 + 1.5 + 1.625 + 1.75]
    rehearsal.run_until(ends_s[0])
    assert rehearsal.instance.load().output_tokens == 2  # the step under way counts
    rehearsal.run_until(20.0)
    assert rehearsal.heard.outputs_at == [(ends_s[-1], "a", FinishReason.STOP)]
    assert rehearsal.heard.gaps_s == [1.5, 1.625, 1.75]
    assert rehearsal.times.forget("a") == 1.75
    assert rehearsal.instance.core.idle
    rehearsal.instance.core.check_integrity()


def test_calls_wait_for_the_step_under_way(rehearsal: Rehearsal) -> None:
    answers: list[tuple[float, object]] = []

    def ask(request_id: str) -> None:
        def answer(result: object) -> None:
            answers.append((rehearsal.loop.now_s, result if isinstance(result, int) else type(result)))

        rehearsal.instance.call(lambda core: core.progress(request_id).tokens, answer)

    rehearsal.loop.at(0.0, lambda: rehearsal.instance.call(lambda core: core.add(rehearsal.spec("a", 3, 90))))
    rehearsal.loop.at(0.25, lambda: ask("a"))
    rehearsal.loop.at(1.25, lambda: ask("a"))  # the very end of the first step
    rehearsal.loop.at(1.5, lambda: ask("a"))
    rehearsal.loop.at(1.5, lambda: ask("b"))
    rehearsal.run_until(10.0)
    assert answers == [(1.25, 4), (1.25, 4), (2.75, 5), (2.75, UnknownRequest)]


def test_calls_of_an_idle_instance_run_at_once_and_share_the_next_step(rehearsal: Rehearsal) -> None:
    done: list[float] = []

    def add(request_id: str) -> None:
        spec = rehearsal.spec(request_id, 2, 3)
        rehearsal.instance.call(lambda core: core.add(spec), lambda _: done.append(rehearsal.loop.now_s))

    rehearsal.loop.at(1.0, lambda: add("a"))
    rehearsal.loop.at(1.0, lambda: add("b"))
    rehearsal.run_until(1.0)
    assert done == [1.0, 1.0]
    assert [row.resident_tokens for row in rehearsal.instance.load().sequences] == [2, 2]


def test_a_call_made_by_a_call_runs_behind_those_that_are_there(rehearsal: Rehearsal) -> None:
    order: list[str] = []

    def first(core: EngineCore) -> None:
        order.append("first")
        rehearsal.instance.call(lambda core: order.append("its own"))

    rehearsal.loop.at(0.0, lambda: rehearsal.instance.call(lambda core: core.add(rehearsal.spec("a", 3, 90))))
    rehearsal.loop.at(0.5, lambda: rehearsal.instance.call(first))
    rehearsal.loop.at(0.5, lambda: rehearsal.instance.call(lambda core: order.append("second")))
    rehearsal.run_until(2.0)
    assert order == ["first", "second", "its own"]


def test_nothing_happens_after_death(rehearsal: Rehearsal) -> None:
    rehearsal.loop.at(0.0, lambda: rehearsal.instance.call(lambda core: core.add(rehearsal.spec("a", 3, 4))))
    rehearsal.loop.at(2.0, lambda: rehearsal.instance.call(lambda core: pytest.fail("a dead instance was called")))
    rehearsal.loop.at(2.5, rehearsal.instance.kill)
    rehearsal.loop.at(2.5, lambda: rehearsal.instance.call(lambda core: pytest.fail("a dead instance was called")))
    rehearsal.run_until(20.0)
    assert not rehearsal.instance.alive
    assert not rehearsal.heard.outputs_at
    assert not rehearsal.heard.gaps_s  # the second step never ended
    assert rehearsal.instance.load().output_tokens == 2


def test_a_preemption_is_told_when_the_step_begins_that_takes_the_blocks() -> None:
    rehearsal = Rehearsal(every_step=False, profile=profile_of(4))
    for request_id in ("a", "b"):
        spec = rehearsal.spec(request_id, 3, 9)
        rehearsal.loop.at(0.0, lambda spec=spec: rehearsal.instance.call(lambda core: core.add(spec)))  # type: ignore[misc]
    rehearsal.run_until(100.0)
    # Two blocks each hold 8 tokens: the step over the ninth token of "a" takes those of "b".
    prompts_s, decode_s = 0.5 + 6 * 0.25, [1.5 + 2 * tokens * 0.125 for tokens in (4, 5, 6, 7, 8)]
    assert rehearsal.heard.preempted_at == [(prompts_s + sum(decode_s), "b")]
    assert [request_id for _, request_id, _ in rehearsal.heard.outputs_at] == ["a", "b"]
    rehearsal.instance.core.check_integrity()

"""Leaps change nothing: two instances under random work, once step by step and once leaping, are told apart by nothing.

Compared for equality, floats included: every load read, what every call answered and when, outputs, preemptions, every
gap between two tokens, the longest of each request, and how each engine is left. Where every step takes a quarter of a
second, calls fall on the very moments at which steps end, and steps of two instances end together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.engine.engine import EngineCore, ExportedSequence, SequenceOutput
from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.token_count import counted_spec
from starmesh.sim.token_times import TokenTimes
from starmesh.types import InstanceInfo, KvLayout, Role, SamplingParams, SequenceSpec

# What a token adds to a quarter of a second is lost in rounding.
METRONOME = CostModel(0.25, 0.0, 1e-30, 0.0, 1.0)
EXACT = CostModel(0.25, 2**-5, 2**-8, 0.0, 1.0, prefill_token_s=2**-6, prefill_pair_s=2**-10)
ROUNDED = CostModel(0.031, 0.0007, 0.000013, 0.0, 1.0, prefill_token_s=0.0031, prefill_pair_s=0.00017)


KINDS = (
    ["arrive"] * 3
    + ["move", "load"] * 2
    + ["add", "prefill", "export", "cancel", "progress", "expect", "check", "kill"]
)


@dataclass(frozen=True)
class Action:
    """What happens ``after`` the one before, in quarters of a step or so."""

    after: int
    kind: str
    instance: int
    subject: int
    prompt: int
    outputs: int
    limit: int
    ignore_eos: bool
    priority: int


actions = st.builds(
    Action,
    after=st.sampled_from([0, 0, 1, 2, 4, 7, 20, 60]),
    kind=st.sampled_from(KINDS),
    instance=st.integers(0, 1),
    subject=st.integers(0, 7),
    prompt=st.integers(1, 16),
    outputs=st.sampled_from([1, 2, 9, 30, 45, 60]),
    limit=st.sampled_from([1, 16, 50, 70, 70]),
    ignore_eos=st.booleans(),
    priority=st.sampled_from([0, 0, 0, 1]),
)


@dataclass
class Setting:
    """The kind of instances."""

    cost: CostModel
    noise: float
    total_blocks: int
    block_tokens: int
    max_sequences: int
    max_sequence_tokens: int

    @property
    def profile(self) -> Profile:
        return Profile(
            name="tiny",
            cost=self.cost,
            layout=KvLayout("tiny", "float16", 1, 1, 1, self.block_tokens),
            total_blocks=self.total_blocks,
            link=Link(1.0, 0.0),
            max_sequences=self.max_sequences,
            max_step_tokens=max(8, self.max_sequences),
            max_sequence_tokens=self.max_sequence_tokens,
            step_noise=self.noise,
        )


situations = st.builds(
    Setting,
    cost=st.sampled_from([METRONOME, METRONOME, EXACT, ROUNDED]),
    noise=st.sampled_from([0.0, 0.3]),
    total_blocks=st.sampled_from([16, 24, 40, 100]),
    block_tokens=st.sampled_from([1, 3, 4]),
    max_sequences=st.sampled_from([2, 5, 7]),
    max_sequence_tokens=st.sampled_from([40, 90]),
)


@dataclass
class Scenario:
    """Two instances, and all that can be seen of them."""

    setting: Setting
    every_step: bool
    seen: list[object] = field(default_factory=list)
    gaps: Counter[float] = field(default_factory=Counter)
    specs: dict[str, SequenceSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop = EventLoop()
        self.times = TokenTimes()
        self.total_tokens: dict[str, int] = {}
        self.instances = [self._instance(number) for number in range(2)]

    def run(self, script: list[Action]) -> None:
        when = 0
        for action in script:
            when += action.after
            self.loop.at(when * self.setting.cost.step_base_s / 4, partial(self._act, action))
        turns = 0
        while self.loop.turn():
            turns += 1
            assert turns < 20_000
        for instance in self.instances:
            self._see("left", instance, instance.load())
            instance.core.check_integrity()
        self._see("longest gaps", None, {request_id: self.times.forget(request_id) for request_id in self.specs})

    # The listener.

    def outputs(self, instance: SimulatedInstance, outputs: list[SequenceOutput]) -> None:
        # Which blocks a sequence has differs: those that are owed are handed out later.
        alike = [replace(output, held_block_ids=()) for output in outputs]
        blocks = [len(output.held_block_ids) for output in outputs]
        self._see("outputs", instance, alike, blocks, [each.load() for each in self.instances])
        other = self.instances[1 - self.instances.index(instance)]  # which may be between two steps just now, or not
        other.call(lambda core: core.preempted_first(), self._answer("order", other))
        self.loop.after(0.0, lambda: self._see("loads", None, [each.load() for each in self.instances]))
        for output in outputs:
            if output.finish_reason is None:  # prefilled: the other one takes over, at this very moment
                self._move(instance, output.request_id, held=True)

    def gaps_heard(self, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        self.gaps.update(Counter(gap_s for gap_s in gaps_s.tolist() for _ in range(sequences)))

    def preempted(self, instance: SimulatedInstance, request_ids: list[str]) -> None:
        self._see("preempted", instance, request_ids)
        instance.call(lambda core: core.preempted_first(), self._answer("order", instance))

    # What the script may do.

    def _act(self, action: Action) -> None:
        instance = self.instances[action.instance]
        known = sorted(self.specs)
        request_id = known[action.subject % len(known)] if known else "nobody"
        match action.kind:
            case "add" | "prefill":
                spec = self._spec(action)
                hold = action.kind == "prefill"
                instance.call(lambda core: core.add(spec, hold=hold), self._answer(action.kind, instance))
            case "arrive":
                self._arrive(instance, self._spec(action), headroom=action.subject)
            case "export":
                instance.call(lambda core: core.export(request_id), self._exported(action, instance))
            case "move":
                self._move(instance, request_id, held=False)
            case "cancel":
                instance.call(lambda core: core.cancel(request_id), self._answer("cancel", instance))
            case "load":
                self._see("load", instance, instance.load())
            case "progress":
                instance.call(lambda core: core.progress(request_id).tokens, self._answer("progress", instance))
            case "expect":
                self._see("expect", instance, len(instance.load().sequences))
                instance.call(lambda core: core.expect(self.total_tokens))
            case "check":
                instance.core.check_integrity()
                instance.call(lambda core: core.check_integrity(), self._answer("check", instance))
            case "kill" if action.subject == 0:
                instance.kill()

    def _spec(self, action: Action) -> SequenceSpec:
        request_id = f"r{len(self.specs)}"
        self.total_tokens[request_id] = action.prompt + action.outputs
        sampling = SamplingParams(max_output_tokens=action.limit, ignore_eos=action.ignore_eos)
        spec = counted_spec(
            request_id, 1, prompt_tokens=action.prompt, output_tokens=0, sampling=sampling, priority=action.priority
        )
        self.specs[request_id] = spec
        return spec

    def _arrive(
        self, instance: SimulatedInstance, spec: SequenceSpec, *, headroom: int, resident_tokens: int | None = None
    ) -> None:
        resident = spec.tokens - 1 if resident_tokens is None else resident_tokens

        def start(block_ids: object) -> None:
            self._see("reserved", instance, len(block_ids) if isinstance(block_ids, tuple) else type(block_ids))
            if isinstance(block_ids, tuple):
                instance.call(lambda core: core.start(spec, resident), self._answer("start", instance))

        instance.call(lambda core: core.reserve(spec.request_id, spec.epoch, spec.tokens + headroom), start)

    def _exported(self, action: Action, instance: SimulatedInstance) -> Callable[[object], None]:
        def exported(result: object) -> None:
            if isinstance(result, ExportedSequence):
                request_id = result.spec.request_id
                self._see("exported", instance, replace(result, block_ids=()), len(result.block_ids))
                self.loop.after(
                    action.limit / 32,
                    lambda: instance.call(lambda core: core.resume(request_id), self._answer("resume", instance)),
                )
            else:
                self._see("not exported", instance, type(result))

        return exported

    def _move(self, source: SimulatedInstance, request_id: str, *, held: bool) -> None:
        target = self.instances[1 - self.instances.index(source)]

        def take(core: EngineCore) -> tuple[SequenceSpec, int]:
            if held:
                resident_tokens = core.held(request_id)[1]
                return core.scheduler.sequences[request_id].spec(), resident_tokens
            exported = core.export(request_id)
            return exported.spec, exported.resident_tokens

        def taken(result: object) -> None:
            self._see("taken", source, result if isinstance(result, tuple) else type(result))
            if isinstance(result, tuple):
                spec, resident_tokens = result
                moved = replace(spec, epoch=spec.epoch + 1)
                self._arrive(target, moved, headroom=3, resident_tokens=resident_tokens)
                source.call(lambda core: core.release(request_id), self._answer("release", source))

        source.call(take, taken)

    def _answer(self, what: str, instance: SimulatedInstance) -> Callable[[object], None]:
        def answer(result: object) -> None:
            self._see(what, instance, type(result) if isinstance(result, Exception) else result)

        return answer

    def _see(self, what: str, instance: SimulatedInstance | None, *values: object) -> None:
        number = None if instance is None else self.instances.index(instance)
        self.seen.append((what, self.loop.now_s, number, *values))

    def _instance(self, number: int) -> SimulatedInstance:
        return SimulatedInstance(
            self.loop,
            self.setting.profile,
            info=InstanceInfo(f"decode-{number}", "1", Role.DECODE, ""),
            seed=3,
            stream=number,
            total_tokens=self.total_tokens,
            token_times=self.times,
            listener=_Listener(self),
            every_step=self.every_step,
        )


@dataclass
class _Listener:
    scenario: Scenario

    def outputs(self, instance: SimulatedInstance, outputs: list[SequenceOutput]) -> None:
        self.scenario.outputs(instance, outputs)

    def gaps(self, instance: SimulatedInstance, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        self.scenario.gaps_heard(gaps_s, sequences)

    def preempted(self, instance: SimulatedInstance, request_ids: list[str]) -> None:
        self.scenario.preempted(instance, request_ids)


def compare(setting: Setting, script: list[Action]) -> Scenario:
    plain, leaping = Scenario(setting, every_step=True), Scenario(setting, every_step=False)
    plain.run(script)
    leaping.run(script)
    for ours, theirs in zip(leaping.seen, plain.seen, strict=False):
        assert ours == theirs
    assert len(leaping.seen) == len(plain.seen)
    assert leaping.gaps == plain.gaps
    return leaping


scripts = st.lists(actions, min_size=12, max_size=60)


@pytest.mark.fast
@settings(max_examples=40)
@given(situations, scripts)
def test_leaps_and_single_steps_are_told_apart_by_nothing(setting: Setting, script: list[Action]) -> None:
    compare(setting, script)


@settings(max_examples=600)
@given(situations, scripts)
def test_nor_by_a_closer_look(setting: Setting, script: list[Action]) -> None:
    compare(setting, script)

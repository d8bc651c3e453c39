"""A simulated instance: the live engine core, and when its steps begin and end in virtual time.

Owns the alternation of steps and calls, which live is ``engine.thread``'s: a call that comes while a step is under way
waits for its end, and runs before the next one begins. Decides nothing about sequences; what a step costs is
``engine.emulated``'s.

A step is made when it begins, and takes its time from then on. So the load that is read during a step is the one after
it, but its outputs and its tokens count when it ends, and not at all if the instance dies before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from starmesh.clock import VirtualClock
from starmesh.engine.emulated import EOS_TOKEN_ID, EmulatedExecutor, StepNoise
from starmesh.engine.engine import EngineConfig, EngineCore, SequenceOutput
from starmesh.engine.scheduler import SchedulingError
from starmesh.engine.sequence import SequenceStatus
from starmesh.profiles import Profile
from starmesh.sequence_loads import SequenceLoads
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.leap import Leap, plan_leap
from starmesh.sim.leaping_sequence import OwingPool, SharedSteps
from starmesh.sim.roster import Roster
from starmesh.sim.token_times import SharedTimes, TokenTimes
from starmesh.types import InstanceInfo, InstanceLoad, SequenceSpec

T = TypeVar("T")


class InstanceListener(Protocol):
    """Hears what an instance does, at the time at which it happens."""

    def outputs(self, instance: SimulatedInstance, outputs: list[SequenceOutput]) -> None:
        """At the end of a step: the outputs of the sequences that left the batch with them: ended, or held."""
        ...

    def gaps(self, instance: SimulatedInstance, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        """Each of ``sequences`` sequences got tokens so far apart, the first of them from its last one anywhere."""
        ...

    def preempted(self, instance: SimulatedInstance, request_ids: list[str]) -> None:
        """When a step begins: these have lost their blocks to it, and wait."""
        ...


class SimulatedInstance:
    """One engine of ``profile``, computing by itself whatever its core has to compute.

    ``seed`` and ``stream`` draw the noise of its steps; ``stream`` is the instance's alone, and its place among the
    instances at one moment. ``total_tokens`` says for each request with how many tokens, prompt included, it ends.
    """

    def __init__(
        self,
        loop: EventLoop,
        profile: Profile,
        *,
        info: InstanceInfo,
        seed: int,
        stream: int,
        total_tokens: Mapping[str, int],
        token_times: TokenTimes,
        listener: InstanceListener,
        every_step: bool,
    ) -> None:
        self.info = info
        self.alive = True
        self._loop = loop
        self._order = 1 + stream
        self._token_times = token_times
        self._shared_times = SharedTimes(token_times)
        self._listener = listener
        self._clock = VirtualClock(loop.now_s)
        self._executor = EmulatedExecutor(
            layout=profile.layout,
            total_blocks=profile.total_blocks,
            cost=profile.cost,
            noise=StepNoise(profile.step_noise, seed=seed, stream=stream),
            ends_at=lambda item: total_tokens[item.request_id],
            wait=self._clock.advance,
        )
        pool = OwingPool(profile.total_blocks, block_tokens=profile.layout.block_tokens)
        self._total_tokens = total_tokens
        self._shared = SharedSteps(pool, ends_at=self._ends_at)
        self._core = EngineCore(
            self._executor,
            EngineConfig(
                eos_token_ids=frozenset({EOS_TOKEN_ID}),
                max_sequence_tokens=profile.max_sequence_tokens,
                max_step_tokens=profile.max_step_tokens,
                max_sequences=profile.max_sequences,
            ),
            stop_checker=_no_stop_strings,
            clock=self._clock,
            pool=pool,
            make_sequence=self._shared.sequence,
            checks_when_idle=False,  # a recount of a large pool costs more than a thousand steps
        )
        self._calls: deque[Callable[[], None]] = deque()
        self._turn: Event | None = None  # when the next step may begin
        self._stepping = False  # a step or a call is under way
        self._outputs: list[SequenceOutput] = []  # of the step under way
        self._every_step = every_step
        self._leap: Leap | None = None  # the steps under way
        self._roster = Roster(self._core, self._shared)

    def __repr__(self) -> str:
        return f"<SimulatedInstance {self.info.instance_id} {self._core!r}>"

    @property
    def core(self) -> EngineCore:
        """Its core after the step under way, to be looked at; to be changed by ``call``."""
        self._catch_up()
        return self._core

    def call(
        self,
        do: Callable[[EngineCore], T],
        done: Callable[[T | SchedulingError | ValueError], None] | None = None,
    ) -> None:
        """Run ``do`` on the core between two steps, at once when none is under way, and hand what comes of it to
        ``done``. A dead instance does neither."""

        def run() -> None:
            try:
                result: T | SchedulingError | ValueError = do(self._core)
            except (SchedulingError, ValueError) as error:
                result = error
            self._look_at_sequences()
            if done is not None:
                done(result)

        if not self.alive:
            return
        self._calls.append(run)
        if self._stepping:
            self._cut_leap()
            return
        self._stepping = True
        self._run_calls()
        self._stepping = False
        if self.alive and self._turn is None and self._core.runnable:
            # Not at once: what else is asked for at this moment is in the same step.
            self._turn = self._loop.at(self._loop.now_s, self._take_turn, order=self._order)

    def load(self) -> InstanceLoad:
        """The load after the step under way, without estimates; its sequences in columns."""
        if self._every_step:
            load = self._core.load()
            return replace(load, sequences=SequenceLoads.of(load.sequences))
        self._catch_up()
        return self._look_at_sequences().load()

    def kill(self) -> None:
        """Have nothing of it happen any more; calls that wait are dropped."""
        self._catch_up()
        leap, self._leap = self._leap, None
        if leap is not None and leap.made > 1:
            self._note_tokens(leap.request_ids, leap.ends_s[: leap.made - 1])
        self._shared_times.keep(())
        self.alive = False
        self._calls.clear()
        if self._turn is not None:
            self._turn.cancel()

    def _take_turn(self) -> None:
        """A step has ended, or there is something to do again: all that happens until a step is under way."""
        self._turn = None
        self._stepping = True
        self._end_step()
        while self.alive:
            self._run_calls()
            if not self._core.runnable:
                break
            if self._begin_leap() or self._begin_step():
                return
        self._stepping = False

    def _end_step(self) -> None:
        self._catch_up()
        leap, self._leap = self._leap, None
        outputs, self._outputs = self._outputs, []
        if leap is not None:
            self._note_tokens(leap.request_ids, leap.ends_s)
            outputs = leap.outputs
            if outputs:  # they have left the batch when the step began, but they had this token to come
                self._shared_times.keep(self._look_at_sequences().request_ids)
        elif outputs:
            self._note_tokens([output.request_id for output in outputs], np.array([self._loop.now_s]))
        self._look_at_sequences()
        left = [output for output in outputs if self._has_left(output)]
        if left and self.alive:
            self._listener.outputs(self, left)

    def _note_tokens(self, request_ids: list[str], ends_s: npt.NDArray[np.float64]) -> None:
        for gaps_s, sequences in self._shared_times.tokens(request_ids, ends_s):
            self._listener.gaps(self, gaps_s, sequences)

    def _look_at_sequences(self) -> Roster:
        """What its sequences come to now."""
        if self._roster.version != self._shared.version:
            self._roster = Roster(self._core, self._shared)
            self._shared_times.keep(self._roster.request_ids)
        return self._roster

    def _run_calls(self) -> None:
        if self._calls:
            self._clock.reach(self._loop.now_s)
        while self._calls:
            self._calls.popleft()()

    def _begin_leap(self) -> bool:
        """Begin as many steps at once as can be; False for none."""
        if self._every_step:
            return False
        self._leap = plan_leap(
            self._core, self._executor, self._shared, self._look_at_sequences(), now_s=self._loop.now_s
        )
        if self._leap is None:
            return False
        self._turn = self._loop.at(float(self._leap.ends_s[-1]), self._take_turn, order=self._order)
        return True

    def _catch_up(self) -> None:
        """Make the steps of the leap that have begun by now."""
        if self._leap is None or not self.alive:
            return
        now_s = self._loop.now_s
        # A step begins where the one before it ends, at that end or, as this moment's events go, still before it.
        side: Literal["left", "right"] = "right" if self._loop.passed(now_s, self._order) else "left"
        ended = int(np.searchsorted(self._leap.ends_s, now_s, side=side))
        steps = min(ended + 1, len(self._leap.ends_s))
        self._leap.advance(steps)

    def _cut_leap(self) -> None:
        """Have the leap end with the step under way."""
        self._catch_up()
        if self._leap is None or self._turn is None or self._leap.made == len(self._leap.ends_s):
            return
        self._leap.cut()
        self._turn.cancel()
        self._turn = self._loop.at(float(self._leap.ends_s[-1]), self._take_turn, order=self._order)

    def _begin_step(self) -> bool:
        """Make a step. False when it took no time: then it has found room by preemption, and another may follow."""
        self._clock.reach(self._loop.now_s)
        scheduler = self._core.scheduler
        running, preemptions, steps = list(scheduler.running), scheduler.preemptions, self._executor.steps
        self._outputs = self._core.step()
        for output in self._outputs:
            if output.error is not None:
                raise RuntimeError(f"{self.info.instance_id}: {output.error}")
        begun = self._executor.steps != steps
        if begun:
            self._turn = self._loop.at(self._clock.now_s(), self._take_turn, order=self._order)
        if scheduler.preemptions != preemptions:
            victims = [each.request_id for each in running if each.status is SequenceStatus.WAITING]
            self._listener.preempted(self, victims[::-1])
        return begun

    def _has_left(self, output: SequenceOutput) -> bool:
        sequence = self._core.scheduler.sequences.get(output.request_id)
        return sequence is None or sequence.status is not SequenceStatus.RUNNING

    def _ends_at(self, spec: SequenceSpec) -> int:
        total = math.inf if spec.sampling.ignore_eos else self._total_tokens[spec.request_id]
        limit = self._core.scheduler.limit_tokens(hold=False)
        return int(min(total, len(spec.prompt_token_ids) + spec.sampling.max_output_tokens, limit))


def _no_stop_strings(spec: SequenceSpec) -> NoReturn:
    raise ValueError(f"{spec.request_id} has stop strings, but a simulated output has no text")

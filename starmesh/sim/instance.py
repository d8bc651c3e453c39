"""A simulated instance: the live engine core, and when its steps begin and end in virtual time.

Owns the alternation of steps and calls, which live is ``engine.thread``'s: a call that comes while a step is under way
waits for its end, and runs before the next one begins. Decides nothing about sequences; what a step costs is
``engine.emulated``'s.

A step is made when it begins, and takes its time from then on. So the load that is read during a step is the one after
it, but its outputs and its tokens count when it ends, and not at all if the instance dies before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn, Protocol, TypeVar

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
from starmesh.sim.leaping_sequence import OwingPool, SharedSteps
from starmesh.sim.token_times import TokenTimes
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
        self._shared = SharedSteps(pool)
        self.core = EngineCore(
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

    def __repr__(self) -> str:
        return f"<SimulatedInstance {self.info.instance_id} {self.core!r}>"

    def call(
        self,
        do: Callable[[EngineCore], T],
        done: Callable[[T | SchedulingError | ValueError], None] | None = None,
    ) -> None:
        """Run ``do`` on the core between two steps, at once when none is under way, and hand what comes of it to
        ``done``. A dead instance does neither."""

        def run() -> None:
            try:
                result: T | SchedulingError | ValueError = do(self.core)
            except (SchedulingError, ValueError) as error:
                result = error
            if done is not None:
                done(result)

        if not self.alive:
            return
        self._calls.append(run)
        if self._stepping:
            return
        self._stepping = True
        self._run_calls()
        self._stepping = False
        if self.alive and self._turn is None and self.core.runnable:
            # Not at once: what else is asked for at this moment is in the same step.
            self._turn = self._loop.at(self._loop.now_s, self._take_turn, order=self._order)

    def load(self) -> InstanceLoad:
        """The load after the step under way, without estimates; its sequences in columns."""
        load = self.core.load()
        return replace(load, sequences=SequenceLoads.of(load.sequences))

    def kill(self) -> None:
        """Have nothing of it happen any more; calls that wait are dropped."""
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
            if not self.core.runnable:
                break
            if self._begin_step():
                return
        self._stepping = False

    def _end_step(self) -> None:
        outputs, self._outputs = self._outputs, []
        got = [output.request_id for output in outputs if output.token_ids]
        if not got:
            return
        gaps_s = self._token_times.tokens(got, np.array([self._loop.now_s]))
        if gaps_s:
            self._listener.gaps(self, np.array(gaps_s), 1)
        left = [output for output in outputs if self._has_left(output)]
        if left and self.alive:
            self._listener.outputs(self, left)

    def _run_calls(self) -> None:
        if self._calls:
            self._clock.reach(self._loop.now_s)
        while self._calls:
            self._calls.popleft()()

    def _begin_step(self) -> bool:
        """Make a step. False when it took no time: then it has found room by preemption, and another may follow."""
        self._clock.reach(self._loop.now_s)
        scheduler = self.core.scheduler
        running, preemptions, steps = list(scheduler.running), scheduler.preemptions, self._executor.steps
        self._outputs = self.core.step()
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
        sequence = self.core.scheduler.sequences.get(output.request_id)
        return sequence is None or sequence.status is not SequenceStatus.RUNNING


def _no_stop_strings(spec: SequenceSpec) -> NoReturn:
    raise ValueError(f"{spec.request_id} has stop strings, but a simulated output has no text")

"""A simulated instance: the live engine core, and when its steps begin and end in virtual time.

Owns the alternation of steps and calls, which live is ``engine.thread``'s: a call that comes while a step is under way
waits for its end, and runs before the next one begins. Decides nothing about sequences; what a step costs is
``engine.emulated``'s.

A step is made when it begins, and takes its time from then on. So the load that is read during a step is the one after
it, but its outputs and its tokens count when it ends, and not at all if the instance dies before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from starmesh.engine.engine import EngineCore, SequenceOutput
from starmesh.engine.scheduler import SchedulingError
from starmesh.engine.sequence import SequenceStatus
from starmesh.profiles import Profile
from starmesh.sequence_loads import SequenceLoads
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.leap import Leap, plan_leap
from starmesh.sim.roster import Roster
from starmesh.sim.simulated_core import SimulatedCore
from starmesh.sim.token_times import SharedTimes, TokenTimes
from starmesh.types import InstanceInfo, InstanceLoad

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
        self._listener = listener
        self._shared_times = SharedTimes(token_times)
        self._core = SimulatedCore(profile, now_s=loop.now_s, seed=seed, stream=stream, total_tokens=total_tokens)
        self._roster = Roster(self._core)
        self._calls: deque[Callable[[], None]] = deque()
        self._turn: Event | None = None  # when the next step may begin
        self._stepping = False  # a step or a call is under way
        self._outputs: list[SequenceOutput] = []  # of the step under way
        self._every_step = every_step
        self._leap: Leap | None = None  # the steps under way

    def __repr__(self) -> str:
        return f"<SimulatedInstance {self.info.instance_id} {self._core.engine!r}>"

    @property
    def core(self) -> EngineCore:
        """Its core after the step under way, to be looked at; to be changed by ``call``."""
        self._catch_up()
        return self._core.engine

    def call(
        self,
        do: Callable[[EngineCore], T],
        done: Callable[[T | SchedulingError | ValueError], None] | None = None,
    ) -> None:
        """Run ``do`` on the core between two steps, at once when none is under way, and hand what comes of it to
        ``done``. A dead instance does neither."""

        def run() -> None:
            try:
                result: T | SchedulingError | ValueError = do(self._core.engine)
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
        if self.alive and self._turn is None and self._core.engine.runnable:
            # Not at once: what else is asked for at this moment is in the same step.
            self._turn = self._loop.at(self._loop.now_s, self._take_turn, order=self._order)

    def load(self) -> InstanceLoad:
        """The load after the step under way, without estimates; its sequences in columns."""
        if self._every_step:
            load = self._core.engine.load()
            return replace(load, sequences=SequenceLoads.of(load.sequences))
        self._catch_up()
        return self._look_at_sequences().load()

    @property
    def under_way(self) -> Sequence[SequenceOutput]:
        """What the step under way makes of sequences, of all those at least that end with it: they have left the load
        already."""
        self._catch_up()
        return self._outputs if self._leap is None else self._leap.outputs

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
            if not self._core.engine.runnable:
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
        if self._roster.version != self._core.shared.version:
            self._roster = Roster(self._core)
            self._shared_times.keep(self._roster.request_ids)
        return self._roster

    def _run_calls(self) -> None:
        if self._calls:
            self._core.clock.reach(self._loop.now_s)
        while self._calls:
            self._calls.popleft()()

    def _begin_leap(self) -> bool:
        """Begin as many steps at once as can be; False for none."""
        if self._every_step:
            return False
        self._leap = plan_leap(self._core, self._look_at_sequences(), now_s=self._loop.now_s)
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
        self._core.clock.reach(self._loop.now_s)
        scheduler, executor = self._core.engine.scheduler, self._core.executor
        running, preemptions, steps = list(scheduler.running), scheduler.preemptions, executor.steps
        self._outputs = self._core.engine.step()
        for output in self._outputs:
            if output.error is not None:
                raise RuntimeError(f"{self.info.instance_id}: {output.error}")
        begun = executor.steps != steps
        if begun:
            self._turn = self._loop.at(self._core.clock.now_s(), self._take_turn, order=self._order)
        if scheduler.preemptions != preemptions:
            victims = [each.request_id for each in running if each.status is SequenceStatus.WAITING]
            self._listener.preempted(self, victims[::-1])
        return begun

    def _has_left(self, output: SequenceOutput) -> bool:
        sequence = self._core.engine.scheduler.sequences.get(output.request_id)
        return sequence is None or sequence.status is not SequenceStatus.RUNNING

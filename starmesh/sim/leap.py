"""Many decode steps at once: from one moment at which something can happen to the next.

Owns when that is allowed, how many steps it may be, and what each of them costs. While no prompt is computed, nobody
waiting can be admitted, blocks suffice and nobody ends, a step does the same to every running sequence; then the times
of all steps to come follow from the cost model alone. When an instance leaps is ``instance``'s.

The same additions and multiplications are made on the same numbers in the same order as step by step, so the results
are equal to the last bit.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import cast

import numpy as np
import numpy.typing as npt

from starmesh.engine.emulated import EmulatedExecutor
from starmesh.engine.engine import EngineCore
from starmesh.sim.leaping_sequence import LeapingSequence, SharedSteps

MAX_STEPS = 128
"""Steps planned at a time. Most leaps are cut short by a call, and what was planned beyond it was for nothing."""


class Leap:
    """Steps of ``request_ids`` that end at ``ends_s``, [steps], and begin where the one before ends; ``made`` of them
    have begun and are done to the sequences."""

    def __init__(
        self,
        *,
        request_ids: list[str],
        began_s: float,
        durations_s: npt.NDArray[np.float64],
        room_tokens: npt.NDArray[np.int64],
    ) -> None:
        self.request_ids = request_ids
        self.made = 0
        self._times_s = np.add.accumulate(np.concatenate(((began_s,), durations_s)))
        self.ends_s = self._times_s[1:]
        self._room_tokens = room_tokens

    def cut(self) -> None:
        """Leave out the steps that have not begun."""
        self.ends_s = self.ends_s[: self.made]

    def advance(self, steps: int, core: EngineCore, executor: EmulatedExecutor, shared: SharedSteps) -> None:
        """Have begun ``steps`` of its steps, at least as many as before."""
        if steps == self.made:
            return
        times_s = self._times_s[self.made : steps + 1]
        count = steps - self.made
        block_tokens = shared.pool.block_tokens
        shared.pool.owe(
            _new_blocks(self._room_tokens, steps, block_tokens)
            - _new_blocks(self._room_tokens, self.made, block_tokens)
        )
        shared.made += count
        executor.steps += count
        # Not the durations planned: a clock that was moved by them shows these, rounded.
        core.note_steps((times_s[1:] - times_s[:-1]).tolist(), count * len(self.request_ids))
        self.made = steps


def plan_leap(core: EngineCore, executor: EmulatedExecutor, shared: SharedSteps, *, now_s: float) -> Leap | None:
    """The steps that begin now, as long as each of them is only one more token of each running sequence; None when the
    first of them is not."""
    scheduler = core.scheduler
    if not scheduler.only_decodes:
        return None
    running = cast("list[LeapingSequence]", scheduler.running)
    steps = min(MAX_STEPS, min([sequence.steps_left for sequence in running]) - 1)
    if steps == 0:
        return None
    room_tokens = np.array([sequence.room_tokens for sequence in running], dtype=np.int64)
    block_tokens, free_blocks = shared.pool.block_tokens, shared.pool.free_blocks
    if _new_blocks(room_tokens, steps, block_tokens) > free_blocks:
        steps = bisect_right(
            range(1, steps), free_blocks, key=lambda count: _new_blocks(room_tokens, count, block_tokens)
        )
        if steps == 0:
            return None
    for sequence in running:
        if sequence.queue_duration_s is None:
            sequence.queue_duration_s = now_s - sequence.queued_at_s
    resident_tokens = sum([sequence.tokens for sequence in running])
    return Leap(
        request_ids=[sequence.request_id for sequence in running],
        began_s=now_s,
        durations_s=executor.next_durations_s(len(running), resident_tokens, steps),
        room_tokens=room_tokens,
    )


def _new_blocks(room_tokens: npt.NDArray[np.int64], steps: int, block_tokens: int) -> int:
    """Blocks that sequences with room for so many tokens each need for ``steps`` tokens more each."""
    return int(np.maximum((steps - room_tokens + (block_tokens - 1)) // block_tokens, 0).sum())

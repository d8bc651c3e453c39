"""Many decode steps at once: from one moment at which something can happen to the next.

Owns when that is allowed, how many steps it may be, and what each of them costs and does. While no prompt is computed,
nobody waiting can be admitted and blocks suffice, a step does the same to every running sequence until one ends; then
the times of all steps to come follow from the cost model alone. When an instance leaps is ``instance``'s.

The same additions and multiplications are made on the same numbers in the same order as step by step, so the results
are equal to the last bit.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from starmesh.engine.batch import BatchItem
from starmesh.engine.engine import SequenceOutput
from starmesh.sim.roster import Roster
from starmesh.sim.simulated_core import SimulatedCore

MAX_STEPS = 128
"""Steps planned at a time. Most leaps are cut short by a call, and what was planned beyond it was for nothing."""


class Leap:
    """``steps`` steps of all sequences that run, the first of which begins at ``began_s``, and each other when the one
    before it ends. Sequences end in the last one at the earliest. ``made`` of them have begun and are done to the
    sequences; ``outputs`` are of those that ended."""

    def __init__(
        self,
        core: SimulatedCore,
        roster: Roster,
        *,
        began_s: float,
        steps: int,
    ) -> None:
        self.made = 0
        self.outputs: list[SequenceOutput] = []
        self.request_ids = roster.request_ids
        durations_s = core.executor.next_durations_s(
            len(self.request_ids), roster.resident_tokens(core.shared.made), steps
        )
        self._times_s = np.add.accumulate(np.concatenate(((began_s,), durations_s)))
        self.ends_s = self._times_s[1:]
        self._core = core
        self._roster = roster
        self._began_made = core.shared.made

    def cut(self) -> None:
        """Leave out the steps that have not begun."""
        self.ends_s = self.ends_s[: self.made]

    def advance(self, steps: int) -> None:
        """Have begun ``steps`` of its steps, at least as many as before."""
        if steps == self.made:
            return
        made = self._began_made + steps
        spared = 0
        if made == self._roster.first_end_made:
            self._move(made - 1)
            self._end(made)
            spared = self._roster.blocks_of_ending(made)
        self._move(made, spared=spared)
        # Not the durations planned: a clock that was moved by them shows these, rounded.
        times_s = self._times_s[self.made : steps + 1]
        tokens = (steps - self.made) * len(self.request_ids) - len(self.outputs)
        self._core.engine.note_steps((times_s[1:] - times_s[:-1]).tolist(), tokens)
        self._core.executor.steps += steps - self.made
        self.made = steps

    def _move(self, made: int, *, spared: int = 0) -> None:
        blocks = self._roster.new_blocks(self._core.shared.made, made) - spared
        self._core.shared.made = made
        self._core.shared.pool.owe(blocks)

    def _end(self, made: int) -> None:
        """Make the last step of those sequences that end with it."""
        for sequence in self._roster.ending(made):
            item = BatchItem(
                request_id=sequence.request_id,
                token_ids=(),
                start=sequence.computed_tokens,
                block_ids=(),
                sampling=sequence.sampling,
                history=sequence.token_ids,
            )
            sequence.waive_owed_blocks()
            output = self._core.engine.take_token(sequence, self._core.executor.next_token_id(item))
            if output.finish_reason is None:
                raise RuntimeError(f"{sequence.request_id} was to end with token {output.offset} and did not: {output}")
            self.outputs.append(output)


def plan_leap(core: SimulatedCore, roster: Roster, *, now_s: float) -> Leap | None:
    """The steps that begin now, as long as each of them is one more token of each running sequence and nothing else;
    None when the first of them is not."""
    if not roster.all_decode or not core.engine.scheduler.admits_nobody:
        return None
    made, free_blocks = core.shared.made, core.shared.pool.free_blocks
    steps = min(MAX_STEPS, roster.first_end_made - made)
    if roster.new_blocks(made, made + steps) > free_blocks:
        steps = bisect_right(range(1, steps), free_blocks, key=lambda count: roster.new_blocks(made, made + count))
        if steps == 0:
            return None
    roster.note_first_step(now_s)
    return Leap(core, roster, began_s=now_s, steps=steps)

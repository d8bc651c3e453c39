"""What the sequences of an instance come to, while nothing happens to them but shared steps.

Owns the sums and arrays that a leap and a load need, counted once for as long as they hold: until ``SharedSteps``'
version changes.
"""

from __future__ import annotations

from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt

from starmesh.engine.engine import EngineCore
from starmesh.engine.sequence import SequenceStatus
from starmesh.sequence_loads import UNKNOWN, SequenceLoads
from starmesh.sim.leaping_sequence import LeapingSequence, SharedSteps
from starmesh.types import InstanceLoad

Counts = npt.NDArray[np.int64]


class Roster:
    """``core``'s sequences; valid while ``version`` is ``shared``'s."""

    def __init__(self, core: EngineCore, shared: SharedSteps) -> None:
        self.version = shared.version
        self._core = core
        self._shared = shared
        self._block_tokens = shared.pool.block_tokens

    @cached_property
    def all_decode(self) -> bool:
        """As ``Scheduler.all_decode``."""
        return self._core.scheduler.all_decode

    @cached_property
    def running(self) -> list[LeapingSequence]:
        """By rank."""
        return cast("list[LeapingSequence]", list(self._core.scheduler.running))

    @cached_property
    def request_ids(self) -> list[str]:
        """Of those that run, by rank."""
        return [sequence.request_id for sequence in self.running]

    @cached_property
    def ends_made(self) -> Counts:
        """How many shared steps are made when each of those that run ends, by rank."""
        ends_made = np.array([sequence.ends_made for sequence in self.running], dtype=np.int64)
        return np.maximum(ends_made, self._shared.made + 1)

    @cached_property
    def first_end_made(self) -> int:
        """The least of ``ends_made``."""
        return int(self.ends_made.min())

    @cached_property
    def full_made(self) -> Counts:
        """How many shared steps are made when the blocks are full that each of those that run has or is owed."""
        full_made = np.array([sequence.full_made for sequence in self.running], dtype=np.int64)
        behind = self._shared.made - full_made
        return np.where(behind > 0, full_made + -(-behind // self._block_tokens) * self._block_tokens, full_made)

    def new_blocks(self, since_made: int, made: int) -> int:
        """Blocks that the shared steps between take for those that run; without those that end with the first of these
        steps, where they have ended by now."""
        full_made = self.full_made
        if self.version != self._shared.version:
            full_made = full_made[self.ends_made > made]
        before, after = self._blocks(full_made, since_made), self._blocks(full_made, made)
        return after - before

    def _blocks(self, full_made: Counts, made: int) -> int:
        return int(np.maximum((made - full_made + (self._block_tokens - 1)) // self._block_tokens, 0).sum())

    def ending(self, made: int) -> list[LeapingSequence]:
        """Those that end when ``made`` shared steps are made, by rank."""
        return [self.running[index] for index in np.flatnonzero(self.ends_made == made).tolist()]

    def note_first_step(self, now_s: float) -> None:
        """A step of those that run begins now."""
        for sequence in self._newcomers:
            sequence.queue_duration_s = now_s - sequence.queued_at_s
        self._newcomers.clear()

    @cached_property
    def _newcomers(self) -> list[LeapingSequence]:
        return [sequence for sequence in self.running if sequence.queue_duration_s is None]

    def resident_tokens(self, made: int) -> int:
        """Tokens of those that run, when ``made`` shared steps are made."""
        return self._tokens_less_made + made * len(self.running)

    @cached_property
    def _tokens_less_made(self) -> int:
        return sum([sequence.tokens for sequence in self.running]) - self._shared.made * len(self.running)

    def load(self) -> InstanceLoad:
        """As ``EngineCore.load`` now, its sequences in columns."""
        core, made = self._core, self._shared.made
        scheduler = core.scheduler
        request_ids, first, last, unknown, moves, output_tokens, resident_tokens, resident_sum = self._columns
        shift = moves * made
        return InstanceLoad(
            total_blocks=scheduler.pool.total_blocks,
            free_blocks=scheduler.pool.free_blocks,
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting),
            resident_tokens=resident_sum + made * len(scheduler.running),
            step_duration_s=core.step_duration_s,
            output_tokens=core.output_tokens,
            preemptions=scheduler.preemptions,
            sequences=SequenceLoads(
                request_ids,
                [*first, (output_tokens + shift).tobytes(), (resident_tokens + shift).tobytes(), last, *[unknown] * 3],
            ),
        )

    @cached_property
    def _columns(
        self,
    ) -> tuple[tuple[str, ...], tuple[bytes, bytes], bytes, bytes, Counts, Counts, Counts, int]:
        sequences = cast("list[LeapingSequence]", list(self._core.scheduler.sequences.values()))
        moves = np.array([each.status is SequenceStatus.RUNNING for each in sequences], dtype=np.int64)
        shift = moves * self._shared.made
        resident_tokens = np.array([each.computed_tokens for each in sequences], dtype=np.int64) - shift
        return (
            tuple([each.request_id for each in sequences]),
            (_bytes([each.epoch for each in sequences]), _bytes([each.prompt_tokens for each in sequences])),
            _bytes([each.sampling.max_output_tokens for each in sequences]),
            _bytes([UNKNOWN] * len(sequences)),
            moves,
            np.array([each.output_tokens for each in sequences], dtype=np.int64) - shift,
            resident_tokens,
            int(resident_tokens.sum()),
        )


def _bytes(column: list[int]) -> bytes:
    # A column of ``SequenceLoads`` may come as the bytes that it is kept as.
    return np.array(column, dtype=np.int64).tobytes()

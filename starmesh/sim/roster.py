"""What the sequences of an instance come to, while nothing happens to them but shared steps.

Owns the sums and arrays that a leap and a load need, counted once for as long as they hold: until ``SharedSteps``'
version changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt

from starmesh.sequence_loads import UNKNOWN, SequenceLoads
from starmesh.sim.leaping_sequence import LeapingSequence
from starmesh.sim.simulated_core import SimulatedCore
from starmesh.types import InstanceLoad

Counts = npt.NDArray[np.int64]

TABLE_STEPS = 128
"""For how many shared steps the blocks that they take are counted ahead."""


class Roster:
    """``core``'s sequences; valid while ``version`` is its shared steps'."""

    def __init__(self, core: SimulatedCore) -> None:
        self._core = core.engine
        self._shared = shared = core.shared
        self.version = shared.version
        self._block_tokens = shared.pool.block_tokens
        self._table_made = 0
        self._table: list[int] = []

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
    def _courses(self) -> Counts:
        return np.array([sequence.course() for sequence in self.running], dtype=np.int64).T

    @cached_property
    def _ends_made(self) -> Counts:
        # How many shared steps are made when each of those that run ends, by rank.
        ends_made: Counts = np.maximum(self._courses[0], self._shared.made + 1)
        return ends_made

    @cached_property
    def first_end_made(self) -> int:
        """How many shared steps are made when the first of those that run end."""
        return int(self._ends_made.min())

    def new_blocks(self, since_made: int, made: int) -> int:
        """Blocks that those that run take with the shared steps between, if all of them make these steps."""
        if since_made < self._table_made or made - self._table_made >= len(self._table):
            self._table_made, self._table = since_made, self._tabulate(since_made, made)
        return self._table[made - self._table_made] - self._table[since_made - self._table_made]

    def _tabulate(self, since_made: int, made: int) -> list[int]:
        """Blocks that those that run take with one, two, three... shared steps more, up to ``made`` and beyond."""
        block_tokens = self._block_tokens
        room_tokens = self._courses[1] - since_made
        # In blocks that it is owed; each takes another with its first step beyond them, and with every such step on.
        room_tokens = np.where(room_tokens < 0, room_tokens % block_tokens, room_tokens)
        rows = max(TABLE_STEPS, made - since_made) // block_tokens + 2
        first = room_tokens[room_tokens < rows * block_tokens - 1] + 1
        takers = np.bincount(first, minlength=rows * block_tokens).reshape(rows, block_tokens).cumsum(axis=0)
        return cast("list[int]", takers.ravel().cumsum().tolist())

    def blocks_of_ending(self, made: int) -> int:
        """Blocks that those would take with the step that makes it ``made`` that end with it."""
        since_full = made - self._courses[1][self._ends_made == made] - 1
        return int(np.count_nonzero((since_full >= 0) & (since_full % self._block_tokens == 0)))

    def ending(self, made: int) -> list[LeapingSequence]:
        """Those that end when ``made`` shared steps are made, by rank."""
        return [self.running[index] for index in np.flatnonzero(self._ends_made == made).tolist()]

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
        return int(self._courses[2].sum())

    def load(self) -> InstanceLoad:
        """As ``EngineCore.load`` now, its sequences in columns."""
        core, made = self._core, self._shared.made
        scheduler = core.scheduler
        request_ids, (epochs, prompts, limits, unknown), output_tokens, resident_tokens, moves = self._columns
        shift = moves * made
        resident_tokens = resident_tokens + shift
        return InstanceLoad(
            total_blocks=scheduler.pool.total_blocks,
            free_blocks=scheduler.pool.free_blocks,
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting),
            resident_tokens=int(resident_tokens.sum()),
            step_duration_s=core.step_duration_s,
            output_tokens=core.output_tokens,
            preemptions=scheduler.preemptions,
            sequences=SequenceLoads(
                request_ids,
                # A column may come as the bytes that it is kept as.
                (
                    epochs,
                    prompts,
                    (output_tokens + shift).tobytes(),
                    resident_tokens.tobytes(),
                    limits,
                    unknown,
                    unknown,
                    unknown,
                ),
            ),
        )

    @cached_property
    def _columns(self) -> tuple[tuple[str, ...], tuple[bytes, ...], Counts, Counts, Counts]:
        sequences = cast("Iterable[LeapingSequence]", self._core.scheduler.sequences.values())
        rows = np.array([sequence.row() for sequence in sequences], dtype=np.int64).reshape(-1, 6)
        epochs, prompt_tokens, output_tokens, resident_tokens, limits, moves = rows.T
        unknown = np.full(len(rows), UNKNOWN, dtype=np.int64)
        fixed = tuple([column.tobytes() for column in (epochs, prompt_tokens, limits, unknown)])
        return tuple(self._core.scheduler.sequences), fixed, output_tokens, resident_tokens, moves

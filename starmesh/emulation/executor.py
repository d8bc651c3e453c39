"""Executes batches on the real clock: marks stand for their KV, and their time passes. Owns whether an engine was busy
between two steps."""

from __future__ import annotations

from dataclasses import replace

from starmesh.emulation.emulation import Emulation
from starmesh.emulation.hidden_states import hidden_layout, write_lengths
from starmesh.emulation.marks import KvMarks
from starmesh.emulation.pace import StepPace
from starmesh.emulation.tokens import ends_at
from starmesh.engine.batch import Batch, StepResult
from starmesh.engine.emulated import EmulatedExecutor, StepNoise
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import HiddenLayout


class PacedExecutor:
    """Implements ``Executor``; ``stream`` makes its noise another than that of other instances. With ``hidden_states``
    it keeps some, by which predictors may know lengths."""

    def __init__(
        self, emulation: Emulation, *, stream: int, hidden_states: bool = False, pace: StepPace | None = None
    ) -> None:
        self.layout = emulation.layout
        self.hidden_layout: HiddenLayout | None = hidden_layout(self.layout) if hidden_states else None
        self.total_blocks = emulation.profile.total_blocks
        self.memory = HostMemory(self.layout, self.total_blocks)
        self._marks = KvMarks(self.memory)
        self._pace = pace or StepPace()
        self._emulated = EmulatedExecutor(
            layout=self.layout,
            total_blocks=self.total_blocks,
            cost=emulation.cost,
            noise=StepNoise(emulation.profile.step_noise, seed=0, stream=stream),
            ends_at=ends_at,
            wait=self._pace.wait,
        )
        self._last_ids: set[str] = set()

    def execute(self, batch: Batch) -> StepResult:
        """Run one step. Raises WrongMark."""
        # A sequence that was in the last step and is in this one has kept the engine busy between them.
        self._pace.begin(busy=any(item.request_id in self._last_ids for item in batch.items))
        self._marks.compute(batch, known_ids=self._last_ids)
        self._last_ids = {item.request_id for item in batch.items}
        result = self._emulated.execute(batch)
        wanted = [item for item in batch.items if item.wants_hidden_state]
        return replace(result, hidden_states=write_lengths(wanted)) if wanted else result

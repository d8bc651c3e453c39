"""What the source of a simulated migration asks of its engine.

Calls run between steps in the order in which they are made, after the outputs of the steps before them. So what is not
found has either ended, of which its last output has told, or lost its blocks. What they find is told once the engine
has gone on, as live its thread does: what comes of it waits for the end of the next step. The live counterpart is
``services.decode.engine_calls``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from starmesh.engine.engine import EngineCore, ExportedSequence, SequenceProgress
from starmesh.engine.scheduler import SchedulingError, UnknownRequest
from starmesh.migration.source_record import Frozen
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance

T = TypeVar("T")


class DepartingSequence:
    """A running sequence at its source. Block ids that were told hold its KV for as long as it has not been preempted
    since ``note_preemptions``, even if it runs again; the others hear None once it has."""

    def __init__(self, loop: EventLoop, instance: SimulatedInstance, request_id: str, epoch: int) -> None:
        self._loop = loop
        self._instance = instance
        self._request_id = request_id
        self._epoch = epoch
        self._preemptions = 0

    def note_preemptions(self, lost: Callable[[], None]) -> None:
        """Call this first; ``lost`` hears of a sequence that is not in the batch."""

        def found(progress: SequenceProgress | None) -> None:
            if progress is None:
                lost()
            else:
                self._preemptions = progress.preemptions

        self._ask(lambda core: core.progress(self._request_id), found)

    def full_block_ids(self, told: Callable[[tuple[int, ...] | None], None]) -> None:
        """Its full blocks, whose KV changes no more."""

        def found(progress: SequenceProgress | None) -> None:
            kept = progress is not None and progress.preemptions == self._preemptions
            told(progress.full_block_ids if progress is not None and kept else None)

        self._ask(lambda core: core.progress(self._request_id), found)

    def freeze(self, told: Callable[[Frozen | None], None]) -> None:
        """Take it out of the batch."""

        def found(exported: ExportedSequence | None) -> None:
            if exported is None or exported.preemptions != self._preemptions:
                told(None)
            else:
                told(Frozen(exported.spec, exported.block_ids, exported.resident_tokens))

        self._ask(lambda core: core.export(self._request_id), found)

    def resume(self, epoch: int) -> None:
        """Put it back into the batch under ``epoch``, if it was taken out and has not gone."""

        def resume(core: EngineCore) -> None:
            with contextlib.suppress(UnknownRequest):
                core.resume(self._request_id, epoch=epoch)

        self._ask(resume, lambda _: None)

    def drop(self) -> None:
        """Free it, whatever its status."""
        self._instance.call(lambda core: core.cancel(self._request_id, self._epoch))

    def _ask(self, do: Callable[[EngineCore], T], found: Callable[[T | None], None]) -> None:
        """``found`` hears the result, or None for a sequence that is not in the batch."""

        def done(result: T | SchedulingError | ValueError) -> None:
            if isinstance(result, UnknownRequest):
                self._loop.after(0.0, lambda: found(None))
            elif isinstance(result, SchedulingError | ValueError):
                raise result
            else:
                self._loop.after(0.0, lambda: found(result))

        self._instance.call(do, done)

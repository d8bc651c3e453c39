"""What the two ends of a migration ask of their engines.

Calls are queued in the order in which they are made, and run between steps; the outputs of all steps before a call have
been delivered when it returns. So what is not found has either ended, of which its last output has told, or lost its
blocks.
"""

from __future__ import annotations

import contextlib

from starmesh.engine.engine import EngineCore
from starmesh.engine.scheduler import CapacityError, DuplicateRequest, UnknownRequest
from starmesh.instance.instance import Instance
from starmesh.migration.source_record import Frozen
from starmesh.migration.terms import Refusal
from starmesh.types import SequenceSpec


class DepartingSequence:
    """A running sequence at its source. Block ids that were told hold its KV for as long as it has not been preempted
    since ``note_preemptions``, even if it runs again; the others say None once it has."""

    def __init__(self, instance: Instance, request_id: str, epoch: int) -> None:
        self._engine = instance.engine
        self._request_id = request_id
        self._epoch = epoch
        self._preemptions = 0

    async def note_preemptions(self) -> bool:
        """Call this first. Whether it is in the batch."""
        try:
            progress = await self._engine.call(lambda core: core.progress(self._request_id))
        except UnknownRequest:
            return False
        self._preemptions = progress.preemptions
        return True

    async def full_block_ids(self) -> tuple[int, ...] | None:
        """Its full blocks, whose KV changes no more."""
        try:
            progress = await self._engine.call(lambda core: core.progress(self._request_id))
        except UnknownRequest:
            return None
        return progress.full_block_ids if progress.preemptions == self._preemptions else None

    async def freeze(self) -> Frozen | None:
        """Take it out of the batch."""
        try:
            exported = await self._engine.call(lambda core: core.export(self._request_id))
        except UnknownRequest:
            return None
        if exported.preemptions != self._preemptions:
            return None
        return Frozen(exported.spec, exported.block_ids, exported.resident_tokens)

    async def resume(self, epoch: int) -> None:
        """Put it back into the batch under ``epoch``, if it was taken out and has not gone. Raises CapacityError."""

        def resume(core: EngineCore) -> None:
            with contextlib.suppress(UnknownRequest):
                core.resume(self._request_id, epoch=epoch)

        await self._engine.call(resume)

    async def drop(self) -> None:
        """Free it, whatever its status."""
        await self._engine.call(lambda core: core.cancel(self._request_id, self._epoch))


class ArrivingSequence:
    """A sequence at its target, under the epoch to come."""

    def __init__(self, instance: Instance, request_id: str, epoch: int) -> None:
        self._engine = instance.engine
        self._block_tokens = instance.layout.block_tokens
        self._max_tokens = instance.membership.info.max_sequence_tokens
        self._request_id = request_id
        self._epoch = epoch

    async def reserve(self, blocks: int) -> tuple[int, ...] | Refusal:
        """Set blocks aside: ``blocks``, or as many as a sequence may have here. Headroom beyond that is of no use and
        keeps no sequence away."""
        tokens = min(blocks * self._block_tokens, self._max_tokens)

        def reserve(core: EngineCore) -> tuple[int, ...] | Refusal:
            try:
                return core.reserve(self._request_id, self._epoch, tokens) or Refusal.NO_ROOM
            except DuplicateRequest:
                return Refusal.ALREADY_HERE
            except CapacityError:
                return Refusal.TOO_LONG

        return await self._engine.call(reserve)

    async def start(self, spec: SequenceSpec, resident_tokens: int) -> None:
        """Put it into the batch. Raises SchedulingError or ValueError for one that does not go with its blocks."""
        await self._engine.call(lambda core: core.start(spec, resident_tokens))

    async def free(self) -> None:
        """Free its blocks, started or not."""
        await self._engine.call(lambda core: core.cancel(self._request_id, self._epoch))

"""How far a migration is, for whoever asked for it: every stage and copy round, to its end.

Owns the history of one migration, which is short (its stages and rounds), so that a follower that comes late or reads
slowly still gets all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from starmesh.migration.source_record import TERMINAL, SourceState
from starmesh.migration.terms import Cause, Refusal
from starmesh.rpc import convert, convert_migration
from starmesh.rpc.status import StatusError
from starmesh.v1 import decode_pb2

# A rescheduler, a drain, an operator and some who retry.
MAX_FOLLOWERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationProgress:
    """As MigrateResponse tells it. ``copied_blocks`` are at the target, ``transfer_bytes`` were pulled for it;
    ``frozen_s`` is how long the sequence has been in no batch, 0 before the end. ``traceparent`` is of its span."""

    reservation_id: str
    target_id: str
    state: SourceState
    rounds: int = 0
    copied_blocks: int = 0
    transfer_bytes: int = 0
    cause: Cause | None = None
    refusal: Refusal | None = None
    frozen_s: float = 0.0
    traceparent: str = ""

    def __str__(self) -> str:
        why = self.refusal or self.cause
        how = self.state.name.lower().replace("_", " ") + (f", {why.value}" if why else "")
        return f"{how}; {self.copied_blocks} blocks in {self.rounds} rounds, {self.frozen_s * 1e3:.0f} ms frozen"

    @property
    def over(self) -> bool:
        """Whether it is the last word."""
        return self.state in TERMINAL

    @property
    def moved(self) -> bool:
        """Whether the target owns the sequence."""
        return self.state is SourceState.MOVED

    def to_pb(self) -> decode_pb2.MigrateResponse:
        """The message of it."""
        return decode_pb2.MigrateResponse(
            reservation_id=self.reservation_id,
            stage=convert_migration.stage_pb(self.state),
            rounds=self.rounds,
            copied_blocks=self.copied_blocks,
            transfer_bytes=self.transfer_bytes,
            cause=convert_migration.cause_pb(self.cause),
            refusal=convert_migration.refusal_pb(self.refusal),
            frozen_duration=convert.duration_pb(self.frozen_s) if self.over else None,
            target_instance_id=self.target_id,
            traceparent=self.traceparent,
        )


class ProgressLog:
    """What one migration's followers hear."""

    def __init__(self) -> None:
        self._told: list[MigrationProgress] = []
        self._news = asyncio.Event()
        self._followers = 0

    @property
    def last(self) -> MigrationProgress:
        """What was told last."""
        return self._told[-1]

    def tell(self, progress: MigrationProgress) -> None:
        """Tell all followers, unless nothing has changed that they can see."""
        if self._told and self._told[-1].to_pb() == progress.to_pb():
            return
        self._told.append(progress)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self) -> AsyncGenerator[MigrationProgress, None]:
        """All that was told, and all that will be. Raises StatusError RESOURCE_EXHAUSTED for one follower too many."""
        if self._followers >= MAX_FOLLOWERS:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_FOLLOWERS} calls follow this migration; wait for its end"
            )
        self._followers += 1
        try:
            heard = 0
            while True:
                news = self._news
                while heard < len(self._told):
                    progress = self._told[heard]
                    heard += 1
                    yield progress
                    if progress.over:
                        return
                if news is self._news:
                    await news.wait()
        finally:
            self._followers -= 1

    async def outcome(self) -> MigrationProgress:
        """The last word, once there is one."""
        while not (self._told and self._told[-1].over):
            await self._news.wait()
        return self._told[-1]

"""What both ends of a migration speak of: its terms and limits, the reasons for refusing and failing, and
the events that either may meet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from starmesh.types import MigrationReason, Ownership

EPOCHS_PER_MIGRATION = 2
"""Epochs that one migration may use up: the target's, and the source's when it takes the sequence back. Whoever claims
for another purpose (a router that recovers a sequence) goes further than that, so that an epoch alone tells whose claim
it was."""


class Refusal(Enum):
    """Why a target does not take a sequence."""

    NO_ROOM = "no room"
    TOO_LONG = "too long"
    NOT_READY = "not ready"
    TOO_MANY_MIGRATIONS = "too many migrations"
    ALREADY_HERE = "already here"
    LAYOUT_MISMATCH = "layout mismatch"
    LEDGER_UNAVAILABLE = "ledger unavailable"


class Cause(Enum):
    """Why a migration did not move its sequence."""

    REFUSED = "refused"
    OUTGROWN = "outgrown"
    DECLINED = "declined"
    TARGET_SILENT = "target silent"
    TIMED_OUT = "timed out"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    OWNER_UNKNOWN = "owner unknown"


GONE: Final = frozenset({Cause.FINISHED, Cause.CANCELLED, Cause.SUPERSEDED})
"""Causes after which there is nothing left to move: the sequence has ended, or begun anew elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One attempt to move one sequence. ``reservation_id`` is drawn by the source, new for each attempt and
    unguessable; ``epoch`` is the source's when it begins."""

    reservation_id: str
    request_id: str
    epoch: int
    source_id: str
    target_id: str
    reason: MigrationReason

    @property
    def before(self) -> Ownership:
        """The owner until the commit: what every claim of this migration expects to find."""
        return Ownership(self.source_id, self.epoch)

    @property
    def moved(self) -> Ownership:
        """The owner after the commit."""
        return Ownership(self.target_id, self.epoch + 1)

    @property
    def taken_back(self) -> Ownership:
        """The owner after the source has taken the sequence back from a commit whose answer it did not get."""
        return Ownership(self.source_id, self.epoch + EPOCHS_PER_MIGRATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how far an end goes. Safety never depends on these: claims alone decide who owns a sequence.

    ``tail_blocks``: a copy round begins only while more full blocks than this are left. They and the block in progress
    move while the sequence stands still, so this is the gap that clients see; 2 is some 5 ms at 1 GB/s for the default
    model, less than a step. ``max_rounds`` ends the chase of a sequence that grows faster than it is copied.
    ``headroom_blocks``, and ``headroom_share`` of its own blocks, are reserved beyond what the sequence has at first:
    growth until the commit. The share is for slow links: alone on an instance, a sequence of a 7B model on an H100
    grows at 9.5 MB/s (166 tokens/s of 57 KB), 1/13 of what 1 Gb/s carries meanwhile, and 1/8 leaves room for others'
    transfers. With 1/32 nine in ten moves over such links failed (docs/results.md).

    Seconds: ``reserve_s``, ``round_s``, ``freeze_s`` and ``commit_s`` bound the source's waits for one answer,
    ``take_back_s`` its whole attempt to learn from the ledger what became of a commit. ``idle_s`` bounds the target's
    wait for the source's next call, ``claim_s`` its own attempt to claim, ``attach_s`` its wait for a router to come
    for the tokens. ``pause_s`` lies between two questions to a ledger that does not answer.
    """

    tail_blocks: int = 2
    max_rounds: int = 8
    headroom_blocks: int = 4
    headroom_share: float = 1 / 8
    reserve_s: float = 2.0
    round_s: float = 30.0
    freeze_s: float = 5.0
    commit_s: float = 5.0
    take_back_s: float = 5.0
    idle_s: float = 10.0
    claim_s: float = 3.0
    attach_s: float = 10.0
    pause_s: float = 0.05

    def __post_init__(self) -> None:
        if min(self.tail_blocks, self.max_rounds, self.headroom_share) < 0 or self.headroom_blocks < 1:
            raise ValueError(
                f"tail_blocks, max_rounds and headroom_share are at least 0, headroom_blocks at least 1, not {self}"
            )


@dataclass(frozen=True, slots=True)
class OwnerIs:
    """The ledger's word, as the answer to a claim that was done or met a conflict, or to a question."""

    owner: Ownership | None


@dataclass(frozen=True, slots=True)
class LedgerSilent:
    """The ledger did not answer; a claim may or may not have been done, or be done later."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The time of the last StartTimer has come."""

"""What the target of a migration asks its shell to do.

Effects are carried out in their order, and those that act on the engine (ReserveBlocks, Start, Free) are queued there
in that order too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from starmesh.migration.target_record import (
    CommitAsked,
    CopyAsked,
    NoBlocks,
    TargetEnd,
    TargetEvent,
    TargetState,
)
from starmesh.migration.terms import Refusal
from starmesh.types import KvTicket, Ownership, SequenceSpec


@dataclass(frozen=True, slots=True)
class TargetEffect:
    """Something for the shell to do."""

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        """The effect of ``event`` having led to ``after``."""
        return cls()


@dataclass(frozen=True, slots=True)
class ReserveBlocks(TargetEffect):
    """Set ``blocks`` aside under ``epoch``. Answers: BlocksReserved, NoBlocks."""

    blocks: int
    epoch: int

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        return cls(after.blocks, after.terms.moved.epoch)


@dataclass(frozen=True, slots=True)
class AnswerReserved(TargetEffect):
    """Answer Reserve: ``blocks`` are set aside."""

    blocks: int

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        return cls(len(after.block_ids))


@dataclass(frozen=True, slots=True)
class AnswerRefused(TargetEffect):
    """Answer Reserve: no."""

    refusal: Refusal

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        assert isinstance(event, NoBlocks)
        return cls(event.refusal)


@dataclass(frozen=True, slots=True)
class Pull(TargetEffect):
    """Pull ``ticket``'s blocks into ``local_block_ids`` and have the source confirm the lease. Answers: Pulled,
    PullFailed."""

    ticket: KvTicket
    local_block_ids: tuple[int, ...]

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        assert isinstance(event, CopyAsked | CommitAsked)
        last = event.first_block + len(event.ticket.block_ids)
        return cls(event.ticket, after.block_ids[event.first_block : last])


@dataclass(frozen=True, slots=True)
class StopPull(TargetEffect):
    """Break the pull off. Pulled or PullFailed comes once nothing writes into the blocks any more."""


@dataclass(frozen=True, slots=True)
class AnswerCopied(TargetEffect):
    """Answer Copy: the blocks are here."""


@dataclass(frozen=True, slots=True)
class Claim(TargetEffect):
    """Claim ``new`` if the owner is ``expected``. Answers: OwnerIs, LedgerSilent."""

    expected: Ownership
    new: Ownership

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        return cls(after.terms.before, after.terms.moved)


@dataclass(frozen=True, slots=True)
class AskOwner(TargetEffect):
    """Ask the ledger, not before ``at_s``, who owns the sequence. Answers: OwnerIs, LedgerSilent."""

    at_s: float

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        return cls(now_s + after.limits.pause_s)


@dataclass(frozen=True, slots=True)
class Start(TargetEffect):
    """Put the sequence into the batch: it goes on at the next step. Its outputs wait for a router. Answers: none, or
    StartFailed."""

    spec: SequenceSpec
    resident_tokens: int

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        assert isinstance(after.pull, CommitAsked)
        return cls(after.pull.spec, after.pull.ticket.resident_tokens)


@dataclass(frozen=True, slots=True)
class AnswerCommitted(TargetEffect):
    """Answer Commit: this instance owns the sequence."""


@dataclass(frozen=True, slots=True)
class AnswerDeclined(TargetEffect):
    """Answer Copy or Commit: given up; no claim of this migration was done here or will be."""


@dataclass(frozen=True, slots=True)
class AnswerUndecided(TargetEffect):
    """Answer Commit: given up, but a claim may have been done. To the source this is no answer."""


@dataclass(frozen=True, slots=True)
class ServeRouter(TargetEffect):
    """Send the router that asked the sequence's tokens from its offset on, and all that follow."""


@dataclass(frozen=True, slots=True)
class RefuseRouter(TargetEffect):
    """Tell the router, if one has asked, that the sequence is not here."""


@dataclass(frozen=True, slots=True)
class Free(TargetEffect):
    """Free the blocks, or the sequence if it was started."""


@dataclass(frozen=True, slots=True)
class Disown(TargetEffect):
    """Remove the ledger's entry of ``epoch`` or older, once; otherwise it expires."""

    epoch: int

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        return cls(after.terms.moved.epoch)


@dataclass(frozen=True, slots=True)
class StartTimer(TargetEffect):
    """Deliver TimedOut at ``at_s`` unless a later StartTimer or the migration's end comes first."""

    at_s: float

    @classmethod
    def of(cls, after: TargetEnd, event: TargetEvent | None, now_s: float) -> Self:
        limits = after.limits
        wait_s = {
            TargetState.RESERVING: limits.reserve_s,
            TargetState.RESERVED: limits.idle_s,
            TargetState.PULLING: limits.round_s,
            TargetState.PULLING_TAIL: limits.claim_s,
            TargetState.STARTED: limits.attach_s,
        }[after.state]
        return cls(now_s + wait_s)

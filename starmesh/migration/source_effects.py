"""What the source of a migration asks its shell to do.

Effects are carried out in their order. Those that act on the engine (Freeze, Resume, Drop) are queued there in that
order too, so that a Resume after a Freeze works whether or not the freeze has happened yet; both do nothing to a
sequence that has gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from starmesh.migration.source_record import Copied, Frozen, Reserved, SourceEnd, SourceEvent, SourceState
from starmesh.migration.terms import Cause, OwnerIs
from starmesh.types import Ownership, SequenceSpec


@dataclass(frozen=True, slots=True)
class SourceEffect:
    """Something for the shell to do."""

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        """The effect of ``event`` having led from ``before`` to ``after``."""
        return cls()


@dataclass(frozen=True, slots=True)
class Reserve(SourceEffect):
    """Ask the target for ``blocks``. Answers: Reserved, Refused, NoAnswer."""

    blocks: int

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        return cls(after.reserved_blocks)


@dataclass(frozen=True, slots=True)
class Copy(SourceEffect):
    """Lease ``block_ids`` and ask the target to pull them; they are the sequence's from ``first_block`` on. Answers:
    Copied, Declined, NoAnswer; or Preempted, Finished when the sequence is found so at the answer."""

    round: int
    first_block: int
    block_ids: tuple[int, ...]

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        assert isinstance(event, Reserved | Copied)
        return cls(after.rounds, before.copied_blocks, event.full_block_ids[before.copied_blocks :])


@dataclass(frozen=True, slots=True)
class Freeze(SourceEffect):
    """Take the sequence out of the batch. Answers: Frozen, Preempted, Finished."""


@dataclass(frozen=True, slots=True)
class Commit(SourceEffect):
    """Lease ``block_ids`` and ask the target to pull them (the sequence's from ``first_block`` on), to claim the
    sequence and go on with it. Answers: Committed, Declined, NoAnswer."""

    spec: SequenceSpec
    first_block: int
    block_ids: tuple[int, ...]
    resident_tokens: int

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        assert isinstance(event, Frozen)
        # Never an empty tail: the pull's confirmation is how the target knows that the source still waits for it.
        first = min(after.copied_blocks, len(event.block_ids) - 1)
        return cls(event.spec, first, event.block_ids[first:], event.resident_tokens)


@dataclass(frozen=True, slots=True)
class RevokeLease(SourceEffect):
    """End the lease of the last Copy or Commit, if it has not ended: no pull under it can be confirmed any more."""


@dataclass(frozen=True, slots=True)
class TakeBack(SourceEffect):
    """Claim ``new`` if the owner is ``expected``. Answers: OwnerIs, LedgerSilent."""

    expected: Ownership
    new: Ownership

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        return cls(after.terms.before, after.terms.taken_back)


@dataclass(frozen=True, slots=True)
class AskOwner(SourceEffect):
    """Ask the ledger, not before ``at_s``, who owns the sequence. Answers: OwnerIs, LedgerSilent."""

    at_s: float

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        return cls(now_s + after.limits.pause_s)


@dataclass(frozen=True, slots=True)
class Resume(SourceEffect):
    """Put the sequence back into the batch, if it is out of it, under ``epoch``."""

    epoch: int

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        taken_back = isinstance(event, OwnerIs)
        return cls(after.terms.taken_back.epoch if taken_back else after.terms.epoch)


@dataclass(frozen=True, slots=True)
class Drop(SourceEffect):
    """Free the sequence here, whatever its status."""


@dataclass(frozen=True, slots=True)
class TellMoved(SourceEffect):
    """Tell the router, after all tokens of the sequence, that ``owner`` goes on after ``output_tokens`` of them; the
    last word on this sequence from here."""

    owner: Ownership
    output_tokens: int

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        return cls(after.terms.moved, after.output_tokens)


@dataclass(frozen=True, slots=True)
class Abort(SourceEffect):
    """Tell the target once that nobody waits for it; its own timers see to it if that gets lost."""

    cause: Cause

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        assert after.cause is not None
        return cls(after.cause)


@dataclass(frozen=True, slots=True)
class StartTimer(SourceEffect):
    """Deliver TimedOut at ``at_s`` unless a later StartTimer or the migration's end comes first."""

    at_s: float

    @classmethod
    def of(cls, before: SourceEnd, after: SourceEnd, event: SourceEvent | None, now_s: float) -> Self:
        limits = after.limits
        wait_s = {
            SourceState.RESERVING: limits.reserve_s,
            SourceState.COPYING: limits.round_s,
            SourceState.FREEZING: limits.freeze_s,
            SourceState.COMMITTING: limits.commit_s,
            SourceState.TAKING_BACK: limits.take_back_s,
        }[after.state]
        return cls(now_s + wait_s)

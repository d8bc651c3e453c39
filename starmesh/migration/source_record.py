"""What the source of a migration knows, and what can happen to it.

Owns the record, its states and the events. What follows from them is ``source``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias

from starmesh.migration.terms import Cause, LedgerSilent, Limits, OwnerIs, Refusal, Terms, TimedOut
from starmesh.types import SequenceSpec


class SourceState(Enum):
    """Where the source stands. The sequence is in the batch until FREEZING has done its work."""

    RESERVING = auto()
    """Waits for the target to reserve blocks."""
    COPYING = auto()
    """The target pulls full blocks while the sequence goes on here."""
    FREEZING = auto()
    """Waits for the engine to take the sequence out of the batch."""
    COMMITTING = auto()
    """The sequence stands still; the target has been asked to pull the tail and claim it."""
    TAKING_BACK = auto()
    """The target's answer did not come; a claim of the source's own is under way."""
    ASKING = auto()
    """The ledger's answer to that claim did not come either; it is asked who owns the sequence."""
    MOVED = auto()
    """Over: the target owns the sequence."""
    STAYED = auto()
    """Over: the sequence goes on here."""
    ENDED = auto()
    """Over: the sequence finished, was cancelled, or belongs to someone else by now."""
    IN_DOUBT = auto()
    """Over: nobody could say whether the target owns the sequence. It is given up here, and the router looks there."""


TERMINAL: Final = frozenset({SourceState.MOVED, SourceState.STAYED, SourceState.ENDED, SourceState.IN_DOUBT})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEnd:
    """A migration as its source knows it. ``copied_blocks`` of the sequence's first blocks are at the target or, in
    COPYING, on their way. ``cause`` is set when it ended otherwise than MOVED."""

    terms: Terms
    limits: Limits
    state: SourceState = SourceState.RESERVING
    reserved_blocks: int = 0
    copied_blocks: int = 0
    rounds: int = 0
    output_tokens: int = 0
    cause: Cause | None = None
    refusal: Refusal | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen; the shell drops what still arrives, and the timer."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Reserved:
    """The target holds ``reserved_blocks``. ``full_block_ids`` are the sequence's full blocks here as of now."""

    reserved_blocks: int
    full_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The target does not take the sequence."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Copied:
    """The target has the round's blocks. ``full_block_ids`` are the sequence's full blocks here as of now."""

    full_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Frozen:
    """The sequence is out of the batch; ``block_ids`` hold the KV of its first ``resident_tokens`` tokens, and all of
    ``spec.output_token_ids`` have been handed to the router's link."""

    spec: SequenceSpec
    block_ids: tuple[int, ...]
    resident_tokens: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The target's word: it owns the sequence."""


@dataclass(frozen=True, slots=True)
class Declined:
    """The target's word: it has given the migration up, does not own the sequence and will not claim it."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A call to the target failed, timed out, or the target could not say what became of its claim."""


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence has lost its blocks since the migration began, even if it has new ones by now."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The sequence ended by itself, or its engine gave it up."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The router cancelled the sequence or is gone, its deadline passed, or a newer epoch of it began here."""


SourceEvent: TypeAlias = (
    Reserved
    | Refused
    | Copied
    | Frozen
    | Committed
    | Declined
    | NoAnswer
    | OwnerIs
    | LedgerSilent
    | Preempted
    | Finished
    | Cancelled
    | TimedOut
)

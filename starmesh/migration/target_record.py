"""What the target of a migration knows, and what can happen to it.

Owns the record, its states and the events. What follows from them is ``target``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias

from starmesh.migration.terms import Cause, LedgerSilent, Limits, OwnerIs, Refusal, Terms, TimedOut
from starmesh.types import KvTicket, SequenceSpec


class TargetState(Enum):
    """Where the target stands."""

    RESERVING = auto()
    """Waits for the engine to set blocks aside."""
    RESERVED = auto()
    """Waits for the source's next call."""
    PULLING = auto()
    """Pulls the blocks of a copy round."""
    PULLING_TAIL = auto()
    """Pulls what was left when the source froze the sequence."""
    CLAIMING = auto()
    """Has all of the sequence; a claim is under way."""
    ASKING = auto()
    """The ledger's answer to the claim did not come; it is asked who owns the sequence."""
    STARTED = auto()
    """Owns the sequence and decodes it; no router has come for the tokens yet."""
    STOPPING = auto()
    """Given up, but a pull still writes into the blocks."""
    ATTACHED = auto()
    """Over: owns the sequence, and a router has its tokens. From here on it is a sequence like any other."""
    FREED = auto()
    """Over: nothing of the migration is left here."""


TERMINAL: Final = frozenset({TargetState.ATTACHED, TargetState.FREED})


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEnd:
    """A migration as its target knows it. ``copied_blocks`` of the sequence's first blocks are here, after ``rounds``
    copy rounds. ``attached``: a router waits for the claim's outcome."""

    terms: Terms
    limits: Limits
    blocks: int
    state: TargetState = TargetState.RESERVING
    block_ids: tuple[int, ...] = ()
    copied_blocks: int = 0
    rounds: int = 0
    pull: CopyAsked | CommitAsked | None = None
    attached: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will happen; the shell forgets it. A call for a migration that is not known is answered
        NOT_FOUND, which tells the source no more than no answer."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """The engine has set these blocks aside, under the epoch to come."""

    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NoBlocks:
    """The engine has not."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class ReserveAsked:
    """The source's call for this reservation has come once more."""


@dataclass(frozen=True, slots=True)
class CopyAsked:
    """The source's call for copy round ``round``, from 1: pull ``ticket``'s blocks, which are the sequence's from
    ``first_block`` on."""

    round: int
    first_block: int
    ticket: KvTicket


@dataclass(frozen=True, slots=True)
class CommitAsked:
    """The source has frozen the sequence: pull ``ticket``'s blocks, the sequence's from ``first_block`` to the last
    that holds any of its ``ticket.resident_tokens``; then claim it and go on with ``spec``."""

    spec: SequenceSpec
    first_block: int
    ticket: KvTicket


@dataclass(frozen=True, slots=True)
class AbortAsked:
    """The source's word: nobody waits for this migration, and its claim could not be done or is not wanted."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Pulled:
    """The blocks are here and the source has confirmed that their lease held until now."""


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The pull has ended without that; nothing writes into the blocks any more."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A router asks for the sequence's tokens, under the epoch to come."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The engine did not take the sequence that was claimed for it."""


TargetEvent: TypeAlias = (
    BlocksReserved
    | NoBlocks
    | ReserveAsked
    | CopyAsked
    | CommitAsked
    | AbortAsked
    | Pulled
    | PullFailed
    | OwnerIs
    | LedgerSilent
    | Attached
    | StartFailed
    | TimedOut
)

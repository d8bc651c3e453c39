"""The target's end of a migration: it sets blocks aside, pulls, claims the sequence, and only then decodes it.

Owns the one claim that moves a sequence. It lies here because this is the end that has everything to go on with at that
moment, so that no message stands between the claim and the next step, and nobody ever decodes without having won.

Its blocks are never freed while a pull writes into them: every way out of a pull leads through its end (STOPPING).
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from typing import Final

from starmesh.migration.table import Table, look_up, loops, rows
from starmesh.migration.target_effects import (
    AnswerCommitted,
    AnswerCopied,
    AnswerDeclined,
    AnswerRefused,
    AnswerReserved,
    AnswerUndecided,
    AskOwner,
    Claim,
    Disown,
    Free,
    Pull,
    RefuseRouter,
    ReserveBlocks,
    ServeRouter,
    Start,
    StartTimer,
    StopPull,
    TargetEffect,
)
from starmesh.migration.target_record import (
    AbortAsked,
    Attached,
    BlocksReserved,
    CommitAsked,
    CopyAsked,
    NoBlocks,
    Pulled,
    PullFailed,
    ReserveAsked,
    StartFailed,
    TargetEnd,
    TargetEvent,
    TargetState,
)
from starmesh.migration.terms import LedgerSilent, Limits, OwnerIs, Terms, TimedOut
from starmesh.types import KvTicket


class TargetKind(Enum):
    """What an event amounts to, given the record."""

    BLOCKS_RESERVED = auto()
    NO_BLOCKS = auto()
    RESERVE_AGAIN = auto()
    COPY_NEXT = auto()
    COPY_AGAIN = auto()
    COMMIT = auto()
    COMMIT_AGAIN = auto()
    OUT_OF_ORDER = auto()
    """A call that does not go on where the last one ended; no state allows it."""
    ABORT = auto()
    PULLED = auto()
    PULL_FAILED = auto()
    OWNER_BEFORE = auto()
    OWNER_MOVED = auto()
    OWNER_MOVED_ATTACHED = auto()
    """As OWNER_MOVED, and a router waits."""
    OWNER_OTHER = auto()
    LEDGER_SILENT = auto()
    ATTACH = auto()
    START_FAILED = auto()
    TIMED_OUT = auto()


_S, _K = TargetState, TargetKind
_CLAIM = (_S.CLAIMING, _S.ASKING)
_COMMIT = (_S.PULLING_TAIL, *_CLAIM)

TABLE: Final[Table[TargetState, TargetKind, TargetEffect]] = {
    # Reserve.
    (_S.RESERVING, _K.BLOCKS_RESERVED): (_S.RESERVED, (AnswerReserved, StartTimer)),
    (_S.RESERVING, _K.NO_BLOCKS): (_S.FREED, (AnswerRefused,)),
    # Between calls. A router comes before the commit only when the source is sure that it will not commit.
    (_S.RESERVED, _K.COPY_NEXT): (_S.PULLING, (Pull, StartTimer)),
    (_S.RESERVED, _K.COMMIT): (_S.PULLING_TAIL, (Pull, StartTimer)),
    **rows((_S.RESERVING, _S.RESERVED), _K.ABORT, (_S.FREED, (Free,))),
    **rows((_S.RESERVING, _S.RESERVED), _K.TIMED_OUT, (_S.FREED, (Free,))),
    **rows((_S.RESERVING, _S.RESERVED), _K.ATTACH, (_S.FREED, (Free, RefuseRouter))),
    # A copy round.
    (_S.PULLING, _K.PULLED): (_S.RESERVED, (AnswerCopied, StartTimer)),
    (_S.PULLING, _K.PULL_FAILED): (_S.FREED, (Free, AnswerDeclined)),
    (_S.PULLING, _K.ABORT): (_S.STOPPING, (StopPull,)),
    (_S.PULLING, _K.TIMED_OUT): (_S.STOPPING, (StopPull, AnswerDeclined)),
    (_S.PULLING, _K.ATTACH): (_S.STOPPING, (StopPull, RefuseRouter)),
    # The tail. From the commit call on, a router that comes waits for the outcome.
    (_S.PULLING_TAIL, _K.PULLED): (_S.CLAIMING, (Claim,)),
    (_S.PULLING_TAIL, _K.PULL_FAILED): (_S.FREED, (Free, AnswerDeclined, RefuseRouter)),
    (_S.PULLING_TAIL, _K.ABORT): (_S.STOPPING, (StopPull, RefuseRouter)),
    (_S.PULLING_TAIL, _K.TIMED_OUT): (_S.STOPPING, (StopPull, AnswerDeclined, RefuseRouter)),
    **loops(_COMMIT, (_K.ATTACH,)),
    # The claim.
    (_S.CLAIMING, _K.LEDGER_SILENT): (_S.ASKING, (AskOwner,)),
    (_S.ASKING, _K.LEDGER_SILENT): (_S.ASKING, (AskOwner,)),
    (_S.ASKING, _K.OWNER_BEFORE): (_S.CLAIMING, (Claim,)),
    **rows(_CLAIM, _K.OWNER_MOVED, (_S.STARTED, (Start, AnswerCommitted, StartTimer))),
    **rows(_CLAIM, _K.OWNER_MOVED_ATTACHED, (_S.ATTACHED, (Start, AnswerCommitted, ServeRouter))),
    **rows(_CLAIM, _K.OWNER_OTHER, (_S.FREED, (Free, AnswerDeclined, RefuseRouter))),
    **rows(_CLAIM, _K.ABORT, (_S.FREED, (Free, RefuseRouter))),
    **rows(_CLAIM, _K.TIMED_OUT, (_S.FREED, (Free, AnswerUndecided, RefuseRouter))),
    # Owned, and nobody has come for the tokens. An abort can only mean that the request has ended.
    (_S.STARTED, _K.ATTACH): (_S.ATTACHED, (ServeRouter,)),
    (_S.STARTED, _K.ABORT): (_S.FREED, (Free, Disown)),
    (_S.STARTED, _K.TIMED_OUT): (_S.FREED, (Free, Disown)),
    (_S.STARTED, _K.START_FAILED): (_S.FREED, (Free, Disown)),
    # Given up while a pull writes.
    **rows((_S.STOPPING,), _K.PULLED, (_S.FREED, (Free,))),
    **rows((_S.STOPPING,), _K.PULL_FAILED, (_S.FREED, (Free,))),
    **loops((_S.STOPPING,), (_K.ABORT, _K.TIMED_OUT)),
    **loops((_S.STOPPING,), (_K.ATTACH,), (RefuseRouter,)),
    # Calls that come twice. What was answered once is answered again where that says the truth.
    **loops((_S.RESERVED,), (_K.RESERVE_AGAIN,), (AnswerReserved,)),
    **loops((_S.RESERVED,), (_K.COPY_AGAIN,), (AnswerCopied,)),
    **loops((_S.STARTED,), (_K.COMMIT_AGAIN,), (AnswerCommitted,)),
    **loops((_S.RESERVING, _S.PULLING, *_COMMIT, _S.STARTED, _S.STOPPING), (_K.RESERVE_AGAIN,)),
    **loops((_S.PULLING, *_COMMIT, _S.STARTED, _S.STOPPING), (_K.COPY_AGAIN,)),
    **loops((*_COMMIT, _S.STOPPING), (_K.COMMIT_AGAIN,)),
}


def begin(terms: Terms, limits: Limits, *, blocks: int, now_s: float) -> tuple[TargetEnd, tuple[TargetEffect, ...]]:
    """Begin to take a sequence in, on its source's first call: ``blocks`` are asked for. Whether this instance takes
    any (state, layout, how many migrations at a time) has been decided before."""
    end = TargetEnd(terms=terms, limits=limits, blocks=blocks)
    return end, (ReserveBlocks.of(end, None, now_s), StartTimer.of(end, None, now_s))


def advance(end: TargetEnd, event: TargetEvent, now_s: float) -> tuple[TargetEnd, tuple[TargetEffect, ...]]:
    """What ``event`` leads to at ``now_s``. Raises ProtocolError for one that does not belong here."""
    state, effects = look_up(TABLE, end.state, classify(end, event))
    after = replace(_note(end, event), state=state)
    return after, tuple(effect.of(after, event, now_s) for effect in effects)


def classify(end: TargetEnd, event: TargetEvent) -> TargetKind:
    """What ``event`` amounts to for ``end``."""
    match event:
        case CopyAsked(number, first_block, ticket):
            if number <= end.rounds:
                return _K.COPY_AGAIN
            follows = number == end.rounds + 1 and first_block == end.copied_blocks
            return _K.COPY_NEXT if follows and _fits(end, first_block, ticket) else _K.OUT_OF_ORDER
        case CommitAsked(_, first_block, ticket):
            if event == end.pull:
                return _K.COMMIT_AGAIN
            follows = first_block <= end.copied_blocks and not isinstance(end.pull, CommitAsked)
            return _K.COMMIT if follows and _fits(end, first_block, ticket) else _K.OUT_OF_ORDER
        case OwnerIs(owner):
            if owner == end.terms.moved:
                return _K.OWNER_MOVED_ATTACHED if end.attached else _K.OWNER_MOVED
            return _K.OWNER_BEFORE if owner == end.terms.before else _K.OWNER_OTHER
        case _:
            return _PLAIN[type(event)]


_PLAIN: Final[dict[type[TargetEvent], TargetKind]] = {
    BlocksReserved: _K.BLOCKS_RESERVED,
    NoBlocks: _K.NO_BLOCKS,
    ReserveAsked: _K.RESERVE_AGAIN,
    AbortAsked: _K.ABORT,
    Pulled: _K.PULLED,
    PullFailed: _K.PULL_FAILED,
    LedgerSilent: _K.LEDGER_SILENT,
    Attached: _K.ATTACH,
    StartFailed: _K.START_FAILED,
    TimedOut: _K.TIMED_OUT,
}


def _fits(end: TargetEnd, first_block: int, ticket: KvTicket) -> bool:
    """Whether there is something to pull and room for it."""
    return bool(ticket.block_ids) and first_block >= 0 and first_block + len(ticket.block_ids) <= len(end.block_ids)


def _note(end: TargetEnd, event: TargetEvent) -> TargetEnd:
    """The record with what ``event`` says, in the state before it."""
    match event, classify(end, event):
        case BlocksReserved(block_ids), _:
            return replace(end, block_ids=block_ids)
        case CopyAsked(number), _K.COPY_NEXT:
            return replace(end, rounds=number, pull=event)
        case CommitAsked(), _K.COMMIT:
            return replace(end, pull=event)
        case Pulled(), _ if isinstance(end.pull, CopyAsked):
            return replace(end, copied_blocks=end.pull.first_block + len(end.pull.ticket.block_ids))
        case Attached(), _:
            return replace(end, attached=True)
        case _:
            return end

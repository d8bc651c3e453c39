"""The source's end of a migration: it has the sequence, drives the protocol, and lets go only when another owns it.

Owns when to copy, when to freeze, and how to find out what became of a commit. Owns no claim to the target's side: only
the target makes the target the owner, and the source gets a frozen sequence back either from the target's word that it
did not and will not claim it, or by a claim of its own that makes the target's impossible.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from typing import Final

from starmesh.migration.source_effects import (
    Abort,
    AskOwner,
    Commit,
    Copy,
    Drop,
    Freeze,
    Reserve,
    Resume,
    RevokeLease,
    SourceEffect,
    StartTimer,
    TakeBack,
    TellMoved,
)
from starmesh.migration.source_record import (
    Cancelled,
    Committed,
    Copied,
    Declined,
    Finished,
    Frozen,
    NoAnswer,
    Preempted,
    Refused,
    Reserved,
    SourceEnd,
    SourceEvent,
    SourceState,
)
from starmesh.migration.table import Table, look_up, loops, rows
from starmesh.migration.terms import Cause, LedgerSilent, Limits, OwnerIs, Terms, TimedOut


class SourceKind(Enum):
    """What an event amounts to, given the record."""

    RESERVED = auto()
    RESERVED_TAIL_LEFT = auto()
    REFUSED = auto()
    COPIED = auto()
    COPIED_TAIL_LEFT = auto()
    FROZEN = auto()
    OUTGROWN = auto()
    COMMITTED = auto()
    DECLINED = auto()
    NO_ANSWER = auto()
    OWNER_BEFORE = auto()
    OWNER_MOVED = auto()
    OWNER_TAKEN_BACK = auto()
    OWNER_OTHER = auto()
    LEDGER_SILENT = auto()
    PREEMPTED = auto()
    FINISHED = auto()
    CANCELLED = auto()
    TIMED_OUT = auto()


_S, _K = SourceState, SourceKind

TABLE: Final[Table[SourceState, SourceKind, SourceEffect]] = {
    # Reserve. Nothing has changed for the sequence yet.
    (_S.RESERVING, _K.RESERVED): (_S.COPYING, (Copy, StartTimer)),
    (_S.RESERVING, _K.RESERVED_TAIL_LEFT): (_S.FREEZING, (Freeze, StartTimer)),
    (_S.RESERVING, _K.OUTGROWN): (_S.STAYED, (Abort,)),
    (_S.RESERVING, _K.REFUSED): (_S.STAYED, ()),
    (_S.RESERVING, _K.NO_ANSWER): (_S.STAYED, (Abort,)),
    (_S.RESERVING, _K.TIMED_OUT): (_S.STAYED, (Abort,)),
    (_S.RESERVING, _K.PREEMPTED): (_S.STAYED, (Abort,)),
    (_S.RESERVING, _K.FINISHED): (_S.ENDED, (Abort,)),
    (_S.RESERVING, _K.CANCELLED): (_S.ENDED, (Drop, Abort)),
    # Copy rounds. The sequence decodes; its full blocks never change, unless it is preempted.
    (_S.COPYING, _K.COPIED): (_S.COPYING, (Copy, StartTimer)),
    (_S.COPYING, _K.COPIED_TAIL_LEFT): (_S.FREEZING, (Freeze, StartTimer)),
    (_S.COPYING, _K.OUTGROWN): (_S.STAYED, (RevokeLease, Abort)),
    (_S.COPYING, _K.DECLINED): (_S.STAYED, (RevokeLease,)),
    (_S.COPYING, _K.NO_ANSWER): (_S.STAYED, (RevokeLease, Abort)),
    (_S.COPYING, _K.TIMED_OUT): (_S.STAYED, (RevokeLease, Abort)),
    (_S.COPYING, _K.PREEMPTED): (_S.STAYED, (RevokeLease, Abort)),
    (_S.COPYING, _K.FINISHED): (_S.ENDED, (RevokeLease, Abort)),
    (_S.COPYING, _K.CANCELLED): (_S.ENDED, (RevokeLease, Drop, Abort)),
    # Freeze. The step in progress may still end, preempt or extend the sequence.
    (_S.FREEZING, _K.FROZEN): (_S.COMMITTING, (Commit, StartTimer)),
    (_S.FREEZING, _K.OUTGROWN): (_S.STAYED, (Resume, Abort)),
    (_S.FREEZING, _K.TIMED_OUT): (_S.STAYED, (Resume, Abort)),
    (_S.FREEZING, _K.PREEMPTED): (_S.STAYED, (Resume, Abort)),
    (_S.FREEZING, _K.FINISHED): (_S.ENDED, (Abort,)),
    (_S.FREEZING, _K.CANCELLED): (_S.ENDED, (Drop, Abort)),
    # Commit. From here on only the target's word or the ledger's says whose the sequence is.
    (_S.COMMITTING, _K.COMMITTED): (_S.MOVED, (RevokeLease, Drop, TellMoved)),
    (_S.COMMITTING, _K.DECLINED): (_S.STAYED, (RevokeLease, Resume)),
    (_S.COMMITTING, _K.NO_ANSWER): (_S.TAKING_BACK, (RevokeLease, TakeBack, StartTimer)),
    (_S.COMMITTING, _K.TIMED_OUT): (_S.TAKING_BACK, (RevokeLease, TakeBack, StartTimer)),
    (_S.COMMITTING, _K.CANCELLED): (_S.ENDED, (RevokeLease, Drop, Abort)),
    # Take back. One of two claims that expect the same owner is done; the other finds its result.
    (_S.TAKING_BACK, _K.LEDGER_SILENT): (_S.ASKING, (AskOwner,)),
    (_S.ASKING, _K.LEDGER_SILENT): (_S.ASKING, (AskOwner,)),
    (_S.ASKING, _K.OWNER_BEFORE): (_S.TAKING_BACK, (TakeBack,)),
    **rows((_S.TAKING_BACK, _S.ASKING), _K.OWNER_TAKEN_BACK, (_S.STAYED, (Resume, Abort))),
    **rows((_S.TAKING_BACK, _S.ASKING), _K.OWNER_MOVED, (_S.MOVED, (Drop, TellMoved))),
    # A ledger that names neither end (it lost its entries, or has others' of before) knows of no commit either.
    **rows((_S.TAKING_BACK, _S.ASKING), _K.OWNER_OTHER, (_S.IN_DOUBT, (Drop, TellMoved))),
    **rows((_S.TAKING_BACK, _S.ASKING), _K.TIMED_OUT, (_S.IN_DOUBT, (Drop, TellMoved))),
    **rows((_S.TAKING_BACK, _S.ASKING), _K.CANCELLED, (_S.ENDED, (Drop, Abort))),
    **rows((_S.TAKING_BACK, _S.ASKING), _K.COMMITTED, (_S.MOVED, (Drop, TellMoved))),
    # A late word that it declined does not undo the claim that is under way: that one's answer says the epoch.
    **loops((_S.TAKING_BACK, _S.ASKING), (_K.DECLINED, _K.NO_ANSWER)),
}

_CAUSES: Final = {
    _K.REFUSED: Cause.REFUSED,
    _K.OUTGROWN: Cause.OUTGROWN,
    _K.DECLINED: Cause.DECLINED,
    _K.NO_ANSWER: Cause.TARGET_SILENT,
    _K.TIMED_OUT: Cause.TIMED_OUT,
    _K.PREEMPTED: Cause.PREEMPTED,
    _K.FINISHED: Cause.FINISHED,
    _K.CANCELLED: Cause.CANCELLED,
    _K.OWNER_TAKEN_BACK: Cause.TARGET_SILENT,
    _K.OWNER_OTHER: Cause.OWNER_UNKNOWN,
}


def begin(terms: Terms, limits: Limits, *, blocks: int, now_s: float) -> tuple[SourceEnd, tuple[SourceEffect, ...]]:
    """Begin to move a running sequence that has ``blocks`` blocks now."""
    headroom_blocks = limits.headroom_blocks + int(blocks * limits.headroom_share)
    end = SourceEnd(terms=terms, limits=limits, reserved_blocks=blocks + headroom_blocks)
    return end, (Reserve.of(end, end, None, now_s), StartTimer.of(end, end, None, now_s))


def advance(end: SourceEnd, event: SourceEvent, now_s: float) -> tuple[SourceEnd, tuple[SourceEffect, ...]]:
    """What ``event`` leads to at ``now_s``. Raises ProtocolError for one that does not belong here."""
    kind = classify(end, event)
    state, effects = look_up(TABLE, end.state, kind)
    after = replace(_note(end, event), state=state)
    if after.over and state is not SourceState.MOVED:
        after = replace(after, cause=_CAUSES[kind])
    return after, tuple(effect.of(end, after, event, now_s) for effect in effects)


def classify(end: SourceEnd, event: SourceEvent) -> SourceKind:
    """What ``event`` amounts to for ``end``."""
    match event:
        case Reserved(reserved_blocks, full_block_ids):
            return _progress(end, reserved_blocks, full_block_ids, _K.RESERVED, _K.RESERVED_TAIL_LEFT)
        case Copied(full_block_ids):
            return _progress(end, end.reserved_blocks, full_block_ids, _K.COPIED, _K.COPIED_TAIL_LEFT)
        case Frozen(_, block_ids, _):
            return _K.FROZEN if len(block_ids) <= end.reserved_blocks else _K.OUTGROWN
        case OwnerIs(owner):
            known = {
                end.terms.before: _K.OWNER_BEFORE,
                end.terms.moved: _K.OWNER_MOVED,
                end.terms.taken_back: _K.OWNER_TAKEN_BACK,
            }
            return _K.OWNER_OTHER if owner is None else known.get(owner, _K.OWNER_OTHER)
        case _:
            return _PLAIN[type(event)]


_PLAIN: Final[dict[type[SourceEvent], SourceKind]] = {
    Refused: _K.REFUSED,
    Committed: _K.COMMITTED,
    Declined: _K.DECLINED,
    NoAnswer: _K.NO_ANSWER,
    LedgerSilent: _K.LEDGER_SILENT,
    Preempted: _K.PREEMPTED,
    Finished: _K.FINISHED,
    Cancelled: _K.CANCELLED,
    TimedOut: _K.TIMED_OUT,
}


def _progress(
    end: SourceEnd, reserved_blocks: int, full_block_ids: tuple[int, ...], more: SourceKind, tail_left: SourceKind
) -> SourceKind:
    left = len(full_block_ids) - end.copied_blocks
    # Beside the full blocks there is the one in progress.
    if len(full_block_ids) + 1 > reserved_blocks:
        return SourceKind.OUTGROWN
    if left <= end.limits.tail_blocks or end.rounds >= end.limits.max_rounds:
        return tail_left
    return more


def _note(end: SourceEnd, event: SourceEvent) -> SourceEnd:
    """The record with what ``event`` says, in the state before it."""
    match event:
        case Reserved(reserved_blocks, full_block_ids):
            end = replace(end, reserved_blocks=reserved_blocks)
            return _count_round(end, full_block_ids, classify(end, event) is SourceKind.RESERVED)
        case Copied(full_block_ids):
            return _count_round(end, full_block_ids, classify(end, event) is SourceKind.COPIED)
        case Frozen(spec, _, _):
            return replace(end, output_tokens=len(spec.output_token_ids))
        case Refused(refusal):
            return replace(end, refusal=refusal)
        case _:
            return end


def _count_round(end: SourceEnd, full_block_ids: tuple[int, ...], begins: bool) -> SourceEnd:
    if not begins:
        return end
    return replace(end, copied_blocks=len(full_block_ids), rounds=end.rounds + 1)

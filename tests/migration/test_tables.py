"""Both ends, state by state and event by event, against the tables of docs/migration.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.migration import source, source_record, target, target_record
from starmesh.migration import source_effects as se
from starmesh.migration import source_record as sr
from starmesh.migration import target_effects as te
from starmesh.migration import target_record as tr
from starmesh.migration.source import SourceKind
from starmesh.migration.source_record import SourceEnd, SourceState
from starmesh.migration.table import ProtocolError
from starmesh.migration.target import TargetKind
from starmesh.migration.target_record import TargetEnd, TargetState
from starmesh.migration.terms import Cause, LedgerSilent, Limits, OwnerIs, Refusal, Terms, TimedOut
from starmesh.types import KvLayout, KvTicket, MigrationReason, Ownership, SamplingParams, SequenceSpec

pytestmark = pytest.mark.fast

DOCUMENT = Path(__file__).parents[2] / "docs" / "migration.md"
TERMS = Terms(
    reservation_id="r1", request_id="q1", epoch=4, source_id="A", target_id="B", reason=MigrationReason.PREDICTED_LOAD
)
LIMITS = Limits(tail_blocks=2, max_rounds=3, headroom_blocks=4)
SPEC = SequenceSpec("q1", 4, (1, 2, 3), (4, 5), SamplingParams(max_output_tokens=9))
NOW_S = 100.0

# A source that has reserved 20 blocks and copied 6 of them in one round.
SOURCE = SourceEnd(terms=TERMS, limits=LIMITS, reserved_blocks=20, copied_blocks=6, rounds=1)
SOURCE_EVENTS: dict[SourceKind, sr.SourceEvent] = {
    SourceKind.RESERVED: sr.Reserved(20, tuple(range(9))),
    SourceKind.RESERVED_TAIL_LEFT: sr.Reserved(20, tuple(range(8))),
    SourceKind.REFUSED: sr.Refused(Refusal.NO_ROOM),
    SourceKind.COPIED: sr.Copied(tuple(range(9))),
    SourceKind.COPIED_TAIL_LEFT: sr.Copied(tuple(range(8))),
    SourceKind.FROZEN: sr.Frozen(SPEC, tuple(range(10)), 39),
    SourceKind.OUTGROWN: sr.Copied(tuple(range(20))),
    SourceKind.COMMITTED: sr.Committed(),
    SourceKind.DECLINED: sr.Declined(),
    SourceKind.NO_ANSWER: sr.NoAnswer(),
    SourceKind.OWNER_BEFORE: OwnerIs(Ownership("A", 4)),
    SourceKind.OWNER_MOVED: OwnerIs(Ownership("B", 5)),
    SourceKind.OWNER_TAKEN_BACK: OwnerIs(Ownership("A", 6)),
    SourceKind.OWNER_OTHER: OwnerIs(None),
    SourceKind.LEDGER_SILENT: LedgerSilent(),
    SourceKind.PREEMPTED: sr.Preempted(),
    SourceKind.FINISHED: sr.Finished(),
    SourceKind.CANCELLED: sr.Cancelled(),
    SourceKind.TIMED_OUT: TimedOut(),
}


def ticket(*block_ids: int) -> KvTicket:
    return KvTicket("l1", "A", "a:1", KvLayout("m", "float32", 1, 1, 1, 4), block_ids, 39, 5.0)


# A target with 12 blocks, of which 6 are filled after one round, that has been asked to commit in the states that need
# it: where that matters, the record is made by ``target_in``.
COMMIT = tr.CommitAsked(SPEC, 6, ticket(7, 8, 9))
TARGET = TargetEnd(terms=TERMS, limits=LIMITS, blocks=12, block_ids=tuple(range(50, 62)), copied_blocks=6, rounds=1)
TARGET_EVENTS: dict[TargetKind, tr.TargetEvent] = {
    TargetKind.BLOCKS_RESERVED: tr.BlocksReserved((1, 2)),
    TargetKind.NO_BLOCKS: tr.NoBlocks(Refusal.NO_ROOM),
    TargetKind.RESERVE_AGAIN: tr.ReserveAsked(),
    TargetKind.COPY_NEXT: tr.CopyAsked(2, 6, ticket(7, 8)),
    TargetKind.COPY_AGAIN: tr.CopyAsked(1, 0, ticket(1, 2)),
    TargetKind.COMMIT: COMMIT,
    TargetKind.COMMIT_AGAIN: COMMIT,
    TargetKind.OUT_OF_ORDER: tr.CopyAsked(3, 6, ticket(7)),
    TargetKind.ABORT: tr.AbortAsked(Cause.CANCELLED),
    TargetKind.PULLED: tr.Pulled(),
    TargetKind.PULL_FAILED: tr.PullFailed(),
    TargetKind.OWNER_BEFORE: OwnerIs(Ownership("A", 4)),
    TargetKind.OWNER_MOVED: OwnerIs(Ownership("B", 5)),
    TargetKind.OWNER_MOVED_ATTACHED: OwnerIs(Ownership("B", 5)),
    TargetKind.OWNER_OTHER: OwnerIs(Ownership("A", 6)),
    TargetKind.LEDGER_SILENT: LedgerSilent(),
    TargetKind.ATTACH: tr.Attached(),
    TargetKind.START_FAILED: tr.StartFailed(),
    TargetKind.TIMED_OUT: TimedOut(),
}


def target_in(state: TargetState, kind: TargetKind) -> TargetEnd:
    """A record in ``state`` for which ``kind``'s event is of that kind."""
    committing = state in (TargetState.CLAIMING, TargetState.ASKING, TargetState.STARTED)
    pull = COMMIT if (committing and kind is not TargetKind.COMMIT) or kind is TargetKind.COMMIT_AGAIN else None
    return replace(TARGET, state=state, pull=pull, attached=kind is TargetKind.OWNER_MOVED_ATTACHED)


def documented(section: str) -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    """A table of the document: (state, event) -> (next state, effects)."""
    lines = DOCUMENT.read_text().split(f"### {section}\n")[1].split("\n### ")[0].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    table = {}
    for states, kinds, following, effects in cells[1:]:
        for state in states.split(", "):
            for kind in kinds.split(", "):
                assert (state, kind) not in table, f"{state}, {kind} stands twice"
                listed = () if effects == "-" else tuple(effects.split(", "))
                table[state, kind] = (state if following == "same" else following, listed)
    return table


SOURCE_TABLE = documented("The source's table")
TARGET_TABLE = documented("The target's table")


@given(st.sampled_from(SourceState), st.sampled_from(SourceKind))
def test_every_event_in_every_state_of_the_source(state: SourceState, kind: SourceKind) -> None:
    before = replace(SOURCE, state=state)
    event = SOURCE_EVENTS[kind]
    assert source.classify(before, event) is kind
    if (state.name, kind.name) not in SOURCE_TABLE:
        with pytest.raises(ProtocolError, match=f"{kind.name} does not belong in {state.name}"):
            source.advance(before, event, NOW_S)
        return
    after, effects = source.advance(before, event, NOW_S)
    assert (after.state.name, tuple(type(effect).__name__ for effect in effects)) == SOURCE_TABLE[state.name, kind.name]
    assert after.over == (after.state in source_record.TERMINAL)
    assert (after.cause is not None) == (after.over and after.state is not SourceState.MOVED)


@given(st.sampled_from(TargetState), st.sampled_from(TargetKind))
def test_every_event_in_every_state_of_the_target(state: TargetState, kind: TargetKind) -> None:
    before = target_in(state, kind)
    event = TARGET_EVENTS[kind]
    assert target.classify(before, event) is kind
    if (state.name, kind.name) not in TARGET_TABLE:
        with pytest.raises(ProtocolError, match=f"{kind.name} does not belong in {state.name}"):
            target.advance(before, event, NOW_S)
        return
    after, effects = target.advance(before, event, NOW_S)
    assert (after.state.name, tuple(type(effect).__name__ for effect in effects)) == TARGET_TABLE[state.name, kind.name]


def test_the_document_and_the_code_have_the_same_rows() -> None:
    for table, rows in ((source.TABLE, SOURCE_TABLE), (target.TABLE, TARGET_TABLE)):
        coded = {
            (state.name, kind.name): (following.name, tuple(effect.__name__ for effect in effects))
            for (state, kind), (following, effects) in table.items()
        }
        assert coded == rows


def test_nothing_leads_out_of_an_end() -> None:
    assert not {state for state, _ in source.TABLE} & source_record.TERMINAL
    assert not {state for state, _ in target.TABLE} & target_record.TERMINAL


def test_every_wait_is_bounded() -> None:
    """Each state that waits for a peer, the ledger or a router takes TIMED_OUT, and is entered with a timer or from a
    state whose timer goes on."""
    assert {state for state, kind in source.TABLE if kind is SourceKind.TIMED_OUT} == (
        set(SourceState) - source_record.TERMINAL
    )
    assert {state for state, kind in target.TABLE if kind is TargetKind.TIMED_OUT} == (
        set(TargetState) - target_record.TERMINAL
    )


def test_a_round_copies_what_the_last_one_left() -> None:
    end, effects = source.begin(TERMS, LIMITS, blocks=10, now_s=NOW_S)
    assert effects == (se.Reserve(15), se.StartTimer(NOW_S + LIMITS.reserve_s))
    end, effects = source.advance(end, sr.Reserved(15, (5, 6, 7, 8)), NOW_S)
    assert effects[0] == se.Copy(1, 0, (5, 6, 7, 8))
    end, effects = source.advance(end, sr.Copied((5, 6, 7, 8, 1, 2, 3)), NOW_S)
    assert effects[0] == se.Copy(2, 4, (1, 2, 3))
    end, effects = source.advance(end, sr.Copied((5, 6, 7, 8, 1, 2, 3, 4, 9)), NOW_S)
    assert effects[0] == se.Freeze()
    end, effects = source.advance(end, sr.Frozen(SPEC, (5, 6, 7, 8, 1, 2, 3, 4, 9, 0), 38), NOW_S)
    assert effects[0] == se.Commit(SPEC, 7, (4, 9, 0), 38)
    end, effects = source.advance(end, sr.Committed(), NOW_S)
    assert effects == (se.RevokeLease(), se.Drop(), se.TellMoved(Ownership("B", 5), 2))


def test_a_tail_is_never_empty() -> None:
    end = replace(SOURCE, state=SourceState.FREEZING)
    _, effects = source.advance(end, sr.Frozen(SPEC, tuple(range(6)), 24), NOW_S)
    assert effects[0] == se.Commit(SPEC, 5, (5,), 24)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 4), st.integers(1, 30))
def test_rounds_end(copied: int, grown: int, rounds: int, reserved: int) -> None:
    """Rounds go on only while more than a tail is left, there is room, and the limit is not reached."""
    end = replace(SOURCE, state=SourceState.COPYING, copied_blocks=copied, rounds=rounds, reserved_blocks=reserved)
    full = copied + grown
    after, effects = source.advance(end, sr.Copied(tuple(range(full))), NOW_S)
    if full + 1 > reserved:
        assert after.cause is Cause.OUTGROWN
    elif grown > LIMITS.tail_blocks and rounds < LIMITS.max_rounds:
        assert effects[0] == se.Copy(rounds + 1, copied, tuple(range(copied, full)))
        assert (after.copied_blocks, after.rounds) == (full, rounds + 1)
    else:
        assert after.state is SourceState.FREEZING
        assert (after.copied_blocks, after.rounds) == (copied, rounds)


def test_a_sequence_that_outgrew_its_reservation_goes_on_at_the_source() -> None:
    end = replace(SOURCE, state=SourceState.FREEZING)
    after, effects = source.advance(end, sr.Frozen(SPEC, tuple(range(21)), 83), NOW_S)
    assert after.cause is Cause.OUTGROWN
    assert effects == (se.Resume(4), se.Abort(Cause.OUTGROWN))


@pytest.mark.parametrize("state", [SourceState.TAKING_BACK, SourceState.ASKING])
def test_a_sequence_taken_back_goes_on_under_the_epoch_that_was_claimed(state: SourceState) -> None:
    end = replace(SOURCE, state=state)
    _, effects = source.advance(end, OwnerIs(Ownership("A", 6)), NOW_S)
    assert effects == (se.Resume(6), se.Abort(Cause.TARGET_SILENT))


def test_the_two_claims_exclude_each_other() -> None:
    _, (_, take_back, _) = source.advance(replace(SOURCE, state=SourceState.COMMITTING), sr.NoAnswer(), NOW_S)
    pulling = replace(TARGET, state=TargetState.PULLING_TAIL, pull=COMMIT)
    _, (claim,) = target.advance(pulling, tr.Pulled(), NOW_S)
    assert isinstance(take_back, se.TakeBack)
    assert isinstance(claim, te.Claim)
    assert take_back.expected == claim.expected == Ownership("A", 4)
    assert {take_back.new, claim.new} == {Ownership("A", 6), Ownership("B", 5)}


def test_the_target_pulls_into_the_blocks_at_the_same_place() -> None:
    end = replace(TARGET, state=TargetState.RESERVED)
    after, effects = target.advance(end, tr.CopyAsked(2, 6, ticket(7, 8)), NOW_S)
    assert effects[0] == te.Pull(ticket(7, 8), (56, 57))
    after, _ = target.advance(after, tr.Pulled(), NOW_S)
    assert (after.copied_blocks, after.rounds) == (8, 2)
    after, effects = target.advance(after, tr.CommitAsked(SPEC, 7, ticket(8, 9)), NOW_S)
    assert effects[0] == te.Pull(ticket(8, 9), (57, 58))
    after, _ = target.advance(after, tr.Pulled(), NOW_S)
    _, effects = target.advance(after, OwnerIs(Ownership("B", 5)), NOW_S)
    assert effects[0] == te.Start(SPEC, 39)


@pytest.mark.parametrize(
    "call",
    [
        tr.CopyAsked(3, 6, ticket(7)),
        tr.CopyAsked(2, 5, ticket(7)),
        tr.CopyAsked(2, 7, ticket(7)),
        tr.CopyAsked(2, 6, ticket()),
        tr.CopyAsked(2, 6, ticket(*range(7))),
        tr.CommitAsked(SPEC, 7, ticket(8)),
        tr.CommitAsked(SPEC, -1, ticket(8)),
        tr.CommitAsked(SPEC, 6, ticket()),
        tr.CommitAsked(SPEC, 6, ticket(*range(7))),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: tr.TargetEvent) -> None:
    with pytest.raises(ProtocolError, match="OUT_OF_ORDER"):
        target.advance(replace(TARGET, state=TargetState.RESERVED), call, NOW_S)


def test_a_router_that_came_early_is_served_at_the_commit() -> None:
    end = replace(TARGET, state=TargetState.PULLING_TAIL, pull=COMMIT)
    for event in (tr.Attached(), tr.Pulled()):
        end, _ = target.advance(end, event, NOW_S)
    end, effects = target.advance(end, OwnerIs(Ownership("B", 5)), NOW_S)
    assert end.state is TargetState.ATTACHED
    assert te.ServeRouter() in effects


@pytest.mark.parametrize(("blocks", "reserved"), [(1, 5), (31, 38), (64, 76), (2048, 2308)])
def test_a_long_sequence_reserves_more_headroom_for_its_longer_copy(blocks: int, reserved: int) -> None:
    end, _ = source.begin(TERMS, LIMITS, blocks=blocks, now_s=NOW_S)
    assert end.reserved_blocks == reserved


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="headroom_share"):
        Limits(headroom_share=-0.1)
    with pytest.raises(ValueError, match="headroom_blocks"):
        Limits(headroom_blocks=0)

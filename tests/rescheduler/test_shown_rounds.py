"""What people are shown of rounds: through the ledger, bounded, and told of what became of each move."""

from __future__ import annotations

import dataclasses

from starmesh.ledger import LedgerUnavailable
from starmesh.rounds import MAX_ROUNDS, MoveOutcome, RoundSummary
from starmesh.types import MigrationReason
from starmesh.v1 import decode_pb2
from tests.policy.decoding import sequence
from tests.rescheduler.conftest import LEAD_S, Cluster, until
from tests.rescheduler.peers import hanging, progress, saying

FOUR = tuple(sequence(name, 100) for name in "abcd")


async def newest(mesh: Cluster) -> RoundSummary:
    return (await mesh.ledger.rounds())[0]


async def outcomes(mesh: Cluster) -> dict[str, MoveOutcome]:
    return {move.migration.request_id: move.outcome for shown in await mesh.ledger.rounds() for move in shown.moves}


async def test_a_round_is_shown_with_its_moves_and_what_became_of_them(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(*FOUR)
    decided = await rescheduler.round()
    assert decided is not None
    shown = await newest(mesh)
    assert (shown.leader, shown.term, shown.policy) == ("r0", rescheduler._lead.term, "star")
    assert (shown.first_s, shown.last_s, shown.rounds, shown.instances) == (1000.0, 1000.0, 1, 2)
    assert shown.spread_before_tokens > shown.spread_after_tokens >= 0
    assert shown.planned_moves == len(shown.moves) == len(decided.migrations) == 1
    (move,) = shown.moves
    assert (move.migration.source, move.migration.target) == ("d0", "d1")
    assert (move.migration.reason, move.outcome) == (MigrationReason.LOAD, MoveOutcome.UNDER_WAY)
    assert sum(shown.skipped_sequences.values()) == sum(len(skip.request_ids) for skip in decided.skipped) > 0
    await mesh.d0.report(*FOUR[1:])
    await mesh.d1.report(dataclasses.replace(FOUR[0], epoch=2))
    await until(lambda: "1 endings" in repr(rescheduler._commander))
    await rescheduler.round()
    (move,) = (move for shown in await mesh.ledger.rounds() for move in shown.moves if move.migration.request_id == "a")
    assert move.outcome is MoveOutcome.MOVED and move.duration_s > 0 and move.words.startswith("moved: ")


async def test_refusals_are_shown_with_their_reason(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = saying(
        progress(
            decode_pb2.MIGRATION_STAGE_STAYED,
            cause=decode_pb2.MIGRATION_CAUSE_REFUSED,
            refusal=decode_pb2.MIGRATION_REFUSAL_NO_ROOM,
        )
    )
    await mesh.d0.report(*FOUR[:2])
    await rescheduler.round()
    await until(lambda: rescheduler.memory.cool_downs, rescheduler.round)
    failed = [
        move for shown in await mesh.ledger.rounds() for move in shown.moves if move.outcome is MoveOutcome.FAILED
    ]
    assert failed and "no room" in failed[0].words.replace("_", " ")


async def test_rounds_that_move_nothing_are_one(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    for _ in range(5):
        await rescheduler.round()
        mesh.clock.advance(1.0)
    (shown,) = await mesh.ledger.rounds()
    assert (shown.rounds, shown.first_s, shown.last_s, shown.moves) == (5, 1000.0, 1004.0, ())


async def test_a_new_leader_goes_on_with_the_list(mesh: Cluster) -> None:
    first, second = mesh.start("r0"), mesh.start("r1")
    mesh.d0.answer = hanging()
    await mesh.d0.report(*FOUR)
    await first.round()
    mesh.clock.advance(LEAD_S)
    await mesh.d0.report()
    await mesh.d1.report()
    await second.round()
    rounds = await mesh.ledger.rounds()
    assert [shown.leader for shown in rounds] == ["r1", "r0"]
    assert await outcomes(mesh) == {"a": MoveOutcome.FAILED}


async def test_what_only_reports_tell_is_shown_too(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = hanging()
    await mesh.d0.report(*FOUR)
    await rescheduler.round()
    await mesh.d0.report(*FOUR[1:])
    await mesh.d1.report(dataclasses.replace(FOUR[0], epoch=2))
    await rescheduler.round()
    assert (await outcomes(mesh))["a"] is MoveOutcome.MOVED


async def test_a_sequence_of_which_nothing_is_heard_is_gone(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(*FOUR[:2])
    await rescheduler.round()
    rescheduler.memory = rescheduler.memory.withdrawn("a")
    await rescheduler._commander.abandon()
    await mesh.d0.report()
    await rescheduler.round()
    assert await outcomes(mesh) == {"a": MoveOutcome.GONE}


async def test_the_list_is_bounded(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(*FOUR)
    decided = await rescheduler.round()
    assert decided is not None
    view = await mesh.ledger.view()
    for term in range(MAX_ROUNDS + 5):
        await rescheduler._shown.add(term, view, decided)
    rounds = await mesh.ledger.rounds()
    assert [shown.term for shown in rounds] == list(range(MAX_ROUNDS + 4, 4, -1))


async def test_no_round_fails_for_it(mesh: Cluster) -> None:
    rescheduler = mesh.start()

    async def unseen(*_: object, **__: object) -> None:
        raise LedgerUnavailable("down")

    mesh.ledger.rounds = mesh.ledger.publish_rounds = unseen  # type: ignore[assignment]
    await mesh.d0.report(*FOUR)
    decided = await rescheduler.round()
    assert decided is not None and decided.migrations
    await until(lambda: mesh.d0.asked)

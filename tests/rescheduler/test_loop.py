"""Rounds against real peers: what is moved, what is remembered, and who leads. Time is the ledger's, and virtual."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rescheduler.loop import until_next
from starmesh.policy.rescheduling import InstanceSkip, PlanMemory
from starmesh.rpc.status import StatusError
from starmesh.types import Leadership, Role, SequenceLoad
from starmesh.v1 import decode_pb2
from tests.policy.decoding import CONFIG, sequence
from tests.rescheduler.conftest import LEAD_S, Cluster, until
from tests.rescheduler.peers import MOVED, hanging, progress, saying

# Against none: of two one is moved, of four two, one in each round; "a" first, as the first of equals.
FOUR = tuple(sequence(name, 100) for name in "abcd")
TWO = FOUR[:2]
REFUSED = saying(
    progress(
        decode_pb2.MIGRATION_STAGE_STAYED,
        cause=decode_pb2.MIGRATION_CAUSE_REFUSED,
        refusal=decode_pb2.MIGRATION_REFUSAL_NO_ROOM,
    )
)


def asked(mesh: Cluster) -> list[str]:
    return [request.request_id for request in mesh.d0.asked]


def moved(known: SequenceLoad) -> SequenceLoad:
    return dataclasses.replace(known, epoch=known.epoch + 1)


async def test_a_round_moves_and_remembers(mesh: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rescheduler = mesh.start()
    await mesh.d0.report(*TWO)
    decided = await rescheduler.round()
    assert decided is not None and [move.request_id for move in decided.migrations] == ["a"]
    assert rescheduler.memory == decided.memory
    leads = await mesh.ledger.leader(Role.RESCHEDULER)
    assert leads is not None
    await until(lambda: "1 endings" in repr(rescheduler._commander))
    await mesh.d0.report(TWO[1])
    await mesh.d1.report(moved(TWO[0]))
    decided = await rescheduler.round()
    assert decided is not None and decided.migrations == ()
    (request,) = mesh.d0.asked
    assert (request.request_id, request.epoch, request.target_address) == ("a", 1, mesh.d1.address)
    assert request.leader_term == leads.term
    (cool,) = rescheduler.memory.cool_downs
    assert (cool.request_id, cool.until_s, cool.failures) == ("a", 1010.0, 0)
    assert rescheduler.memory.transfer_factor != 1.0
    assert "star moves a from d0 to d1 (load, gain " in caplog.text
    assert "a, from d0 to d1, after " in caplog.text


async def test_an_idle_cluster_is_left_alone(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    decided = await rescheduler.round()
    assert decided is not None and decided.migrations == ()
    assert rescheduler.memory == PlanMemory()


async def test_failed_moves_rest_before_they_are_tried_again(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = REFUSED
    await mesh.d0.report(*TWO)
    await rescheduler.round()
    await until(lambda: rescheduler.memory.cool_downs, rescheduler.round)
    # "a" rests: "b" is tried instead, and rests too.
    await until(lambda: len(rescheduler.memory.cool_downs) == 2, rescheduler.round)
    for _ in range(3):
        decided = await rescheduler.round()
        assert decided is not None and decided.migrations == ()
    assert asked(mesh) == ["a", "b"]
    assert [cool.failures for cool in rescheduler.memory.cool_downs] == [1, 1]
    for _ in range(2):
        mesh.clock.advance(5)
        await mesh.d0.report(*TWO)
        await mesh.d1.report()
        await rescheduler.round()
    await until(lambda: len(mesh.d0.asked) == 3)
    assert asked(mesh) == ["a", "b", "a"]
    # Twice in a row: twice as long.
    await until(lambda: rescheduler.memory.cool_downs[0].failures == 2, rescheduler.round)
    assert rescheduler.memory.cool_downs[0].until_s == mesh.clock.now_s() + 20


async def test_a_sequence_that_ended_leaves_nothing_behind(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    finished = progress(decode_pb2.MIGRATION_STAGE_ENDED, cause=decode_pb2.MIGRATION_CAUSE_FINISHED)
    mesh.d0.answer = saying(finished)
    await mesh.d0.report(*FOUR)
    await rescheduler.round()
    await mesh.d0.report()
    await until(lambda: rescheduler.memory == PlanMemory(), rescheduler.round)
    assert asked(mesh) == ["a"]


async def test_a_busy_source_is_no_fault_of_the_target(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = saying(StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "4 sequences are on their way from here"))
    await mesh.d0.report(*TWO)
    # More often than a target may fail.
    await until(lambda: len(mesh.d0.asked) > rescheduler._config.max_target_failures, rescheduler.round)
    resting = rescheduler.memory.cool_downs
    assert resting == ()
    mesh.d0.answer = MOVED
    await until(lambda: rescheduler.memory.cool_downs, rescheduler.round)
    assert rescheduler.memory.cool_downs[0].failures == 0


async def test_a_report_tells_what_the_source_did_not(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = hanging()
    await mesh.d0.report(*FOUR)
    await rescheduler.round()
    await until(lambda: mesh.d0.asked)
    await mesh.d0.report(*FOUR[1:])
    await mesh.d1.report(moved(FOUR[0]))
    await rescheduler.round()
    assert not [entry for entry in rescheduler.memory.in_flight if entry.migration.request_id == "a"]
    assert "<commander of " in repr(rescheduler._commander)
    assert all(move.request_id != "a" for move in rescheduler._commander._following)


async def test_stale_reports_are_ignored(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(*FOUR)
    mesh.clock.advance(CONFIG.stale_after_s + 0.1)
    await mesh.d1.report()
    decided = await rescheduler.round()
    assert decided is not None and decided.migrations == ()
    assert InstanceSkip.STALE in {skip.reason for skip in decided.skipped_instances}


async def test_large_clusters_are_planned_beside_the_event_loop(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(
        *(sequence(f"s{number}", 2) for number in range(900)),
        *(sequence(f"w{number}", 2, resident_tokens=0) for number in range(1200)),
    )
    decided = await rescheduler.round()
    assert decided is not None and len(decided.migrations) == 1
    await until(lambda: mesh.d0.asked)


async def test_one_of_two_acts_and_the_other_takes_over_when_the_lease_ends(mesh: Cluster) -> None:
    first, second = mesh.start("r0"), mesh.start("r1")
    await mesh.d0.report(*FOUR)
    assert await first.round() is not None
    assert await second.round() is None
    await until(lambda: mesh.d0.asked)
    # r0 is heard of no more, as after kill -9; r1 takes over within the lease and not before.
    mesh.clock.advance(LEAD_S - 0.1)
    assert await second.round() is None
    mesh.clock.advance(0.1)
    for peer, sequences in ((mesh.d0, FOUR), (mesh.d1, ())):
        await peer.report(*sequences)
    decided = await second.round()
    assert decided is not None and decided.migrations
    assert await mesh.ledger.leader(Role.RESCHEDULER) == Leadership("r1", second._lead.term or 0)
    await until(lambda: len(mesh.d0.asked) == 2)
    old, new = (request.leader_term for request in mesh.d0.asked)
    assert 0 < old < new
    # r0 was only asleep.
    assert first.memory != PlanMemory()
    assert await first.round() is None
    assert first.memory == PlanMemory()


async def test_a_leader_that_slept_too_long_begins_anew(mesh: Cluster) -> None:
    rescheduler = mesh.start()
    mesh.d0.answer = hanging()
    await mesh.d0.report(*FOUR)
    await rescheduler.round()
    term = rescheduler._lead.term
    assert rescheduler.memory.in_flight and term is not None
    mesh.clock.advance(LEAD_S)
    assert await rescheduler.round() is not None
    assert rescheduler.memory == PlanMemory() and (rescheduler._lead.term or 0) > term
    assert repr(rescheduler._commander) == "<commander of 0 migrations, 0 endings to tell>"


async def test_who_is_replaced_while_planning_commands_nothing(mesh: Cluster) -> None:
    first = mesh.start("r0")
    await mesh.d0.report(*FOUR)

    async def sleep_and_be_replaced() -> None:
        mesh.clock.advance(LEAD_S)
        assert await mesh.ledger.lead(Role.RESCHEDULER, "r1", "one", ttl_s=LEAD_S) is not None

    mesh.ledger.after_view = sleep_and_be_replaced
    assert await first.round() is None
    assert first.memory == PlanMemory() and first._lead.term is None
    assert mesh.d0.asked == []


async def test_a_predecessors_migrations_count(mesh: Cluster) -> None:
    config = dataclasses.replace(CONFIG, max_in_flight_per_source=2)
    rescheduler = mesh.start(config=config)
    await mesh.d0.report(*FOUR, outgoing_migrations=2)
    await mesh.d1.report(incoming_migrations=2)
    decided = await rescheduler.round()
    assert decided is not None and decided.migrations == ()
    await mesh.d0.report(*FOUR[2:])
    await mesh.d1.report()
    decided = await rescheduler.round()
    assert decided is not None and len(decided.migrations) == 1


async def test_rounds_wait_for_the_ledger(mesh: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    rescheduler = mesh.start()
    await mesh.d0.report(*FOUR)
    mesh.ledger.down = True
    for _ in range(5):
        assert await rescheduler.round() is None
    assert caplog.text.count("the ledger does not answer, rounds wait") == 1
    mesh.ledger.down = False
    assert await rescheduler.round() is not None
    await until(lambda: mesh.d0.asked)


async def test_a_round_that_fails_is_not_the_last(mesh: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    rescheduler = mesh.start()
    rescheduler._interval_s = 0.01
    await mesh.d0.report(*FOUR)

    async def fail() -> None:
        raise RuntimeError("a bug")

    mesh.ledger.after_view = fail
    stop = asyncio.Event()
    running = asyncio.create_task(rescheduler.run(stop))
    await until(lambda: mesh.d0.asked)
    stop.set()
    await running
    assert "a round failed" in caplog.text


async def test_who_stops_resigns(mesh: Cluster) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(mesh.start("r0").run(stop))
    while await mesh.ledger.leader(Role.RESCHEDULER) is None:
        await asyncio.sleep(0)
    stop.set()
    await running
    assert await mesh.ledger.leader(Role.RESCHEDULER) is None
    assert await mesh.start("r1").round() is not None


@given(st.floats(0, 1e6), st.floats(0, 1e4), st.sampled_from([0.05, 0.3, 1.0, 30.0]))
def test_rounds_begin_at_multiples_of_the_interval(first_s: float, passed_s: float, interval_s: float) -> None:
    wait_s = until_next(first_s, first_s + passed_s, interval_s)
    assert 0 < wait_s <= interval_s
    beginnings = (passed_s + wait_s) / interval_s
    assert beginnings == pytest.approx(round(beginnings), abs=1e-3)

"""What rescheduling remembers: outcomes told and outcomes noticed, cool-downs, and what in-flight migrations weigh."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.policy.rescheduling import CoolDown, InFlight, PlanMemory, SequenceSkip, plan
from starmesh.types import ClusterView, InstanceView, Migration, MigrationReason

from .decoding import CONFIG, applied, decode, sequence
from .views import NOW_S, cluster

pytestmark = pytest.mark.fast

MOVE = Migration("a", "d0", "d1", 1, MigrationReason.LOAD, 1.0)
FLYING = PlanMemory().started((InFlight(MOVE, NOW_S, estimate_s=0.2),))
BUSY = decode("d0", sequence("a", 100), sequence("b", 100), sequence("c", 100), sequence("d", 100))


def at(now_s: float, *instances: InstanceView) -> ClusterView:
    return ClusterView(now_s, tuple(dataclasses.replace(found, reported_at_s=now_s) for found in instances))


def moved(view: ClusterView, memory: PlanMemory) -> list[tuple[str, str]]:
    return [(move.request_id, move.target) for move in plan(view, memory, CONFIG).migrations]


def test_success_cools_down_and_teaches_the_cost() -> None:
    memory = FLYING.succeeded("a", duration_s=0.6, now_s=NOW_S + 1, config=CONFIG)
    assert memory.in_flight == ()
    assert memory.cool_downs == (CoolDown("a", "d0", "d1", NOW_S + 11, settled_s=NOW_S + 3),)
    # A tenth of the way from 1 to 0.6 / 0.2.
    assert memory.transfer_factor == pytest.approx(1.2)


def test_failures_in_a_row_rest_longer() -> None:
    memory, rests = FLYING, []
    for _ in range(9):
        memory = memory.failed("a", now_s=NOW_S, config=CONFIG)
        rests.append(memory.cool_downs[0].until_s - NOW_S)
        memory = memory.started(FLYING.in_flight)
    assert rests == [10, 20, 40, 80, 160, 320, 640, 640, 640]
    assert memory.succeeded("a", duration_s=0.2, now_s=NOW_S, config=CONFIG).cool_downs[0].failures == 0


def test_outcomes_of_the_unknown_change_nothing() -> None:
    assert FLYING.succeeded("b", duration_s=1.0, now_s=NOW_S, config=CONFIG) is FLYING
    assert FLYING.failed("b", now_s=NOW_S, config=CONFIG) is FLYING


def test_a_report_that_shows_the_move_ends_it() -> None:
    done = at(NOW_S + 1, decode("d0"), decode("d1", sequence("a", 100, epoch=2)))
    assert plan(done, FLYING, CONFIG).memory.cool_downs == (CoolDown("a", "d0", "d1", NOW_S + 11, settled_s=NOW_S + 3),)
    # The same epoch, or another instance, does not.
    for other in (decode("d1", sequence("a", 100, epoch=1)), decode("d2", sequence("a", 100, epoch=2))):
        assert plan(at(NOW_S + 1, decode("d0"), other), FLYING, CONFIG).memory.in_flight == FLYING.in_flight


def test_silence_is_a_failure_in_the_end() -> None:
    view = at(NOW_S + 59, BUSY, decode("d1"))
    assert plan(view, FLYING, CONFIG).memory.in_flight[0] == FLYING.in_flight[0]
    late = plan(at(NOW_S + 60, BUSY, decode("d1")), FLYING, CONFIG)
    assert late.memory.cool_downs == (CoolDown("a", "d0", "d1", NOW_S + 70, failures=1),)
    # Only the sequence rests: nothing was moved, so the ends are free.
    assert [move.request_id for move in late.migrations] == ["b"]


def test_cool_downs_end_and_are_forgotten() -> None:
    memory = FLYING.succeeded("a", duration_s=0.2, now_s=NOW_S, config=CONFIG)
    there = dataclasses.replace(BUSY, info=decode("d1").info)
    settling = plan(at(NOW_S + 1.9, decode("d0"), there), memory, CONFIG)
    # d1 has received a: it sends nothing.
    reasons = {name: skip.reason for skip in settling.skipped for name in skip.request_ids}
    assert settling.migrations == ()
    assert reasons == {"a": SequenceSkip.COOLING_DOWN} | dict.fromkeys("bcd", SequenceSkip.SETTLING)
    assert moved(at(NOW_S + 9, decode("d0"), there), memory) == [("b", "d0")]
    rested = plan(at(NOW_S + 10, decode("d0"), there), memory, CONFIG)
    assert [move.request_id for move in rested.migrations] == ["a"]
    assert rested.memory.cool_downs == ()
    failed = FLYING.failed("a", now_s=NOW_S, config=CONFIG)
    remembered = plan(at(NOW_S + 100, decode("d0")), failed, CONFIG).memory
    assert remembered.cool_downs == failed.cool_downs
    assert plan(at(NOW_S + 650, decode("d0")), failed, CONFIG).memory.cool_downs == ()


def test_in_flight_migrations_weigh_at_their_target() -> None:
    # 400 against 0: two of four level it. One is under way, so one more goes, and then none.
    first = plan(at(NOW_S, BUSY, decode("d1")), FLYING, CONFIG)
    assert [move.request_id for move in first.migrations] == ["b"]
    assert moved(at(NOW_S, BUSY, decode("d1")), first.memory) == []
    # To d1 it needs room beside what is on its way there: 2 x 9 blocks, when d1 has 17.
    tight = decode("d1", total_blocks=17)
    assert moved(at(NOW_S, BUSY, tight), PlanMemory()) == [("a", "d1")]
    assert moved(at(NOW_S, BUSY, tight), FLYING) == []


def test_a_target_that_keeps_failing_is_left_alone() -> None:
    memory = PlanMemory(
        cool_downs=tuple(CoolDown(f"x{number}", "d0", "d1", NOW_S + 5, failures=1) for number in range(3))
    )
    view = cluster(BUSY, decode("d1"), decode("d2", sequence("e", 50)))
    assert moved(view, PlanMemory()) == [("a", "d1")]
    assert moved(view, memory) == [("a", "d2")]


def test_a_drain_does_not_wait_for_cool_downs() -> None:
    view = cluster(BUSY, decode("d1"))
    decided = plan(view, PlanMemory(), dataclasses.replace(CONFIG, policy="star_plus"))
    assert len(decided.migrations) == 2
    after = applied(view, decided)
    draining = tuple(
        dataclasses.replace(found, info=dataclasses.replace(found.info, state=state))
        for found, state in zip(
            after.instances, (after.instances[0].info.state, type(after.instances[0].info.state).DRAINING), strict=True
        )
    )
    back = plan(ClusterView(NOW_S, draining), decided.memory, CONFIG)
    assert sorted(move.request_id for move in back.migrations) == ["a", "b"]
    assert {move.reason for move in back.migrations} == {MigrationReason.DRAIN}


def test_a_withdrawn_migration_leaves_nothing_behind() -> None:
    assert FLYING.withdrawn("a") == PlanMemory()
    assert FLYING.withdrawn("b") == FLYING

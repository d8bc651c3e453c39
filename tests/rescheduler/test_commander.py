"""Commands to a real peer: what is asked, what its answers mean, and what bounds a migration that does not end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from services.rescheduler.commander import Commander, Order
from services.rescheduler.ending import Ending, Outcome
from starmesh.rpc.status import StatusError
from starmesh.types import ClusterView, Migration, MigrationReason
from starmesh.v1 import decode_pb2
from tests.rescheduler.conftest import Cluster, until
from tests.rescheduler.peers import MOVED, hanging, progress, saying

MOVE = Migration("a", "d0", "d1", 3, MigrationReason.PREDICTED_LOAD, 12.5)
TRACEPARENT = f"00-{'1' * 32}-{'2' * 16}-01"
STAYED, ENDED = decode_pb2.MIGRATION_STAGE_STAYED, decode_pb2.MIGRATION_STAGE_ENDED


@asynccontextmanager
async def commander(**options: float) -> AsyncIterator[Commander]:
    made = Commander(**{"timeout_s": 30.0, "retry_delay_s": 0.0} | options)
    try:
        yield made
    finally:
        await made.close()


def order(mesh: Cluster, term: int = 7) -> Order:
    return Order(MOVE, mesh.d0.address, mesh.d1.address, term, TRACEPARENT)


async def ending(commanding: Commander) -> Ending:
    found: list[Ending] = []
    await until(lambda: found, lambda: _take(commanding, found))
    (only,) = found
    return only


async def _take(commanding: Commander, found: list[Ending]) -> None:
    found.extend(commanding.take_endings())


async def told(mesh: Cluster, *answers: Any) -> Ending:
    mesh.d0.answers = list(answers)
    async with commander() as commanding:
        commanding.issue(order(mesh))
        return await ending(commanding)


async def test_the_source_is_told_all_that_it_needs(mesh: Cluster) -> None:
    found = await told(mesh, MOVED)
    assert mesh.d0.asked == [
        decode_pb2.MigrateRequest(
            request_id="a",
            epoch=3,
            target_instance_id="d1",
            target_address=mesh.d1.address,
            reason=decode_pb2.MIGRATION_REASON_PREDICTED_LOAD,
            traceparent=TRACEPARENT,
            leader_term=7,
        )
    ]
    assert (found.migration, found.outcome) == (MOVE, Outcome.MOVED)
    assert found.duration_s > 0 and "2 rounds" in found.what


@pytest.mark.parametrize(
    ("last", "outcome", "what"),
    [
        (
            {"stage": STAYED, "cause": decode_pb2.MIGRATION_CAUSE_REFUSED, "refusal": 1},
            Outcome.FAILED,
            "stayed: refused (no room)",
        ),
        ({"stage": STAYED, "cause": decode_pb2.MIGRATION_CAUSE_PREEMPTED}, Outcome.FAILED, "stayed: preempted"),
        ({"stage": STAYED, "cause": decode_pb2.MIGRATION_CAUSE_SUPERSEDED}, Outcome.GONE, "stayed: superseded"),
        ({"stage": ENDED, "cause": decode_pb2.MIGRATION_CAUSE_FINISHED}, Outcome.GONE, "ended: finished"),
        ({"stage": ENDED, "cause": decode_pb2.MIGRATION_CAUSE_CANCELLED}, Outcome.GONE, "ended: cancelled"),
        (
            {"stage": decode_pb2.MIGRATION_STAGE_IN_DOUBT, "cause": decode_pb2.MIGRATION_CAUSE_OWNER_UNKNOWN},
            Outcome.FAILED,
            "in doubt: owner unknown",
        ),
        ({"stage": STAYED, "cause": 99, "refusal": 98}, Outcome.FAILED, "stayed: 99 (98)"),
    ],
)
async def test_last_words(mesh: Cluster, last: dict[str, Any], outcome: Outcome, what: str) -> None:
    found = await told(mesh, saying(progress(decode_pb2.MIGRATION_STAGE_COPYING), progress(**last)))
    assert (found.outcome, found.what) == (outcome, what)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (grpc.StatusCode.NOT_FOUND, Outcome.GONE),
        (grpc.StatusCode.FAILED_PRECONDITION, Outcome.FAILED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Outcome.GONE),
    ],
)
async def test_refused_commands_are_not_repeated(mesh: Cluster, code: grpc.StatusCode, outcome: Outcome) -> None:
    found = await told(mesh, saying(StatusError(code, "why")), MOVED)
    assert (found.outcome, found.what) == (outcome, f"{code.name}: why")
    assert len(mesh.d0.asked) == 1


@pytest.mark.parametrize(
    "broken",
    [
        saying(progress(decode_pb2.MIGRATION_STAGE_COPYING), StatusError(grpc.StatusCode.UNAVAILABLE, "cut")),
        saying(StatusError(grpc.StatusCode.ABORTED, "cut")),
        saying(progress(decode_pb2.MIGRATION_STAGE_COPYING)),
    ],
    ids=["midway", "at once", "without an end"],
)
async def test_a_broken_call_is_taken_up_again(mesh: Cluster, broken: Any) -> None:
    found = await told(mesh, broken, broken, MOVED)
    assert found.outcome is Outcome.MOVED
    assert mesh.d0.asked == [order(mesh).request(TRACEPARENT)] * 3


async def test_it_is_not_taken_up_for_ever(mesh: Cluster) -> None:
    cut = saying(StatusError(grpc.StatusCode.UNAVAILABLE, "cut"))
    found = await told(mesh, cut, cut, cut, MOVED)
    assert (found.outcome, found.what) == (Outcome.FAILED, "UNAVAILABLE: cut")


async def test_a_sequence_that_moved_behind_a_broken_call_rests(mesh: Cluster) -> None:
    cut = saying(progress(decode_pb2.MIGRATION_STAGE_COMMITTING), StatusError(grpc.StatusCode.UNAVAILABLE, "cut"))
    found = await told(mesh, cut, saying(StatusError(grpc.StatusCode.NOT_FOUND, "no such sequence")))
    assert found.outcome is Outcome.FAILED


async def test_a_migration_without_an_end_has_failed(mesh: Cluster) -> None:
    mesh.d0.answer = hanging()
    async with commander(timeout_s=0.3) as commanding:
        commanding.issue(order(mesh))
        found = await ending(commanding)
    assert found.outcome is Outcome.FAILED


async def test_a_source_that_left_ends_its_migrations(mesh: Cluster) -> None:
    mesh.d0.answer = hanging()
    async with commander() as commanding:
        commanding.issue(order(mesh))
        await until(lambda: mesh.d0.asked)
        await commanding.retain([MOVE], await mesh.ledger.view())
        assert commanding.take_endings() == []
        await mesh.d0.leave()
        await commanding.retain([MOVE], await mesh.ledger.view())
        (found,) = commanding.take_endings()
        assert found.outcome is Outcome.GONE
        await commanding.retain([MOVE], ClusterView(0.0))
        assert commanding.take_endings() == []


async def test_migrations_that_are_over_otherwise_are_followed_no_more(mesh: Cluster) -> None:
    mesh.d0.answer = hanging()
    async with commander() as commanding:
        commanding.issue(order(mesh))
        await until(lambda: mesh.d0.asked)
        await commanding.retain([], await mesh.ledger.view())
        assert repr(commanding) == "<commander of 0 migrations, 0 endings to tell>"


async def test_an_old_leaders_command_is_refused(mesh: Cluster) -> None:
    async with commander() as old, commander() as new:
        new.issue(order(mesh, term=8))
        assert (await ending(new)).outcome is Outcome.MOVED
        old.issue(order(mesh, term=7))
        found = await ending(old)
    assert (found.outcome, found.what) == (Outcome.FAILED, "FAILED_PRECONDITION: an old leader's term")

"""What watchers of a cluster are told beyond its instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from services.router.cluster_frames import instance_messages
from services.router.looks import Look
from services.router.move_messages import move_messages, round_messages
from services.router.seen_moves import SeenMove
from starmesh.rounds import MoveOutcome, RoundMove, RoundSummary
from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceView,
    Migration,
    MigrationReason,
    Role,
    SequenceLoad,
)
from starmesh.v1 import cluster_pb2, decode_pb2
from tests.router.conftest import TIMEOUT_S, Mesh
from tests.router.test_moves import Answer, flight_of, others, running

FAST = Duration(nanos=100_000_000)


async def frames(mesh: Mesh, **fields: Any) -> AsyncIterator[cluster_pb2.WatchClusterResponse]:
    call = mesh.cluster.WatchCluster(cluster_pb2.WatchClusterRequest(interval=FAST, **fields), timeout=TIMEOUT_S)
    try:
        async for frame in call:
            yield frame
    finally:
        call.cancel()


async def frame_with(
    mesh: Mesh, condition: Callable[[cluster_pb2.WatchClusterResponse], object]
) -> cluster_pb2.WatchClusterResponse:
    async with asyncio.timeout(TIMEOUT_S), aclosing(frames(mesh)) as seen:
        async for frame in seen:
            if condition(frame):
                return frame
    raise AssertionError("the router ended the stream")


async def moved(mesh: Mesh, answer: Answer, source: Any) -> str:
    """Has ``r`` moved, and answered to its end. Returns where it went."""
    (target,) = others(mesh, source)
    await source.move("r", target)
    source.resume()
    await answer
    return str(target.instance_id)


async def test_a_move_is_told_with_its_gap(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    target = await moved(mesh, answer, source)
    frame = await frame_with(mesh, lambda frame: frame.migrations)
    (move,) = frame.migrations
    assert (move.request_id, move.source_instance_id, move.target_instance_id) == ("r", source.instance_id, target)
    assert (move.outcome, move.reason) == (cluster_pb2.MIGRATION_OUTCOME_MOVED, decode_pb2.MIGRATION_REASON_UNSPECIFIED)
    assert move.output_tokens == 5 and move.HasField("gap") and move.HasField("age")
    assert list(frame.rounds) == []


async def test_a_round_says_why_and_the_stream_says_how_long(mesh: Mesh) -> None:
    answer, source = await running(mesh)
    epoch = flight_of(mesh).stream.epoch
    target = await moved(mesh, answer, source)
    view = await mesh.ledger.view()
    move = Migration("r", source.instance_id, target, epoch, MigrationReason.MEMORY, 44.0)
    other = Migration("elsewhere", "decode-8", "decode-9", 3, MigrationReason.LOAD, 5.0)
    shown = RoundSummary(
        leader="rescheduler-0",
        term=7,
        policy="star",
        first_s=view.now_s - 2,
        last_s=view.now_s - 2,
        instances=2,
        spread_before_tokens=10.0,
        spread_after_tokens=1.0,
        planned_moves=2,
        # Its leader was replaced, and does not know what this router has seen.
        moves=(RoundMove(move, MoveOutcome.FAILED, words="its leader was replaced"), RoundMove(other)),
        skipped_sequences={"no_gain": 3},
    )
    await mesh.ledger.publish_rounds([shown], ttl_s=60)
    frame = await frame_with(mesh, lambda frame: frame.rounds)
    (told,) = frame.rounds
    assert (told.leader_instance_id, told.policy, dict(told.skipped_sequences)) == (
        "rescheduler-0",
        "star",
        {"no_gain": 3},
    )
    assert told.age.seconds >= 1 and told.planned_moves == 2
    assert sorted(item.request_id for item in frame.migrations) == ["elsewhere", "r"]
    (mine,) = (item for item in frame.migrations if item.request_id == "r")
    assert (mine.reason, mine.gain_tokens) == (decode_pb2.MIGRATION_REASON_MEMORY, 44.0)
    assert (mine.outcome, mine.description) == (cluster_pb2.MIGRATION_OUTCOME_MOVED, "")
    assert mine.HasField("gap")
    (theirs,) = (item for item in frame.migrations if item.request_id == "elsewhere")
    assert theirs.outcome == cluster_pb2.MIGRATION_OUTCOME_UNDER_WAY and not theirs.HasField("gap")


async def test_latencies_rates_and_the_predictor_are_told(mesh: Mesh) -> None:
    await mesh.start()
    await mesh.add_predictor()
    async for _ in mesh.generate():
        pass
    frame = await frame_with(mesh, lambda frame: frame.activity.finished_requests and frame.predictor.version)
    assert frame.activity.ttft.count == frame.activity.tpot.count == frame.activity.end_to_end.count == 1
    assert frame.activity.end_to_end.p99.ToNanoseconds() >= frame.activity.ttft.p50.ToNanoseconds() > 0
    assert frame.activity.window.seconds == 300 and len(frame.activity.ttft.p99_history) == 30
    assert frame.router_id.startswith("router-")


async def test_a_ledger_that_is_away_is_not_waited_for(mesh: Mesh) -> None:
    await mesh.start()
    async with aclosing(frames(mesh)) as seen:
        assert (await anext(seen)).ledger_available
        mesh.ledger.down = True
        async with asyncio.timeout(TIMEOUT_S):
            async for frame in seen:
                if not frame.ledger_available:
                    break


@pytest.mark.fast
def test_a_move_that_was_planned_twice_was_seen_once() -> None:
    migration = Migration("r", "d0", "d1", 1, MigrationReason.LOAD)
    seen = SeenMove("r", "d0", "d1", 1, at_s=5.0, output_tokens=7, gap_s=0.1)
    again, before = (
        RoundSummary(
            leader="a", term=1, policy="star", first_s=at_s, last_s=at_s, moves=(RoundMove(migration, outcome),)
        )
        for at_s, outcome in ((4.0, MoveOutcome.UNDER_WAY), (2.0, MoveOutcome.GONE))
    )
    rounds = round_messages([again, before], [seen], now_s=6.0)
    moves = move_messages(rounds, [seen], now_s=6.0)
    assert [(move.outcome, move.HasField("gap")) for move in moves] == [
        (cluster_pb2.MIGRATION_OUTCOME_MOVED, True),
        (cluster_pb2.MIGRATION_OUTCOME_GONE, False),
    ]


def sequence(name: str, resident: int, remaining: int | None = None) -> SequenceLoad:
    known = (None, None, None) if remaining is None else (remaining, 2 * remaining, 0)
    return SequenceLoad(name, 1, resident - 10, 10, resident, 1000, *known)


def view(*instances: tuple[SequenceLoad, ...]) -> ClusterView:
    return ClusterView(
        now_s=1.0,
        instances=tuple(
            InstanceView(
                InstanceInfo(f"decode-{number}", "one", Role.DECODE, "a:1"),
                InstanceLoad(100, 50, running_sequences=len(sequences), sequences=sequences),
            )
            for number, sequences in enumerate(instances)
        ),
    )


@pytest.mark.fast
def test_predicted_tokens_and_their_peak() -> None:
    messages = instance_messages(
        view(
            (sequence("a", 100, 50), sequence("b", 40, 200)),
            (sequence("c", 100), sequence("d", 60)),
            (),
            (sequence("e", 30, 5), sequence("f", 20)),
        )
    )
    # a ends after 50 steps: 150 + 90 then, 240 at b's end.
    assert [(item.predicted_tokens, item.peak_tokens) for item in messages[:3]] == [(390, 240), (160, 0), (0, 0)]
    assert messages[3].predicted_tokens == 55 and messages[3].peak_tokens > 50


@pytest.mark.fast
@pytest.mark.parametrize(("limit", "listed"), [(0, 6), (4, 2), (1, 1), (100, 6)])
def test_the_largest_sequences_are_listed(limit: int, listed: int) -> None:
    sequences = tuple(sequence(name, 20 + (7 * place) % 40) for place, name in enumerate("abcdef"))
    first, second = instance_messages(view(sequences, sequences[:3]), max_sequences=limit)
    sizes = [item.resident_tokens for item in first.load.sequences]
    assert sorted(sizes) == sorted(item.resident_tokens for item in sequences)[-listed:]
    assert len(second.load.sequences) == min(3, listed)
    order = [item.request_id for item in sequences]
    assert [item.request_id for item in first.load.sequences] == sorted(
        (item.request_id for item in first.load.sequences), key=order.index
    )
    assert first.load.running_sequences == 6


async def test_a_look_asks_once_at_a_time_and_waits_only_for_the_first_answer() -> None:
    asked, gate = 0, asyncio.Event()

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await gate.wait()
        return asked

    look: Look[int] = Look(ask, 0, interval_s=0.0, patience_s=0.01)
    assert await look.value() == 0
    assert await look.value() == 0 and asked == 1
    gate.set()
    async with asyncio.timeout(TIMEOUT_S):
        while not await look.value():
            await asyncio.sleep(0)
    await look.close()
    gate.clear()
    assert await look.value() >= 1
    await look.close()

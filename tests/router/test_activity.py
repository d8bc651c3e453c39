"""What a router counts of its requests, on a clock of the test's."""

from __future__ import annotations

import grpc
import pytest

from services.router.activity import Activity
from services.router.flight import Flight
from services.router.seen_moves import MAX_MOVES, SeenMoves
from starmesh.rpc.status import StatusError
from starmesh.types import FinishReason, Migration, MigrationReason

pytestmark = pytest.mark.fast


class Time:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def flight(request_id: str = "r", *, brought: int = 0) -> Flight:
    return Flight(
        request_id, deadline_s=0.0, coalesce_window_s=0.0, output_token_ids=[1] * brought, on_ready=lambda _: None
    )


def about(seconds: float) -> object:
    return pytest.approx(seconds, rel=0.03)


def test_a_requests_times_are_counted() -> None:
    time = Time()
    activity = Activity(time)
    request = flight(brought=7)
    activity.began(request)
    time.now_s += 0.5
    request.stream.token_ids.append(2)
    activity.first_token(request)
    time.now_s += 4.0
    request.stream.token_ids += [3] * 10
    request.stream.finish_reason = FinishReason.STOP
    activity.ended(request)
    found = activity.summary()
    assert (found.ttft.p50_s, found.tpot.p99_s, found.end_to_end.p90_s) == (about(0.5), about(0.4), about(4.5))
    assert (found.finished_requests, found.failed_requests) == (1, 0)


def test_failures_count_and_cancelled_requests_do_not() -> None:
    activity = Activity(Time())
    failed, left, cancelled = flight(), flight(), flight()
    failed.error = StatusError(grpc.StatusCode.INTERNAL, "a bug")
    cancelled.stream.finish_reason = FinishReason.CANCELLED
    for request in (failed, left, cancelled):
        activity.began(request)
        activity.ended(request)
    found = activity.summary()
    assert (found.finished_requests, found.failed_requests, found.end_to_end.count) == (0, 1, 0)


def test_rates_are_of_the_last_seconds() -> None:
    time = Time()
    activity = Activity(time)
    assert activity.summary().tokens_per_s == 0
    running = flight()
    for second in range(30):
        activity.sample()
        activity.sample()
        time.now_s += 1
        ended = flight()
        activity.began(ended)
        ended.stream.token_ids += [1] * 5
        activity.ended(ended)
        if second == 0:
            activity.began(running)
        running.stream.token_ids += [1] * 20
    activity.sample()
    found = activity.summary()
    assert (found.requests_per_s, found.tokens_per_s) == (about(1.0), about(25.0))


def test_a_move_is_noted_with_the_gap_that_its_client_sees() -> None:
    time = Time()
    moves = SeenMoves(time)
    request = flight()
    request.stream.max_output_tokens = 100
    request.accept(1, 0, [5, 6], None)
    moves.note(request, source="d0", target="d1", epoch=2, draining=False)
    (move,) = moves
    assert (move.request_id, move.source, move.target, move.source_epoch) == ("r", "d0", "d1", 1)
    assert (move.output_tokens, move.reason, move.gap_s) == (2, None, None)
    before_s = request.last_token_s
    assert before_s is not None
    request.accept(2, 0, [5, 6], None)
    assert next(iter(moves)).gap_s is None, "nothing new has come"
    request.accept(2, 0, [5, 6, 7], None)
    assert next(iter(moves)).gap_s == request.last_token_s - before_s
    request.accept(2, 3, [8], None)
    assert next(iter(moves)).gap_s != request.last_token_s - before_s
    assert move.is_of(Migration("r", "d0", "d1", 1, MigrationReason.LOAD))
    assert not move.is_of(Migration("r", "d0", "d1", 2, MigrationReason.LOAD))


def test_why_it_moved_is_known_of_drains_and_of_operators_orders() -> None:
    moves = SeenMoves(Time())
    moves.ordered("a", "d0", "d1")
    for name, draining in (("a", True), ("a", False), ("b", True)):
        moves.note(flight(name), source="d0", target="d1", epoch=2, draining=draining)
    assert [move.reason for move in moves] == [MigrationReason.DRAIN, None, MigrationReason.OPERATOR]


def test_the_list_of_moves_is_bounded() -> None:
    moves = SeenMoves(Time())
    requests = [flight(f"r{number}") for number in range(MAX_MOVES + 3)]
    for request in requests:
        request.stream.max_output_tokens = 9
        request.accept(1, 0, [5], None)
        moves.note(request, source="d0", target="d1", epoch=2, draining=False)
    assert [move.request_id for move in moves] == [f"r{number}" for number in range(MAX_MOVES + 2, 2, -1)]
    for request in requests:
        request.accept(2, 1, [6], None)
    assert all(move.gap_s is not None for move in moves) and len(list(moves)) == MAX_MOVES

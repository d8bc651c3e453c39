"""What is done about failures: in the right order, never too soon, and not for ever."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.client.retrying import Anew, Failure, ReadOn, Retrying, RetryPolicy, Step
from starmesh.rpc.status import StatusError, retry_later

pytestmark = pytest.mark.fast

BROKEN = Failure(StatusError(grpc.StatusCode.UNAVAILABLE, "connection reset"), broken=True)
UNKNOWN_ID = Failure(StatusError(grpc.StatusCode.NOT_FOUND, "no such request"), broken=False)
STOPPING = Failure(retry_later(grpc.StatusCode.UNAVAILABLE, "stopping", 1.0), broken=False)
FULL = Failure(retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 2.0), broken=False)
POLICY = RetryPolicy(max_retries=3, first_delay_s=0.1, max_delay_s=0.3)


def retrying(*, routers: int = 1, resumable: bool = True, drawn: float = 0.0) -> Retrying:
    return Retrying(POLICY, resumable=resumable, routers=routers, draw=lambda: drawn)


def steps(subject: Retrying, *failures: Failure) -> list[Step]:
    return [subject.after(failure) for failure in failures]


def test_a_broken_stream_is_read_on_at_once() -> None:
    assert retrying().after(BROKEN) == ReadOn(0.0)


def test_a_lone_router_that_is_out_of_reach_is_waited_for_longer_and_longer() -> None:
    assert steps(retrying(), *[BROKEN] * 5) == [ReadOn(0.0), ReadOn(0.05), ReadOn(0.1), ReadOn(0.15), None]


def test_a_router_that_has_forgotten_the_request_is_asked_anew_at_once() -> None:
    subject = retrying(routers=3)
    assert steps(subject, BROKEN, UNKNOWN_ID) == [ReadOn(0.0), Anew(0.0, elsewhere=False)]


def test_another_router_goes_on_where_one_is_out_of_reach() -> None:
    assert steps(retrying(routers=2), BROKEN, BROKEN) == [ReadOn(0.0), Anew(0.0, elsewhere=True)]
    assert steps(retrying(routers=2, resumable=False), BROKEN) == [Anew(0.0, elsewhere=True)]


def test_when_all_routers_have_been_tried_there_is_a_wait() -> None:
    subject = retrying(routers=3, resumable=False)
    assert steps(subject, *[BROKEN] * 3) == [
        Anew(0.0, elsewhere=True),
        Anew(0.0, elsewhere=True),
        Anew(0.05, elsewhere=True),
    ]


def test_a_router_that_stops_is_left_at_once_and_a_full_mesh_waited_for() -> None:
    assert retrying(routers=2).after(STOPPING) == Anew(0.0, elsewhere=True)
    assert retrying().after(STOPPING) == Anew(1.05, elsewhere=False)
    assert retrying(routers=2).after(FULL) == Anew(2.05, elsewhere=True)
    assert retrying(routers=2, drawn=0.8).after(FULL) == Anew(2.0 * 1.2 + 0.1 * 0.9, elsewhere=True)


@pytest.mark.parametrize(
    "status",
    [
        UNKNOWN_ID.status,  # of a request that was not being read on: the model's name
        StatusError(grpc.StatusCode.INVALID_ARGUMENT, "wrong"),
        StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "late"),
        StatusError(grpc.StatusCode.ABORTED, "another reads on"),
        StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "a message too large"),
    ],
)
def test_the_rest_is_the_callers_business(status: StatusError) -> None:
    assert retrying(routers=2).after(Failure(status, broken=False)) is None


@given(
    st.lists(st.sampled_from([BROKEN, UNKNOWN_ID, STOPPING, FULL]), min_size=100, max_size=100),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0, 1, exclude_max=True),
)
def test_without_a_token_it_ends(failures: list[Failure], routers: int, resumable: bool, drawn: float) -> None:
    subject = retrying(routers=routers, resumable=resumable, drawn=drawn)
    waited_s = 0.0
    calls = 0
    for failure in failures:
        step = subject.after(failure)
        if step is None:
            break
        calls += 1
        waited_s += step.delay_s
        assert isinstance(step, Anew) or resumable
        if step.delay_s and failure.status.retry_delay_s is not None:
            assert step.delay_s >= failure.status.retry_delay_s
    assert calls <= 2 * (POLICY.max_retries + routers + 1)
    assert waited_s <= POLICY.max_retries * (2.0 * 1.25 + POLICY.max_delay_s)


@given(st.lists(st.sampled_from([BROKEN, STOPPING, FULL]), max_size=20))
def test_a_token_makes_good_for_all_before(failures: list[Failure]) -> None:
    subject = retrying(routers=2)
    for failure in failures:
        subject.after(failure)
    subject.progressed()
    assert subject.after(BROKEN) == ReadOn(0.0)

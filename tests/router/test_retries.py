"""How long a request is tried."""

from __future__ import annotations

import grpc
import pytest

from services.router.retries import Retries
from starmesh.rpc.status import StatusError, retry_later

pytestmark = pytest.mark.fast

FULL = retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "full of secrets", 0.1)


def test_failures_are_bounded() -> None:
    retries = Retries(max_failures=3, give_up_s=10)
    waits = [retries.after_failure() for _ in range(3)]
    assert waits == sorted(waits)
    with pytest.raises(StatusError) as caught:
        retries.after_failure()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_delay_s is not None


def test_a_new_request_waits_for_room_only_so_long() -> None:
    retries = Retries(max_failures=0, give_up_s=10)
    waits = [retries.after_refusal(FULL, 9.9, started=False) for _ in range(20)]
    assert max(waits) == waits[-1] <= 1.0
    with pytest.raises(StatusError) as caught:
        retries.after_refusal(FULL, 10.0, started=False)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_delay_s is not None
    assert "secrets" not in caught.value.message


def test_one_that_has_begun_waits_on() -> None:
    retries = Retries(max_failures=0, give_up_s=10)
    assert retries.after_refusal(FULL, 1_000_000.0, started=True) > 0

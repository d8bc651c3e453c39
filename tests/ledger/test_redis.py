"""The Redis ledger against a real server."""

from __future__ import annotations

from typing import ClassVar

import pytest

from starmesh.ledger.redis import RedisLedger

from .conformance import Lapse, LedgerConformance
from .conftest import until


@pytest.fixture
def ledger(redis_ledger: RedisLedger) -> RedisLedger:
    return redis_ledger


@pytest.fixture
def lapse() -> Lapse:
    return until


class TestRedisLedger(LedgerConformance):
    __test__: ClassVar[bool] = True

"""The memory ledger on virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest

from starmesh.clock import VirtualClock
from starmesh.ledger.memory import MemoryLedger

from .conformance import MEDIUM_S, Lapse, LedgerConformance

pytestmark = pytest.mark.fast


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def ledger(clock: VirtualClock) -> MemoryLedger:
    return MemoryLedger(clock)


@pytest.fixture
def lapse(clock: VirtualClock) -> Lapse:
    async def advance(condition: Callable[[], Awaitable[bool]]) -> None:
        clock.advance(MEDIUM_S)
        assert await condition()

    return advance


class TestMemoryLedger(LedgerConformance):
    __test__: ClassVar[bool] = True

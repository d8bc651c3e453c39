"""Places of requests, in the ledger and in this router's counts: none is forgotten, none is left."""

from __future__ import annotations

import pytest

from services.router.ledger_watch import LedgerWatch
from services.router.predictions import aged
from services.router.reservations import Reservations
from starmesh.clock import VirtualClock
from starmesh.ledger import ReservationRefused
from starmesh.ledger.memory import MemoryLedger
from starmesh.policy.admission import AdmissionConfig
from starmesh.policy.dispatch import Choice
from starmesh.types import InstanceInfo, InstanceLoad, KvLayout, RemainingEstimate, Role

pytestmark = pytest.mark.fast

LAYOUT = KvLayout(model_revision="r", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=16)
TTL_S = 60.0


class Cluster:
    """A ledger with two decode instances of 64 tokens, and a router's reservations in it."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(VirtualClock())
        self.watch = LedgerWatch(self.ledger, interval_s=1.0)
        self.reservations = Reservations(self.ledger, self.watch, AdmissionConfig(), ttl_s=TTL_S)

    async def begin(self) -> None:
        for name in ("d0", "d1"):
            info = InstanceInfo(name, "one", Role.DECODE, "127.0.0.1:1", layout=LAYOUT, max_sequence_tokens=64)
            await self.ledger.register(info, ttl_s=TTL_S)
            await self.ledger.report(name, "one", InstanceLoad(4, 4), ttl_s=TTL_S)
        await self.watch.refresh()

    async def places(self) -> dict[str, list[str]]:
        """By request where the ledger and, behind it, this router's counts have it."""
        found: dict[str, list[str]] = {}
        for view in ((await self.ledger.view()), self.watch.local.corrected()):
            for instance in view.instances:
                for item in instance.reservations:
                    found.setdefault(item.request_id, []).append(instance.info.instance_id)
        return found


@pytest.fixture
async def cluster() -> Cluster:
    found = Cluster()
    await found.begin()
    return found


def at(instance_id: str, tokens: int = 32) -> Choice:
    return Choice(instance_id, tokens, 64)


async def test_a_place_is_exchanged_for_another(cluster: Cluster) -> None:
    await cluster.reservations.make("r", at("d0"))
    assert await cluster.places() == {"r": ["d0", "d0"]}
    assert await cluster.reservations.exchange("r", at("d1"))
    assert await cluster.places() == {"r": ["d1", "d1"]}
    assert cluster.reservations.place("r") == "d1"
    assert await cluster.reservations.release("r")
    assert await cluster.places() == {}
    assert (cluster.reservations.place("r"), await cluster.reservations.release("r")) == (None, False)


async def test_a_refused_exchange_leaves_the_place(cluster: Cluster) -> None:
    await cluster.reservations.make("other", at("d1", 48))
    await cluster.reservations.make("r", at("d0"))
    before = await cluster.places()
    assert not await cluster.reservations.exchange("r", at("d1"))
    assert await cluster.places() == before
    assert cluster.reservations.place("r") == "d0"


async def test_a_refused_place_counts_nowhere(cluster: Cluster) -> None:
    await cluster.reservations.make("other", at("d1", 48))
    with pytest.raises(ReservationRefused):
        await cluster.reservations.make("r", at("d1"))
    assert "r" not in await cluster.places()
    assert cluster.reservations.place("r") is None


async def test_a_place_that_cannot_grow_is_still_released(cluster: Cluster) -> None:
    await cluster.reservations.make("r", at("d0"))
    with pytest.raises(ReservationRefused):
        await cluster.reservations.make("r", at("d0", 80))
    assert await cluster.reservations.release("r")
    assert await cluster.places() == {}


async def test_a_new_place_ends_the_former(cluster: Cluster) -> None:
    await cluster.reservations.make("r", at("d0"))
    await cluster.reservations.make("r", at("d1"))
    assert await cluster.places() == {"r": ["d1", "d1"]}


def test_an_estimate_ages_down_to_nothing() -> None:
    estimate = RemainingEstimate(10, 5, 9)
    assert aged(estimate, 10) == estimate
    assert aged(estimate, 12) == RemainingEstimate(12, 3, 7)
    assert aged(estimate, 17) == RemainingEstimate(17, 0, 2)

"""Epochs and entries: what the router claims, follows, renews and makes anew."""

from __future__ import annotations

import asyncio

import pytest

from services.router.owners import CLAIM_STEP, OFFLINE_STEP, Owners
from starmesh.clock import VirtualClock
from starmesh.ledger import LedgerUnavailable
from starmesh.ledger.memory import MemoryLedger
from starmesh.migration.terms import EPOCHS_PER_MIGRATION
from starmesh.rpc.status import StatusError
from starmesh.types import Ownership

pytestmark = pytest.mark.fast

TTL_S = 60.0


class Moody(MemoryLedger):
    """A ledger that may be silent."""

    def __init__(self) -> None:
        super().__init__(VirtualClock())
        self.silent = False

    async def owner(self, request_id: str) -> Ownership | None:
        if self.silent:
            raise LedgerUnavailable("silent")
        return await super().owner(request_id)


def owners_of(ledger: MemoryLedger, *, available: bool = True) -> Owners:
    return Owners(ledger, ttl_s=TTL_S, available=lambda: available)


async def claim(ledger: MemoryLedger, before: Ownership | None, after: Ownership) -> None:
    """What an instance of a migration does."""
    await ledger.claim("r", after.instance_id, expected=before, epoch=after.epoch, ttl_s=TTL_S)


async def test_each_claim_goes_beyond_what_a_migration_may_have_claimed() -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    assert await owners.claim("r", "a") == 1
    assert await owners.claim("r", "b") == 1 + CLAIM_STEP > 1 + EPOCHS_PER_MIGRATION
    # Two migrations that this router has not heard of.
    await claim(ledger, Ownership("b", 4), Ownership("c", 5))
    await claim(ledger, Ownership("c", 5), Ownership("d", 6))
    assert await owners.claim("r", "a") == 6 + CLAIM_STEP
    assert await ledger.owner("r") == Ownership("a", 9)


async def test_a_claim_without_the_ledgers_word_goes_far_beyond_it() -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    await owners.claim("r", "a")
    ledger.silent = True
    assert await owners.claim("r", "b") == 1 + CLAIM_STEP + OFFLINE_STEP
    ledger.silent = False
    assert await owners.claim("r", "c") == 1 + 2 * CLAIM_STEP + OFFLINE_STEP
    assert await ledger.owner("r") == Ownership("c", 1 + 2 * CLAIM_STEP + OFFLINE_STEP)
    assert await owners_of(ledger, available=False).claim("other", "a") == 1 + OFFLINE_STEP


async def test_the_id_of_another_routers_request_is_refused() -> None:
    ledger = Moody()
    await owners_of(ledger).claim("r", "a")
    with pytest.raises(StatusError, match="ALREADY_EXISTS"):
        await owners_of(ledger).claim("r", "a")


async def test_only_newer_owners_of_own_requests_are_followed() -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    owners.follow("r", Ownership("b", 7))
    await owners.disown("r")
    await owners.claim("r", "a")
    owners.follow("r", Ownership("b", 1))
    assert await owners.claim("r", "c") == 4
    owners.follow("r", Ownership("b", 5))
    assert await owners.claim("r", "c") == 8


async def test_a_move_is_found_by_its_epoch_and_its_instance() -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    assert await owners.find_move("r") is None
    await owners.claim("r", "a")
    assert await owners.find_move("r") is None
    await claim(ledger, Ownership("a", 1), Ownership("b", 2))
    assert await owners.find_move("r") == Ownership("b", 2)
    ledger.silent = True
    assert await owners.find_move("r") is None
    ledger.silent = False
    owners.follow("r", Ownership("b", 2))
    assert await owners.find_move("r") is None
    await claim(ledger, Ownership("b", 2), Ownership("b", 4))  # taken back
    assert await owners.find_move("r") is None
    assert await owners_of(ledger, available=False).find("r") is None


async def kept_once(owners: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of renewals."""
    turns = 0

    async def sleep(delay_s: float) -> None:
        nonlocal turns
        assert delay_s == TTL_S / 3
        turns += 1
        if turns > 1:
            raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr("services.router.owners.asyncio.sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await owners.keep()


async def test_a_lost_entry_is_made_anew_under_the_epoch_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    await owners.claim("r", "a")
    owners.follow("r", Ownership("b", 2))
    ledger._owners.clear()
    await kept_once(owners, monkeypatch)
    assert await ledger.owner("r") == Ownership("b", 2)


async def test_an_entry_of_a_migrations_claim_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    await owners.claim("r", "a")
    await claim(ledger, Ownership("a", 1), Ownership("b", 2))
    await kept_once(owners, monkeypatch)
    assert await ledger.owner("r") == Ownership("b", 2)


async def test_what_happens_between_a_renewal_and_its_answer_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has ended, has been claimed by another, or has moved."""
    ledger = Moody()
    owners = owners_of(ledger)
    for name in ("ended", "taken", "moved"):
        await owners.claim(name, "a")
    renew = ledger.renew

    async def renew_late(owned: dict[str, int], *, ttl_s: float) -> list[str]:
        ledger._owners.clear()
        missing = await renew(owned, ttl_s=ttl_s)
        await owners.disown("ended")
        await ledger.claim("taken", "z", expected=None, epoch=3, ttl_s=TTL_S)
        owners.follow("moved", Ownership("b", 2))
        return missing

    monkeypatch.setattr(ledger, "renew", renew_late)
    await kept_once(owners, monkeypatch)
    assert await ledger.owner("ended") is None
    assert await ledger.owner("taken") == Ownership("z", 3)
    assert await ledger.owner("moved") is None  # the next renewal makes it


async def test_an_entry_made_anew_for_a_request_that_ends_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Moody()
    owners = owners_of(ledger)
    await owners.claim("r", "a")
    ledger._owners.clear()
    claim_now = ledger.claim

    async def claim_late(*arguments: object, **options: object) -> None:
        await owners.disown("r")
        await claim_now(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "claim", claim_late)
    await kept_once(owners, monkeypatch)
    assert await ledger.owner("r") is None

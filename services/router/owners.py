"""Ownership entries of this router's requests in the ledger.

Owns the epochs that this router hands out: each claim of a request gets a higher one, by compare-and-set where the
ledger answers and by its own count where it does not. Follows the owners that migrations make, whose claims are the
instances' own. Owns no decision of who is to be the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc

from starmesh.ledger import Ledger, LedgerError, LedgerUnavailable, OwnershipConflict
from starmesh.migration.terms import EPOCHS_PER_MIGRATION
from starmesh.rpc.status import StatusError, bad_field
from starmesh.types import Ownership

log = logging.getLogger(__name__)

# Each turn has seen another owner than the one before: far more than a request has migrations at a time.
_MAX_CLAIMS = 4
# Beyond what a migration that this router has not heard of may claim: so an epoch tells whose claim it was.
CLAIM_STEP = EPOCHS_PER_MIGRATION + 1
# Without the ledger's word nobody knows how many claims were done meanwhile; fewer than this.
OFFLINE_STEP = 1 << 20
# A client may wait meanwhile for its next token, and its sequence can be recovered without an answer.
_ASK_TIMEOUT_S = 1.0


def duplicate_id(request_id: str) -> StatusError:
    """What a client hears that chose the id of a request in flight."""
    description = f"a request {request_id} is in flight; choose another id or wait for its end"
    return bad_field("request_id", description, code=grpc.StatusCode.ALREADY_EXISTS)


class Owners:
    """Claims, follows, renews and removes entries."""

    def __init__(self, ledger: Ledger, *, ttl_s: float, available: Callable[[], bool]) -> None:
        """``available`` says whether the ledger answered lately: one that did not is not asked again here, where a
        client would wait for it."""
        self._ledger = ledger
        self._available = available
        self._ttl_s = ttl_s
        self._owned: dict[str, Ownership] = {}

    async def claim(self, request_id: str, instance_id: str) -> int:
        """Make ``instance_id`` the owner. Returns the new epoch, higher than any before.

        Raises StatusError ALREADY_EXISTS when another router has a request of this id in flight, ABORTED when the
        owner keeps changing.
        """
        mine = self._owned.get(request_id)
        expected = mine
        epoch = mine.epoch + CLAIM_STEP if mine is not None else 1
        for _ in range(_MAX_CLAIMS):
            try:
                if not self._available():
                    raise LedgerUnavailable("the ledger did not answer lately")
                await self._ledger.claim(request_id, instance_id, expected=expected, epoch=epoch, ttl_s=self._ttl_s)
            except OwnershipConflict as conflict:
                if mine is None and conflict.current is not None:
                    raise duplicate_id(request_id) from None
                # A ledger that restarted empty, or an owner that this router has not heard of yet.
                expected = conflict.current
                epoch = max(epoch, expected.epoch + CLAIM_STEP if expected is not None else 1)
                continue
            except asyncio.CancelledError:
                # The claim may have been done: ``disown`` must know of it.
                self._owned[request_id] = Ownership(instance_id, epoch)
                raise
            except LedgerUnavailable:
                epoch += OFFLINE_STEP
                log.debug("no ledger to claim %s in; going on with epoch %d", request_id, epoch)
            self._owned[request_id] = Ownership(instance_id, epoch)
            return epoch
        raise StatusError(grpc.StatusCode.ABORTED, f"the owner of {request_id} keeps changing")

    def follow(self, request_id: str, owner: Ownership) -> None:
        """Take note of an owner that a migration has made: the entry is renewed under its epoch from now on. Without
        effect unless the epoch is newer than the known one."""
        mine = self._owned.get(request_id)
        if mine is not None and mine.epoch < owner.epoch:
            self._owned[request_id] = owner

    async def find_move(self, request_id: str) -> Ownership | None:
        """Ask whether a migration has made another instance the owner without this router's knowledge. Returns that
        owner; None when the known one is it still, or when the ledger does not answer soon."""
        mine = self._owned.get(request_id)
        owner = await self.find(request_id) if mine is not None else None
        if mine is None or owner is None:
            return None
        return owner if owner.epoch == mine.epoch + 1 and owner.instance_id != mine.instance_id else None

    async def find(self, request_id: str) -> Ownership | None:
        """The ledger's entry of any router's request; None when there is none, or when the ledger does not answer
        soon."""
        if not self._available():
            return None
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                return await self._ledger.owner(request_id)
        except (LedgerError, TimeoutError) as error:
            log.debug("no ledger to ask for the owner of %s: %s", request_id, error)
            return None

    async def disown(self, request_id: str) -> None:
        """Remove the entry, if this router made one."""
        mine = self._owned.pop(request_id, None)
        if mine is not None:
            # What cannot be removed now expires.
            with contextlib.suppress(LedgerError):
                if self._available():
                    await self._ledger.disown(request_id, mine.epoch)

    async def keep(self) -> None:
        """Renew all entries again and again, and make those anew that a ledger has lost; ends by cancellation."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            epochs = {request_id: owned.epoch for request_id, owned in self._owned.items()}
            if not epochs:
                continue
            try:
                missing = await self._ledger.renew(epochs, ttl_s=self._ttl_s)
                for request_id in missing:
                    await self._restore(request_id, epochs[request_id])
            except LedgerError as error:
                log.debug("no ledger to renew entries in: %s", error)
            except Exception:
                # One bad entry must not let all others expire.
                log.exception("renewing %d ownership entries failed", len(epochs))

    async def _restore(self, request_id: str, epoch: int) -> None:
        """Make a lost entry anew, so that its request can migrate again. Only where there is none: whoever has claimed
        the sequence meanwhile stays its owner. A claim that was done in the former ledger and that this router has not
        heard of is not undone either: the router goes to that owner if it is told of it, and hears no other before."""
        mine = self._owned.get(request_id)
        if mine is None or mine.epoch != epoch:
            return
        with contextlib.suppress(OwnershipConflict):
            await self._ledger.claim(request_id, mine.instance_id, expected=None, epoch=mine.epoch, ttl_s=self._ttl_s)
            if request_id not in self._owned:
                # It ended meanwhile: an entry would keep its id from the next request.
                await self._ledger.disown(request_id, mine.epoch)

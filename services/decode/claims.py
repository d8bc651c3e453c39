"""What a migration asks of the ledger, with its answers as the tables' events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starmesh.ledger import Ledger, LedgerError, OwnershipConflict
from starmesh.migration.terms import LedgerSilent, OwnerIs
from starmesh.types import Ownership

log = logging.getLogger(__name__)


class Claims:
    """Claims of both ends. Every call is bounded by the ledger's own timeout."""

    def __init__(self, ledger: Ledger, *, ttl_s: float) -> None:
        """An entry that is claimed here lives ``ttl_s`` unless a router renews it."""
        self._ledger = ledger
        self._ttl_s = ttl_s

    async def claim(
        self, request_id: str, expected: Ownership, new: Ownership, *, wanted: Callable[[], bool]
    ) -> OwnerIs | LedgerSilent:
        """Make ``new`` the owner if ``expected`` is; the owner that there is now. If it is not ``wanted`` any more by
        then, its entry is removed again: nobody would, and no request could have the id for as long as that lives."""
        try:
            await self._ledger.claim(request_id, new.instance_id, expected=expected, epoch=new.epoch, ttl_s=self._ttl_s)
        except OwnershipConflict as conflict:
            return OwnerIs(conflict.current)
        except LedgerError as error:
            log.warning("claiming %s: %s", request_id, error)
            return LedgerSilent()
        if not wanted():
            await self.disown(request_id, new.epoch)
        return OwnerIs(new)

    async def owner(self, request_id: str, *, at_s: float) -> OwnerIs | LedgerSilent:
        """Who owns it, asked not before ``at_s`` of the event loop's time."""
        await asyncio.sleep(at_s - asyncio.get_running_loop().time())
        try:
            return OwnerIs(await self._ledger.owner(request_id))
        except LedgerError:
            return LedgerSilent()

    async def disown(self, request_id: str, epoch: int) -> None:
        """Remove the entry of ``epoch`` or older, once: otherwise it expires."""
        with contextlib.suppress(LedgerError):
            await self._ledger.disown(request_id, epoch)

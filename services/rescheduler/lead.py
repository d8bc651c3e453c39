"""Whether this process leads: the lease in the ledger, and its term.

Owns the asking and what is logged of changes. Owns no clock: the ledger alone says how long a lead lasts.
"""

from __future__ import annotations

import contextlib
import logging

from starmesh.ledger import Ledger, LedgerError
from starmesh.types import Role

log = logging.getLogger(__name__)


class Lead:
    """The lead of the reschedulers of a cluster, as one of them sees it. ``term`` is what the ledger last said, None
    while another leads."""

    def __init__(self, ledger: Ledger, instance_id: str, incarnation: str, *, ttl_s: float) -> None:
        self.term: int | None = None
        self.instance_id = instance_id
        self._ledger = ledger
        self._who = (instance_id, incarnation)
        self._ttl_s = ttl_s
        self._asked = False

    async def ask(self) -> int | None:
        """Take the lead or keep it. Returns the term, None while another leads. Raises LedgerError; nobody knows then
        who leads, and nobody can take the lead either."""
        before, asked = self.term, self._asked
        term = await self._ledger.lead(Role.RESCHEDULER, *self._who, ttl_s=self._ttl_s)
        self.term, self._asked = term, True
        if term is None and before is not None:
            log.warning("another rescheduler leads now; standing by")
        elif term is None and not asked:
            log.info("another rescheduler leads; standing by")
        elif term is not None and term != before:
            log.info("leading, term %d", term)
        return term

    async def resign(self) -> None:
        """Let another take over at once; a ledger that does not answer lets it in when the lease ends."""
        if self.term is not None:
            self.term = None
            with contextlib.suppress(LedgerError):
                await self._ledger.resign(Role.RESCHEDULER, *self._who)

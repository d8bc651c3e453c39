"""The background look at the ledger: the last view, whether the ledger answers, and who has gone missing.

Owns no placing (``dispatcher``) and nothing that hangs on instances (``on_view``'s caller does).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from services.router.local_view import LocalView
from starmesh.ledger import Ledger, LedgerError
from starmesh.types import ClusterView, InstanceInfo, InstanceState, Role

log = logging.getLogger(__name__)


class LedgerWatch:
    """Keeps ``local`` up to date."""

    def __init__(self, ledger: Ledger, *, interval_s: float) -> None:
        self.local = LocalView()
        self.available = True
        """Whether the ledger answered the last time."""
        self.ready = asyncio.Event()
        """Set from the first view with a prefill and a decode instance that take work."""
        self._ledger = ledger
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()

    @property
    def view(self) -> ClusterView:
        """What the ledger last said."""
        return self.local.ledger_view

    def find(self, instance_id: str) -> InstanceInfo | None:
        """What the ledger last said of an instance."""
        for view in self.view.instances:
            if view.info.instance_id == instance_id:
                return view.info
        return None

    def find_predictor(self) -> InstanceInfo | None:
        """The predictor to ask: of those that are up the one of the lowest id."""
        up = (view.info for view in self.view.of_role(Role.PREDICTOR) if view.info.state is InstanceState.READY)
        return min(up, key=lambda info: info.instance_id, default=None)

    async def run(self, on_view: Callable[[set[str]], Awaitable[None]]) -> None:
        """Look again and again, until cancelled. ``on_view`` gets the instances that have been missing from the ledger
        for more than a moment; none while it does not answer."""
        while True:
            try:
                await self.refresh()
                await on_view(self.local.missing(self._loop.time()) if self.available else set())
            except Exception:
                # A router that looks no more would place requests by an old view for ever.
                log.exception("a look at the ledger failed")
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> ClusterView:
        """The ledger's view as of now; the last one when it does not answer."""
        try:
            view = await self._ledger.view()
        except LedgerError as error:
            if self.available:
                log.warning("the ledger does not answer, going on by its last view: %s", error)
            self.available = False
            return self.view
        if not self.available:
            log.info("the ledger answers again")
        self.available = True
        self.local.update(view, self._loop.time())
        if {Role.PREFILL, Role.DECODE} <= {i.info.role for i in view.instances if i.info.state is InstanceState.READY}:
            self.ready.set()
        return view

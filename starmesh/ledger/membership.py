"""An instance's place in the ledger: registers it, reports its load at an interval, takes it out at the end.

Owns the background task and nothing of the load itself. A ledger that is down, or restarts empty, is survived: the
instance registers again when it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from starmesh.ledger import Ledger, LedgerError
from starmesh.types import InstanceInfo, InstanceLoad, InstanceState, TransferBackend

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""To register: a machine on which many services start at once may keep a sound ledger from answering in time. One that
refuses connections does so three times at once."""


class Membership:
    """Keeps one registration alive. ``load`` is awaited before each report; None means not to report, so that a
    process whose work has stopped loses its lease."""

    def __init__(
        self,
        ledger: Ledger,
        info: InstanceInfo,
        *,
        load: Callable[[], Awaitable[InstanceLoad | None]],
        ttl_s: float,
        interval_s: float,
    ) -> None:
        """Raises ValueError when the lease could end between two reports."""
        if interval_s * 2 > ttl_s:
            raise ValueError(f"a report each {interval_s} s cannot keep a lease of {ttl_s} s: use at most half of it")
        self._ledger = ledger
        self._info = info
        self._load = load
        self._ttl_s = ttl_s
        self._interval_s = interval_s
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reachable = True
        self._state_told = True

    @property
    def info(self) -> InstanceInfo:
        """What is registered."""
        return self._info

    @property
    def ledger_reachable(self) -> bool:
        """Whether the last report got through."""
        return self._reachable

    def update(self, *, address: str, transfer_backends: tuple[TransferBackend, ...] = ()) -> None:
        """Set what is known only once the server listens. Before ``start``."""
        self._info = dataclasses.replace(self._info, address=address, transfer_backends=transfer_backends)

    async def start(self) -> None:
        """Register and begin to report. Raises LedgerError when the ledger does not answer: a process that has never
        been in the ledger is better off telling its operator than waiting unseen."""
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                await self._ledger.register(self._info, ttl_s=self._ttl_s)
                break
            except LedgerError:
                if not attempts_left:
                    raise
        self._task = asyncio.create_task(self._run(), name="membership")

    def report_soon(self) -> None:
        """Report now rather than at the end of the interval: something changed that dispatch should see."""
        self._due.set()

    async def set_state(self, state: InstanceState) -> None:
        """Change whether the instance takes new work, here and, as soon as it answers, in the ledger."""
        self._info = dataclasses.replace(self._info, state=state)
        self._state_told = False
        try:
            await self._tell_state()
        except LedgerError as error:
            log.warning("the ledger will hear later that this instance is %s: %s", state.value, error)

    async def _tell_state(self) -> None:
        info = self._info
        await self._ledger.set_state(info.instance_id, info.incarnation, info.state)
        self._state_told = True

    async def stop(self) -> None:
        """Stop reporting and leave the ledger."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(LedgerError):
            await self._ledger.deregister(self._info.instance_id, self._info.incarnation)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._due.wait()
            self._due.clear()
            try:
                await self._report()
            except LedgerError as error:
                if self._reachable:
                    log.warning("the ledger does not answer, going on without it: %s", error)
                self._reachable = False
                continue
            except Exception:
                # A bug in one report must not take a process that serves out of the cluster for good.
                log.exception("a report failed")
                continue
            if not self._reachable:
                log.info("the ledger answers again")
            self._reachable = True

    async def _report(self) -> None:
        load = await self._load()
        if load is None:
            return
        if not self._state_told:
            await self._tell_state()
        instance_id, incarnation = self._info.instance_id, self._info.incarnation
        if not await self._ledger.report(instance_id, incarnation, load, ttl_s=self._ttl_s):
            registered = self._info
            await self._ledger.register(registered, ttl_s=self._ttl_s)
            if self._info is not registered:
                # The state was set meanwhile, and may have been overtaken by the registration with the old one.
                await self._tell_state()
            await self._ledger.report(instance_id, incarnation, load, ttl_s=self._ttl_s)

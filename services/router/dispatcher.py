"""Where a request runs: the ledger's view, the dispatch policy, and a reservation that the ledger has agreed to.

Owns the requests that wait for room. Owns no policy (``starmesh.policy``), no reservation (``reservations``), no look
at the ledger (``ledger_watch``) and nothing that happens on an instance (``life``). With the ledger down it goes on by
the last view and this router's own counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

from services.router.config import RouterSettings
from services.router.ledger_watch import LedgerWatch
from services.router.placement import Demand, NotPlaced, Placement
from services.router.reservations import Reservations
from starmesh.ledger import Ledger, ReservationRefused
from starmesh.policy.admission import AdmissionConfig, AdmissionQueue, Need, Waiting
from starmesh.policy.dispatch import (
    POLICIES,
    Decision,
    DispatchConfig,
    DispatchMemory,
    DispatchRequest,
    NoPlacement,
)
from starmesh.telemetry import names
from starmesh.telemetry.setup import span
from starmesh.types import InstanceInfo, KvLayout

# Instances to ask in one turn when each has just filled up; then the next view says more.
_MAX_REFUSALS = 3
# A refusal for want of room leaves the client's own deadline this long to receive it.
_REPLY_S = 0.1
_ABSENT = (NoPlacement.NO_INSTANCE, NoPlacement.ALL_DRAINING)


class Dispatcher:
    """Places requests. Times are the event loop's unless named otherwise."""

    def __init__(
        self,
        ledger: Ledger,
        watch: LedgerWatch,
        settings: RouterSettings,
        *,
        on_placed: Callable[[float, NotPlaced | None], None] | None = None,
    ) -> None:
        """``on_placed`` hears of each dispatch: its seconds, and why it failed if it has."""
        self.policy_name = settings.dispatch_policy
        self._watch = watch
        self._local = watch.local
        self._settings = settings
        self._policy = POLICIES[settings.dispatch_policy]
        self._config = DispatchConfig(admission=AdmissionConfig(headroom_tokens=settings.reserve_output_tokens))
        self._reservations = Reservations(ledger, watch, self._config.admission, ttl_s=settings.reservation_ttl_s)
        self._memory = DispatchMemory()
        self._queue = AdmissionQueue(settings.queue_length)
        # Bounded by the requests in flight, of which none may be turned away any more.
        self._started_queue = AdmissionQueue(settings.max_requests)
        self._turns: dict[str, asyncio.Event] = {}
        self._last_reason: NoPlacement | None = None
        self._loop = asyncio.get_running_loop()
        self._on_placed = on_placed

    @property
    def uses_estimates(self) -> bool:
        """Whether a request's estimate may change where it goes."""
        return self._policy.uses_estimates

    @property
    def queued_requests(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue) + len(self._started_queue)

    async def place(self, demand: Demand) -> Placement:
        """Choose a prefill and a decode instance and reserve on the latter, in turn with those that wait already.
        Releases what the request had reserved elsewhere. Raises NotPlaced."""
        began_s, failure = self._loop.time(), None
        try:
            return await self._place(demand)
        except NotPlaced as error:
            failure = error
            raise
        finally:
            if self._on_placed is not None:
                self._on_placed(self._loop.time() - began_s, failure)

    async def _place(self, demand: Demand) -> Placement:
        attributes = {names.REQUEST_ID: demand.request_id, names.POLICY: self.policy_name}
        with span(names.SPAN_DISPATCH, attributes=attributes) as current:
            placement = None if self.queued_requests else await self._try(demand)
            if placement is None:
                placement = await self._wait(demand)
            current.set_attribute(names.PREFILL_INSTANCE, placement.prefill.instance_id)
            current.set_attribute(names.DECODE_INSTANCE, placement.decode.instance_id)
            return placement

    async def place_decode(self, demand: Demand, *, layout: KvLayout) -> InstanceInfo:
        """The same for a decode instance alone, for blocks that are ready under ``layout``. Raises NotPlaced."""
        while True:
            placement = await self._try(demand, layout=layout)
            if placement is not None:
                return placement.decode
            if self._loop.time() >= demand.deadline_s:
                raise self._refusal()
            demand = dataclasses.replace(demand, avoid=frozenset())
            await asyncio.sleep(self._settings.view_interval_s)

    async def place_better(self, demand: Demand, *, layout: KvLayout) -> InstanceInfo | None:
        """Choose the decode instance of a placed request once more. Returns the new one, where the request has its
        place now, or None if it keeps the one that it has: no other is better, or the better one does not take it."""
        placed_id = self._reservations.place(demand.request_id)
        choice = self._decide(demand, set(), layout).decode
        if placed_id is None or choice is None or choice.instance_id == placed_id:
            return None
        found = self._watch.find(choice.instance_id)
        if found is None or not await self._reservations.exchange(demand.request_id, choice):
            return None
        self.wake()
        return found

    def prefilled(self, request_id: str, instance_id: str) -> None:
        """A prefill has ended, well or not: the request counts there no more."""
        self._reservations.prefilled(request_id, instance_id)
        self.wake()

    def moved(self, request_id: str, instance_id: str, need: Need) -> None:
        """A request has moved to another decode instance and counts there from now on."""
        self._reservations.moved(request_id, instance_id, need)
        self.wake()

    async def release(self, request_id: str) -> None:
        """Drop what is reserved for a request."""
        if await self._reservations.release(request_id):
            self.wake()

    def suspect(self, instance_id: str) -> None:
        """An instance failed a request: it gets none until it has reported anew."""
        self._local.suspect(instance_id, self._loop.time())

    def wake(self) -> None:
        """Something has changed, the view or what is reserved: let the first of those that wait try."""
        first = self._first()
        if first is not None and first in self._turns:
            self._turns[first].set()

    async def _wait(self, demand: Demand) -> Placement:
        """Wait in the queue; whoever is first tries at each new view and each release. After a wait an instance that
        refused the request before is as good as any."""
        demand = dataclasses.replace(demand, avoid=frozenset())
        now_s = self._loop.time()
        queue = self._started_queue if demand.started else self._queue
        give_up_s = demand.deadline_s
        if not demand.started:
            give_up_s = min(give_up_s - _REPLY_S, now_s + self._settings.queue_timeout_s)
        absent_s = now_s + self._settings.absent_timeout_s
        if not queue.push(Waiting(demand.request_id, give_up_s, demand.priority), now_s):
            raise NotPlaced.for_the_queue(len(queue), queue.retry_delay_s(now_s))
        turn = self._turns[demand.request_id] = asyncio.Event()
        first_s: float | None = None
        try:
            while True:
                if self._first() == demand.request_id:
                    first_s = self._loop.time() if first_s is None else first_s
                    demand = dataclasses.replace(demand, held_s=self._loop.time() - first_s)
                    placement = await self._try(demand)
                    if placement is not None:
                        if self._first() == demand.request_id:
                            queue.pop(self._loop.time())
                        return placement
                now_s = self._loop.time()
                gone = not demand.started and self._last_reason in _ABSENT and now_s >= absent_s
                if gone or now_s >= give_up_s:
                    raise self._refusal()
                until_s = give_up_s if demand.started or now_s >= absent_s else min(absent_s, give_up_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until_s):
                        await turn.wait()
                turn.clear()
        finally:
            queue.remove(demand.request_id)
            del self._turns[demand.request_id]
            self.wake()

    async def _try(self, demand: Demand, *, layout: KvLayout | None = None) -> Placement | None:
        """Decide and reserve once; None when there is no place now. ``layout`` asks for a decode instance alone."""
        full: set[str] = set()
        for _ in range(_MAX_REFUSALS):
            decision = self._decide(demand, full, layout)
            # One that the ledger has just found full is up: waiting for room is another matter than for an instance.
            self._last_reason = NoPlacement.NO_CAPACITY if full and decision.decode is None else decision.reason
            if decision.decode is None:
                if decision.reason is NoPlacement.TOO_LONG and not self._suspected():
                    raise NotPlaced.for_its_length(demand.need.tokens)
                return None
            try:
                await self._reservations.make(demand.request_id, decision.decode, decision.prefill)
            except ReservationRefused:
                full.add(decision.decode.instance_id)
                continue
            decode = self._watch.find(decision.decode.instance_id)
            prefill = self._watch.find(decision.prefill.instance_id) if decision.prefill is not None else decode
            if decode is not None and prefill is not None:
                return Placement(prefill, decode)
            # They have gone while the ledger was asked.
            if decision.prefill is not None:
                self._reservations.prefilled(demand.request_id, decision.prefill.instance_id)
            await self._reservations.release(demand.request_id)
        return None

    def _decide(self, demand: Demand, full: set[str], layout: KvLayout | None) -> Decision:
        unusable = self._suspected() | full
        placed_id = self._reservations.place(demand.request_id) or ""
        view = self._local.corrected(without=demand.request_id if placed_id else "")
        request = DispatchRequest(
            demand.request_id,
            demand.need,
            frozenset(self._local.avoidable(demand.avoid, unusable) | unusable),
            demand.estimate,
            placed_id,
            demand.held_s,
        )
        if layout is None:
            decision, self._memory = self._policy.choose(view, request, self._memory, self._config)
        else:
            decision, self._memory = self._policy.choose_decode(
                view, request, self._memory, self._config, layout=layout
            )
        return decision

    def _suspected(self) -> set[str]:
        return self._local.suspected(self._loop.time(), ledger_available=self._watch.available)

    def _refusal(self) -> NotPlaced:
        if self._last_reason in _ABSENT:
            return NotPlaced.for_want_of_instances()
        return NotPlaced.for_want_of_room(self._queue.retry_delay_s(self._loop.time()))

    def _first(self) -> str | None:
        """Whose turn it is."""
        for queue in (self._started_queue, self._queue):
            for waiting in queue:
                return waiting.request_id
        return None

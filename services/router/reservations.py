"""What this router has reserved for its requests: in the ledger, and counted here until the view includes it.

Owns no choice of instance (``dispatcher``). A request has one place, or two while it changes from one to another, and
whatever cuts that short, ``release`` finds both. With the ledger down the counts alone go on.
"""

from __future__ import annotations

import contextlib
import logging

from services.router.ledger_watch import LedgerWatch
from starmesh.ledger import Ledger, LedgerError, ReservationRefused
from starmesh.policy.admission import AdmissionConfig, Need, Room
from starmesh.policy.dispatch import Choice

log = logging.getLogger(__name__)


class Reservations:
    """By request id."""

    def __init__(self, ledger: Ledger, watch: LedgerWatch, config: AdmissionConfig, *, ttl_s: float) -> None:
        """What a dead router has reserved lives on for ``ttl_s``."""
        self._ledger = ledger
        self._watch = watch
        self._local = watch.local
        self._config = config
        self._ttl_s = ttl_s
        # The present one last.
        self._places: dict[str, list[str]] = {}
        self._moved: dict[str, str] = {}

    def place(self, request_id: str) -> str | None:
        """The decode instance where something is reserved or counted for a request; None where nothing is."""
        places = self._places.get(request_id)
        return self._moved.get(request_id, places[-1] if places else None)

    async def make(self, request_id: str, decode: Choice, prefill: Choice | None = None) -> None:
        """Reserve on a decode instance and count the request on a prefill instance, once what it had elsewhere is
        released. Raises ReservationRefused, having done nothing else."""
        held = decode.instance_id in self._places.get(request_id, ())
        if request_id in self._moved or self._places.get(request_id, [decode.instance_id]) != [decode.instance_id]:
            await self.release(request_id)
            held = False
        # Counted before the ledger is asked, so that requests that come meanwhile go elsewhere.
        if prefill is not None:
            self._local.add(request_id, prefill.instance_id, prefill.reserve_tokens)
        try:
            await self._reserve(request_id, decode)
        except BaseException as error:
            if prefill is not None:
                self._local.remove(request_id, prefill.instance_id)
            if isinstance(error, ReservationRefused) and not held:
                self._forget(request_id, decode.instance_id)
            raise

    async def exchange(self, request_id: str, decode: Choice) -> bool:
        """Reserve on another decode instance, and then release the former. Returns False when that is refused: then
        all is as before."""
        formers = list(self._places.get(request_id, ()))
        try:
            await self._reserve(request_id, decode)
        except ReservationRefused:
            self._forget(request_id, decode.instance_id)
            return False
        for former in formers:
            await self._drop(request_id, former)
        return True

    def moved(self, request_id: str, instance_id: str, need: Need) -> None:
        """A request has moved to another decode instance, which has set blocks aside for it: it counts there until a
        report includes it, and no more where it was. Asks nobody; what is reserved in the ledger where the request was
        first goes with that instance's report as ever, or with ``release``."""
        for former in (*self._places.get(request_id, ()), self._moved.pop(request_id, None)):
            if former is not None:
                self._local.remove(request_id, former)
        for view in self._watch.view.instances:
            if view.info.instance_id == instance_id:
                self._local.add(request_id, instance_id, Room(view, self._config).reserve_tokens(need))
        self._moved[request_id] = instance_id

    def prefilled(self, request_id: str, instance_id: str) -> None:
        """A prefill has ended, well or not: the request counts there no more."""
        self._local.remove(request_id, instance_id)

    async def release(self, request_id: str) -> bool:
        """Drop all that is reserved for a request. Returns whether there was anything."""
        moved_to = self._moved.pop(request_id, None)
        if moved_to is not None:
            self._local.remove(request_id, moved_to)
        places = list(self._places.get(request_id, ()))
        for instance_id in places:
            await self._drop(request_id, instance_id)
        return bool(places)

    async def _reserve(self, request_id: str, decode: Choice) -> None:
        """Raises ReservationRefused. A ledger that does not answer is done without."""
        places = self._places.setdefault(request_id, [])
        if decode.instance_id not in places:
            places.append(decode.instance_id)
        self._local.add(request_id, decode.instance_id, decode.reserve_tokens)
        if not self._watch.available:
            return
        try:
            await self._ledger.reserve(
                request_id,
                decode.instance_id,
                decode.reserve_tokens,
                limit_tokens=decode.limit_tokens,
                ttl_s=self._ttl_s,
            )
        except ReservationRefused:
            raise
        except LedgerError as error:
            log.debug("no ledger to reserve in: %s", error)

    async def _drop(self, request_id: str, instance_id: str) -> None:
        self._local.remove(request_id, instance_id)
        if self._watch.available:
            # What cannot be released now expires.
            with contextlib.suppress(LedgerError):
                await self._ledger.release(request_id, instance_id)
        # Last: what is cut short is done again by ``release``.
        self._forget(request_id, instance_id)

    def _forget(self, request_id: str, instance_id: str) -> None:
        self._local.remove(request_id, instance_id)
        places = self._places.get(request_id, [])
        if instance_id in places:
            places.remove(instance_id)
        if not places:
            self._places.pop(request_id, None)

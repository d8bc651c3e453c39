"""The ledger in this process: for the simulator, and for tests of what uses a ledger.

Every method is atomic because none awaits. Nothing expires by itself: what has expired is dropped when it is met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from starmesh.clock import Clock
from starmesh.ledger import OwnershipConflict, Refusal, ReservationRefused
from starmesh.ledger.limits import (
    check_claim,
    check_epoch,
    check_ids,
    check_info,
    check_load,
    check_reservation,
    check_rounds,
    check_ttl,
)
from starmesh.rounds import RoundSummary
from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    Leadership,
    Ownership,
    Reservation,
    Role,
)


@dataclass(slots=True)
class _Registration:
    info: InstanceInfo
    expires_at_s: float
    load: InstanceLoad | None = None
    reported_at_s: float = 0.0
    reservations: dict[str, Reservation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Lead:
    leadership: Leadership
    incarnation: str
    expires_at_s: float


class MemoryLedger:
    """A ledger on a clock of the caller's choice."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._registrations: dict[str, _Registration] = {}
        self._owners: dict[str, tuple[Ownership, float]] = {}
        self._leads: dict[Role, _Lead] = {}
        self._rounds: tuple[tuple[RoundSummary, ...], float] = ((), 0.0)

    async def register(self, info: InstanceInfo, *, ttl_s: float) -> None:
        check_info(info)
        check_ttl(ttl_s)
        expires_at_s = self._clock.now_s() + ttl_s
        present = self._live(info.instance_id, info.incarnation)
        if present is None:
            self._registrations[info.instance_id] = _Registration(info, expires_at_s)
        else:
            present.info, present.expires_at_s = info, expires_at_s

    async def report(self, instance_id: str, incarnation: str, load: InstanceLoad, *, ttl_s: float) -> bool:
        check_ids(instance_id, incarnation)
        check_load(load)
        check_ttl(ttl_s)
        present = self._live(instance_id, incarnation)
        if present is None:
            return False
        present.load, present.reported_at_s = load, self._clock.now_s()
        present.expires_at_s = present.reported_at_s + ttl_s
        for sequence in load.sequences:
            present.reservations.pop(sequence.request_id, None)
        return True

    async def set_state(self, instance_id: str, incarnation: str, state: InstanceState) -> bool:
        check_ids(instance_id, incarnation)
        present = self._live(instance_id, incarnation)
        if present is None:
            return False
        present.info = dataclasses.replace(present.info, state=state)
        return True

    async def deregister(self, instance_id: str, incarnation: str) -> None:
        check_ids(instance_id, incarnation)
        if self._live(instance_id, incarnation) is not None:
            del self._registrations[instance_id]

    async def view(self) -> ClusterView:
        now_s = self._clock.now_s()
        live = (self._live(instance_id) for instance_id in sorted(self._registrations))
        return ClusterView(
            now_s=now_s,
            instances=tuple(
                InstanceView(
                    info=present.info,
                    load=present.load,
                    reported_at_s=present.reported_at_s,
                    reservations=tuple(sorted(self._reservations(present), key=lambda item: item.request_id)),
                )
                for present in live
                if present is not None
            ),
        )

    async def reserve(self, request_id: str, instance_id: str, tokens: int, *, limit_tokens: int, ttl_s: float) -> None:
        check_ids(request_id, instance_id)
        check_reservation(tokens, limit_tokens)
        check_ttl(ttl_s)
        present = self._live(instance_id)
        if present is None:
            raise ReservationRefused(instance_id, Refusal.NOT_REGISTERED)
        if present.info.state is not InstanceState.READY:
            raise ReservationRefused(instance_id, Refusal.NOT_READY)
        reserved = sum(item.tokens for item in self._reservations(present) if item.request_id != request_id)
        free = limit_tokens
        if present.load is not None:
            layout = present.info.layout
            free = min(free, present.load.free_blocks * (layout.block_tokens if layout else 0))
        if reserved + tokens > free:
            raise ReservationRefused(instance_id, Refusal.NO_ROOM)
        present.reservations[request_id] = Reservation(request_id, instance_id, tokens, self._clock.now_s() + ttl_s)

    async def release(self, request_id: str, instance_id: str) -> None:
        check_ids(request_id, instance_id)
        present = self._registrations.get(instance_id)
        if present is not None:
            present.reservations.pop(request_id, None)

    async def claim(
        self, request_id: str, instance_id: str, *, expected: Ownership | None, epoch: int, ttl_s: float
    ) -> None:
        check_ids(request_id, instance_id)
        check_claim(expected, epoch)
        check_ttl(ttl_s)
        current = await self.owner(request_id)
        if current != expected:
            raise OwnershipConflict(request_id, current)
        self._owners[request_id] = (Ownership(instance_id, epoch), self._clock.now_s() + ttl_s)

    async def owner(self, request_id: str) -> Ownership | None:
        check_ids(request_id)
        ownership, expires_at_s = self._owners.get(request_id, (None, 0.0))
        if ownership is not None and expires_at_s <= self._clock.now_s():
            del self._owners[request_id]
            return None
        return ownership

    async def renew(self, owned: dict[str, int], *, ttl_s: float) -> list[str]:
        check_ids(*owned)
        check_ttl(ttl_s)
        missing: list[str] = []
        for request_id, epoch in owned.items():
            check_epoch(epoch)
            current = await self.owner(request_id)
            if current is None:
                missing.append(request_id)
            elif current.epoch == epoch:
                self._owners[request_id] = (current, self._clock.now_s() + ttl_s)
        return missing

    async def disown(self, request_id: str, epoch: int) -> None:
        check_ids(request_id)
        check_epoch(epoch)
        current = await self.owner(request_id)
        if current is not None and current.epoch <= epoch:
            del self._owners[request_id]

    async def lead(self, role: Role, instance_id: str, incarnation: str, *, ttl_s: float) -> int | None:
        check_ids(instance_id, incarnation)
        check_ttl(ttl_s)
        now_s = self._clock.now_s()
        last = self._leads.get(role)
        if last is None or last.expires_at_s <= now_s:
            term = max(1 if last is None else last.leadership.term + 1, int(now_s * 1000))
        elif (last.leadership.instance_id, last.incarnation) == (instance_id, incarnation):
            term = last.leadership.term
        else:
            return None
        self._leads[role] = _Lead(Leadership(instance_id, term), incarnation, now_s + ttl_s)
        return term

    async def resign(self, role: Role, instance_id: str, incarnation: str) -> None:
        check_ids(instance_id, incarnation)
        last = self._leads.get(role)
        if last is not None and (last.leadership.instance_id, last.incarnation) == (instance_id, incarnation):
            self._leads[role] = dataclasses.replace(last, expires_at_s=self._clock.now_s())

    async def leader(self, role: Role) -> Leadership | None:
        last = self._leads.get(role)
        return None if last is None or last.expires_at_s <= self._clock.now_s() else last.leadership

    async def publish_rounds(self, rounds: Sequence[RoundSummary], *, ttl_s: float) -> None:
        check_rounds(rounds)
        check_ttl(ttl_s)
        self._rounds = (tuple(rounds), self._clock.now_s() + ttl_s)

    async def rounds(self) -> tuple[RoundSummary, ...]:
        rounds, expires_at_s = self._rounds
        return rounds if expires_at_s > self._clock.now_s() else ()

    async def close(self) -> None:
        """There is nothing to release."""

    def _live(self, instance_id: str, incarnation: str | None = None) -> _Registration | None:
        """The registration if it has not expired (and is of ``incarnation``, where given)."""
        present = self._registrations.get(instance_id)
        if present is not None and present.expires_at_s <= self._clock.now_s():
            del self._registrations[instance_id]
            return None
        if present is not None and incarnation is not None and present.info.incarnation != incarnation:
            return None
        return present

    def _reservations(self, present: _Registration) -> list[Reservation]:
        """The live reservations there; drops the expired."""
        now_s = self._clock.now_s()
        present.reservations = {
            request_id: item for request_id, item in present.reservations.items() if item.expires_at_s > now_s
        }
        return list(present.reservations.values())

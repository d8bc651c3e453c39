"""The load ledger: who is in the cluster, how loaded, what is reserved, and who owns each sequence.

This file is the port. ``memory`` and ``redis`` implement it; one conformance suite (tests/ledger) runs against both.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from starmesh.rounds import RoundSummary
from starmesh.types import ClusterView, InstanceInfo, InstanceLoad, InstanceState, Leadership, Ownership, Role


class LedgerError(Exception):
    """A ledger operation that cannot be done as asked."""


class InvalidDocument(LedgerError):
    """What the store holds under a key of ours is not ours, or of another version. It is never guessed at."""


class LedgerUnavailable(LedgerError):
    """The ledger does not answer. Streams in flight go on; retry later."""


class Refusal(StrEnum):
    """Why a reservation was refused."""

    NOT_REGISTERED = "not registered"
    NOT_READY = "not ready"
    NO_ROOM = "no room"


class ReservationRefused(LedgerError):
    """The instance is gone, not ready, or has no room. ``instance_id`` names it; ``reason`` is a ``Refusal``."""

    def __init__(self, instance_id: str, reason: str) -> None:
        super().__init__(f"{instance_id}: {reason}")
        self.instance_id = instance_id
        self.reason = reason


class OwnershipConflict(LedgerError):
    """A compare-and-set met another owner. ``current`` is the ownership found, None when there is none."""

    def __init__(self, request_id: str, current: Ownership | None) -> None:
        super().__init__(f"{request_id}: owned by {current}")
        self.current = current


class Ledger(Protocol):
    """The ledger. Every method raises LedgerUnavailable when the store does not answer within the operation's
    timeout; whether a write was done is then unknown. Times are the store's own clock, so that processes need no
    synchronised clocks. Ids, ttls and counts outside the bounds of ``starmesh.ledger.limits`` raise ValueError."""

    async def register(self, info: InstanceInfo, *, ttl_s: float) -> None:
        """Add or replace an instance; it vanishes, load included, after ``ttl_s`` without a report. Load and
        reservations are kept only when the incarnation registered until now is the same."""
        ...

    async def report(self, instance_id: str, incarnation: str, load: InstanceLoad, *, ttl_s: float) -> bool:
        """Store a load snapshot and renew the registration.

        Reservations of requests that ``load.sequences`` includes are dropped in the same atomic step. Returns False,
        storing nothing, when the registration is gone or of another incarnation: register again.
        """
        ...

    async def set_state(self, instance_id: str, incarnation: str, state: InstanceState) -> bool:
        """Change whether the instance takes new work. Returns False when it is not registered."""
        ...

    async def deregister(self, instance_id: str, incarnation: str) -> None:
        """Remove an instance with its load and reservations, unless another incarnation has replaced it."""
        ...

    async def view(self) -> ClusterView:
        """All live instances with loads and live reservations, as of one moment."""
        ...

    async def reserve(self, request_id: str, instance_id: str, tokens: int, *, limit_tokens: int, ttl_s: float) -> None:
        """Claim room for ``tokens`` on an instance until its report includes the request, release, or ``ttl_s``.

        Atomic. Raises ReservationRefused unless the instance is registered and READY, and its free tokens
        (``free_blocks * block_tokens`` of its last report less live reservations of other requests) hold ``tokens``
        with at most ``limit_tokens`` reserved in all. An instance that has not reported yet counts as having
        ``limit_tokens`` free. Reserving again for the same request and instance replaces the reservation.
        """
        ...

    async def release(self, request_id: str, instance_id: str) -> None:
        """Drop a reservation; a missing one is fine."""
        ...

    async def claim(
        self, request_id: str, instance_id: str, *, expected: Ownership | None, epoch: int, ttl_s: float
    ) -> None:
        """Make ``instance_id`` the owner under ``epoch`` if the present ownership equals ``expected``.

        Raises OwnershipConflict otherwise, and ValueError unless ``epoch`` exceeds the expected one. The entry expires
        after ``ttl_s`` unless renewed by another claim or ``renew``. A caller that got LedgerUnavailable asks
        ``owner`` before it tries again: its claim may have been done.
        """
        ...

    async def owner(self, request_id: str) -> Ownership | None:
        """Who owns the sequence now."""
        ...

    async def renew(self, owned: dict[str, int], *, ttl_s: float) -> list[str]:
        """Keep the ownership entries of ``owned`` (request id to epoch) for longer; other epochs are left alone.

        Returns the request ids, in the order of ``owned``, that have no entry at all: it expired, or the store
        restarted empty. Not atomic over many: an entry may go or come between one and the next.
        """
        ...

    async def disown(self, request_id: str, epoch: int) -> None:
        """Remove the ownership entry of this epoch or older."""
        ...

    async def lead(self, role: Role, instance_id: str, incarnation: str, *, ttl_s: float) -> int | None:
        """Take the lead of a role for ``ttl_s``, or keep it for as long again. Returns the term, None while another
        leads.

        Atomic. A leader keeps its term while it comes back in time; after that even the same process gets a new one.
        Each new term is above all before it, and at least the store's clock in milliseconds: a store that restarted
        empty goes on above the terms that instances have seen, unless its clock was set back by more than it was away.
        """
        ...

    async def resign(self, role: Role, instance_id: str, incarnation: str) -> None:
        """Give the lead up, so that another need not wait for its end; does nothing if another leads."""
        ...

    async def leader(self, role: Role) -> Leadership | None:
        """Who leads the role now."""
        ...

    async def publish_rounds(self, rounds: Sequence[RoundSummary], *, ttl_s: float) -> None:
        """Show these rounds of rescheduling, newest first, instead of those shown until now; for ``ttl_s``."""
        ...

    async def rounds(self) -> tuple[RoundSummary, ...]:
        """The rounds shown last; none after their time."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...

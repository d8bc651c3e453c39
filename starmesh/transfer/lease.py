"""Leases: which blocks others may read, and until when.

Pure bookkeeping: time comes in as seconds, ids come from the caller's factory, and nothing here frees a block. Every
lease that is granted comes out exactly once, of ``release``, ``expire`` or ``revoke``; whoever takes it out frees what
it kept. A lease whose time has passed is over at once, even before ``expire`` has taken it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from starmesh.transfer import LeaseLost


class LeaseTableFull(Exception):
    """No lease can be granted until another ends."""


@dataclass(frozen=True, slots=True)
class _Lease:
    owner_key: str
    block_ids: frozenset[int]
    duration_s: float
    ends_at_s: float


class LeaseTable:
    """The leases that an instance has granted. At most ``max_leases`` at a time.

    ``new_id`` makes lease ids. They are all that a puller has to show, so outside of tests they must be unguessable
    (``secrets.token_hex``). ``owner_key`` is the granter's own name for what the lease keeps; several leases may share
    one.
    """

    def __init__(self, *, new_id: Callable[[], str], max_leases: int = 4096) -> None:
        self._new_id = new_id
        self._max_leases = max_leases
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        """Leases not yet taken out, those whose time has passed included."""
        return len(self._leases)

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self._leases)}/{self._max_leases}>"

    def grant(self, block_ids: Iterable[int], owner_key: str, *, now_s: float, duration_s: float) -> str:
        """Lease blocks and return the lease's id. Raises LeaseTableFull, or ValueError for a duration of 0 or less."""
        if not duration_s > 0:
            raise ValueError(f"a lease needs a duration over 0 s, not {duration_s}")
        if len(self._leases) >= self._max_leases:
            raise LeaseTableFull(f"{self._max_leases} leases are out; wait for one to end")
        lease_id = self._new_id()
        if lease_id in self._leases:
            raise ValueError(f"lease id {lease_id!r} is taken; the factory repeats itself")
        self._leases[lease_id] = _Lease(owner_key, frozenset(block_ids), duration_s, now_s + duration_s)
        return lease_id

    def renew(self, lease_id: str, *, now_s: float) -> float:
        """Let a lease last its full duration from now, and return that. Raises LeaseLost when it is over."""
        lease = self._held(lease_id, now_s)
        self._leases[lease_id] = replace(lease, ends_at_s=max(lease.ends_at_s, now_s + lease.duration_s))
        return lease.duration_s

    def holds(self, lease_id: str, *, now_s: float) -> bool:
        """Whether the lease is not over."""
        lease = self._leases.get(lease_id)
        return lease is not None and now_s < lease.ends_at_s

    def covers(self, lease_id: str, block_ids: Iterable[int], *, now_s: float) -> bool:
        """Whether the lease is not over and all of ``block_ids`` are under it."""
        return self.holds(lease_id, now_s=now_s) and self._leases[lease_id].block_ids.issuperset(block_ids)

    def release(self, lease_id: str, *, now_s: float) -> str:
        """Take a lease out and return its owner key. Raises LeaseLost when it is over: ``expire`` takes it out then."""
        owner_key = self._held(lease_id, now_s).owner_key
        del self._leases[lease_id]
        return owner_key

    def expire(self, now_s: float) -> list[tuple[str, str]]:
        """Take out the leases whose time has passed, as (lease id, owner key), in the order of their grants."""
        over = [(key, lease.owner_key) for key, lease in self._leases.items() if lease.ends_at_s <= now_s]
        for lease_id, _ in over:
            del self._leases[lease_id]
        return over

    def revoke(self, owner_key: str) -> list[str]:
        """Take out all leases of an owner and return their ids: from now on nobody can confirm a pull of its blocks."""
        revoked = [key for key, lease in self._leases.items() if lease.owner_key == owner_key]
        for lease_id in revoked:
            del self._leases[lease_id]
        return revoked

    def _held(self, lease_id: str, now_s: float) -> _Lease:
        if not self.holds(lease_id, now_s=now_s):
            raise LeaseLost(f"lease {lease_id!r} is over; prefill or ask for the blocks again")
        return self._leases[lease_id]

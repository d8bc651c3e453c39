"""Leases come out exactly once, and cover nothing after their end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from starmesh.transfer import LeaseLost
from starmesh.transfer.lease import LeaseTable, LeaseTableFull

pytestmark = pytest.mark.fast


def table(max_leases: int = 8) -> LeaseTable:
    counter = itertools.count()
    return LeaseTable(new_id=lambda: f"lease-{next(counter)}", max_leases=max_leases)


def test_a_lease_covers_its_blocks_until_it_ends() -> None:
    leases = table()
    lease = leases.grant([1, 2, 3], "a", now_s=10.0, duration_s=5.0)
    assert leases.covers(lease, [3, 1], now_s=14.9)
    assert not leases.covers(lease, [3, 4], now_s=14.9)
    assert not leases.covers(lease, [3], now_s=15.0)
    assert not leases.covers("another", [], now_s=10.0)


def test_release_after_the_end_is_lost_and_expire_frees() -> None:
    leases = table()
    lease = leases.grant([1], "a", now_s=0.0, duration_s=1.0)
    with pytest.raises(LeaseLost):
        leases.release(lease, now_s=1.0)
    with pytest.raises(LeaseLost):
        leases.renew(lease, now_s=1.0)
    assert leases.expire(1.0) == [(lease, "a")]
    assert leases.expire(1.0) == []


def test_renewal_counts_from_now_and_never_shortens() -> None:
    leases = table()
    lease = leases.grant([1], "a", now_s=0.0, duration_s=2.0)
    assert leases.renew(lease, now_s=1.5) == 2.0
    assert leases.covers(lease, [1], now_s=3.4)
    leases.renew(lease, now_s=1.0)
    assert leases.covers(lease, [1], now_s=3.4)


def test_the_table_is_bounded_and_says_so() -> None:
    leases = table(max_leases=1)
    leases.grant([1], "a", now_s=0.0, duration_s=1.0)
    with pytest.raises(LeaseTableFull):
        leases.grant([2], "b", now_s=0.0, duration_s=1.0)
    assert repr(leases) == "<LeaseTable 1/1>"
    leases.revoke("a")
    leases.grant([2], "b", now_s=0.0, duration_s=1.0)


@pytest.mark.parametrize("duration_s", [0.0, -1.0, float("nan")])
def test_a_lease_needs_a_duration(duration_s: float) -> None:
    with pytest.raises(ValueError, match="duration"):
        table().grant([1], "a", now_s=0.0, duration_s=duration_s)


class Leases(RuleBasedStateMachine):
    """Any order of calls against a table, beside a plain record of what was granted and when it ends."""

    granted = Bundle("granted")

    def __init__(self) -> None:
        super().__init__()
        self.leases = table()
        self.now_s = 0.0
        self.out: dict[str, tuple[str, frozenset[int], float, float]] = {}
        self.freed: list[str] = []

    @rule(
        target=granted,
        blocks=st.frozensets(st.integers(0, 9)),
        owner=st.sampled_from("abc"),
        duration=st.integers(1, 9),
    )
    def grant(self, blocks: frozenset[int], owner: str, duration: int) -> str:
        if len(self.out) == 8:
            with pytest.raises(LeaseTableFull):
                self.leases.grant(blocks, owner, now_s=self.now_s, duration_s=duration)
            return "never granted"
        lease = self.leases.grant(blocks, owner, now_s=self.now_s, duration_s=duration)
        self.out[lease] = (owner, blocks, duration, self.now_s + duration)
        return lease

    @rule(seconds=st.integers(0, 5))
    def pass_time(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(lease=granted)
    def renew(self, lease: str) -> None:
        if self.holds(lease):
            owner, blocks, duration, _ = self.out[lease]
            assert self.leases.renew(lease, now_s=self.now_s) == duration
            self.out[lease] = (owner, blocks, duration, self.now_s + duration)
        else:
            with pytest.raises(LeaseLost):
                self.leases.renew(lease, now_s=self.now_s)

    @rule(lease=st.one_of(granted, consumes(granted)))
    def release(self, lease: str) -> None:
        if self.holds(lease):
            assert self.leases.release(lease, now_s=self.now_s) == self.out.pop(lease)[0]
            self.freed.append(lease)
        else:
            with pytest.raises(LeaseLost):
                self.leases.release(lease, now_s=self.now_s)

    @rule()
    def expire(self) -> None:
        over = self.leases.expire(self.now_s)
        assert over == [(lease, self.out[lease][0]) for lease in self.out if not self.holds(lease)]
        for lease, _ in over:
            del self.out[lease]
            self.freed.append(lease)

    @rule(owner=st.sampled_from("abc"))
    def revoke(self, owner: str) -> None:
        revoked = self.leases.revoke(owner)
        assert sorted(revoked) == sorted(lease for lease, record in self.out.items() if record[0] == owner)
        for lease in revoked:
            del self.out[lease]
            self.freed.append(lease)

    @rule(lease=granted, blocks=st.frozensets(st.integers(0, 9)))
    def covers(self, lease: str, blocks: frozenset[int]) -> None:
        expected = self.holds(lease) and blocks <= self.out[lease][1]
        assert self.leases.covers(lease, blocks, now_s=self.now_s) == expected

    @invariant()
    def freed_exactly_once(self) -> None:
        assert len(self.freed) == len(set(self.freed))
        assert len(self.leases) == len(self.out)

    def holds(self, lease: str) -> bool:
        return lease in self.out and self.now_s < self.out[lease][3]


test_any_order_of_calls = Leases.TestCase

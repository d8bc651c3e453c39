"""The router's corrections of the ledger's view."""

from __future__ import annotations

import dataclasses

import pytest

from services.router.local_view import LocalView
from starmesh.types import ClusterView, InstanceInfo, InstanceLoad, InstanceView, Reservation, Role, SequenceLoad

pytestmark = pytest.mark.fast


def instance(instance_id: str = "d", *, reported_at_s: float = 0.0, incarnation: str = "i") -> InstanceView:
    role = Role.PREFILL if instance_id.startswith("p") else Role.DECODE
    info = InstanceInfo(instance_id=instance_id, incarnation=incarnation, role=role, address="")
    return InstanceView(info, InstanceLoad(total_blocks=8, free_blocks=8), reported_at_s=reported_at_s)


def seen(*instances: InstanceView, now_s: float = 100.0) -> LocalView:
    local = LocalView()
    local.update(ClusterView(now_s, instances), 0.0)
    return local


def reserved(local: LocalView) -> list[str]:
    return [item.request_id for view in local.corrected().instances for item in view.reservations]


def test_own_requests_count_until_the_ledger_counts_them() -> None:
    local = seen(instance())
    local.add("r", "d", 40)
    assert local.corrected().instances[0].reserved_tokens == 40
    local.update(ClusterView(101, (instance(),)), 1.0)
    assert reserved(local) == ["r"]
    ours = Reservation("r", "d", 40, expires_at_s=200)
    local.update(ClusterView(102, (dataclasses.replace(instance(), reservations=(ours,)),)), 2.0)
    assert reserved(local) == ["r"]  # once
    local.update(ClusterView(103, (instance(),)), 3.0)
    assert reserved(local) == []


def test_own_requests_count_until_the_instance_reports_them() -> None:
    local = seen(instance())
    local.add("r", "d", 40)
    load = InstanceLoad(total_blocks=8, free_blocks=5, sequences=(SequenceLoad("r", 1, 1, 1, 1, 1),))
    local.update(ClusterView(101, (dataclasses.replace(instance(), load=load),)), 1.0)
    assert reserved(local) == []


def test_one_request_can_be_left_out() -> None:
    held = tuple(Reservation(name, "d", 40, expires_at_s=200) for name in ("r", "s"))
    local = seen(dataclasses.replace(instance(), reservations=held), instance("e"))
    local.add("r", "e", 40)
    local.add("t", "e", 40)
    left = {view.info.instance_id: view.reservations for view in local.corrected(without="r").instances}
    assert [item.request_id for item in (*left["d"], *left["e"])] == ["s", "t"]
    assert sorted(reserved(local)) == ["r", "r", "s", "t"]


def test_removed_requests_count_no_more() -> None:
    local = seen(instance())
    local.add("r", "d", 40)
    local.add("s", "d", 40)
    local.remove("r", "d")
    local.remove("unknown", "d")
    assert reserved(local) == ["s"]


def test_a_suspect_is_cleared_by_a_later_report_only() -> None:
    local = seen(instance(reported_at_s=99.9))
    local.suspect("d", 0.0)
    assert local.suspected(9.0, ledger_available=True) == {"d"}
    local.update(ClusterView(100.2, (instance(reported_at_s=100.1),)), 0.2)
    assert local.suspected(9.0, ledger_available=True) == {"d"}  # was perhaps on its way when the instance died
    local.update(ClusterView(100.8, (instance(reported_at_s=100.7),)), 0.8)
    assert local.suspected(9.0, ledger_available=True) == set()


def test_a_suspect_is_cleared_by_its_successor() -> None:
    local = seen(instance(reported_at_s=99.9))
    local.suspect("d", 0.0)
    local.update(ClusterView(100.1, (instance(incarnation="j"),)), 0.1)
    assert local.suspected(0.1, ledger_available=True) == set()


def test_a_suspect_is_tried_again_when_no_report_can_be_seen() -> None:
    local = seen(instance())
    local.suspect("d", 0.0)
    assert local.suspected(1.0, ledger_available=False) == {"d"}
    assert local.suspected(3.0, ledger_available=False) == set()


def test_missing_takes_a_while_and_ends_with_a_return() -> None:
    local = seen(instance("a"), instance("b"))
    local.update(ClusterView(101), 1.0)
    assert local.missing(1.5) == set()
    local.update(ClusterView(101.6, (instance("b"),)), 1.6)
    local.update(ClusterView(103, (instance("b"),)), 3.0)
    assert local.missing(3.0) == {"a"}
    local.update(ClusterView(104, (instance("a"), instance("b"))), 4.0)
    assert local.missing(9.0) == set()


def test_the_missing_are_forgotten_in_the_end() -> None:
    local = seen(instance("a"))
    for now_s in (1.0, 200.0, 400.0):
        local.update(ClusterView(100 + now_s), now_s)
    assert local.missing(400.0) == set()


def test_only_what_has_an_alternative_is_avoided() -> None:
    local = seen(instance("p1"), instance("d1"), instance("d2"))
    assert local.avoidable({"p1", "d1"}, set()) == {"d1"}
    assert local.avoidable({"d1", "d2"}, set()) == set()
    assert local.avoidable({"d1"}, {"d2"}) == set()

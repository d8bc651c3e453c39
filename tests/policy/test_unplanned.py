"""Migrations that this memory has not planned take up slots, budget and directions as planned ones do."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.policy.rescheduling import InFlight, PlanMemory, ReschedulingConfig, plan
from starmesh.types import InstanceView, Migration, MigrationReason

from .decoding import CONFIG, decode, sequence
from .views import NOW_S, cluster

pytestmark = pytest.mark.fast

GREEDY = dataclasses.replace(CONFIG, policy="star_plus")


def busy(name: str) -> InstanceView:
    return decode(name, *(sequence(f"{name}-{i}", 100) for i in range(8)))


def reporting(found: InstanceView, *, outgoing: int = 0, incoming: int = 0) -> InstanceView:
    assert found.load is not None
    load = dataclasses.replace(found.load, outgoing_migrations=outgoing, incoming_migrations=incoming)
    return dataclasses.replace(found, load=load)


def moves(*found: InstanceView, memory: PlanMemory | None = None, **limits: int) -> list[tuple[str, str]]:
    config: ReschedulingConfig = dataclasses.replace(GREEDY, **limits)  # type: ignore[arg-type]
    return [(move.source, move.target) for move in plan(cluster(*found), memory or PlanMemory(), config).migrations]


def test_slots_of_either_end_are_taken() -> None:
    assert len(moves(busy("d0"), decode("d1"), max_in_flight_per_source=3)) == 3
    assert len(moves(reporting(busy("d0"), outgoing=2), decode("d1"), max_in_flight_per_source=3)) == 1
    assert moves(reporting(busy("d0"), outgoing=5), decode("d1"), max_in_flight_per_source=3) == []
    assert len(moves(busy("d0"), reporting(decode("d1"), incoming=2), max_in_flight_per_target=3)) == 1
    assert moves(busy("d0"), reporting(decode("d1"), incoming=3), max_in_flight_per_target=3) == []


def test_the_budget_counts_each_migration_once() -> None:
    both = (reporting(busy("d0"), outgoing=2), reporting(decode("d1"), incoming=2))
    assert len(moves(*both, max_in_flight=3)) == 1
    # The other end is not in the view.
    assert len(moves(reporting(busy("d0"), outgoing=2), decode("d1"), max_in_flight=3)) == 1
    assert len(moves(busy("d0"), reporting(decode("d1"), incoming=2), max_in_flight=3)) == 1
    assert moves(*both, max_in_flight=1) == []


def test_what_memory_has_planned_is_not_counted_twice() -> None:
    move = Migration("d0-0", "d0", "d1", 1, MigrationReason.LOAD, 1.0)
    memory = PlanMemory().started((InFlight(move, NOW_S, 0.1),))
    reported = (reporting(busy("d0"), outgoing=1), reporting(decode("d1"), incoming=1))
    for found in (reported, (busy("d0"), decode("d1"))):
        assert len(moves(*found, memory=memory, max_in_flight=3)) == 2
        assert len(moves(*found, memory=memory, max_in_flight_per_source=2)) == 1


def test_ends_keep_their_direction() -> None:
    # d1 takes something in: it sends nothing, so d0 gets nothing.
    assert moves(decode("d0"), busy("d1")) != []
    assert moves(decode("d0"), reporting(busy("d1"), incoming=1)) == []
    assert moves(reporting(decode("d0"), outgoing=1), busy("d1")) == []

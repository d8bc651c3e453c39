"""The protocol under faults: whatever happens, one owner, every token once and in order, no block lost; and when the
faults end, every request does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.checks import heal
from tests.migration.replay import act, run
from tests.migration.world import World

SEEDS = 400
MARKS = {
    "BlocksReserved -> RESERVED",
    "Reserved -> COPYING",
    "Reserved -> FREEZING",
    "Copied -> COPYING",
    "Frozen -> COMMITTING",
    "Committed -> MOVED",
    "Declined -> STAYED",
    "NoAnswer -> TAKING_BACK",
    "TimedOut -> TAKING_BACK",
    "LedgerSilent -> ASKING",
    "OwnerIs -> TAKING_BACK",
    "OwnerIs -> CLAIMING",
    "OwnerIs -> STAYED",
    "OwnerIs -> MOVED",
    "OwnerIs -> IN_DOUBT",
    "OwnerIs -> STARTED",
    "OwnerIs -> FREED",
    "AbortAsked -> STOPPING",
    "TimedOut -> STOPPING",
    "Preempted -> STAYED",
    "Finished -> ENDED",
    "Cancelled -> ENDED",
    "Attached -> ATTACHED",
    "crashed",
}
"""What the seeds together must have met; a world that has become too tame proves nothing."""


def decoding_world() -> World:
    """A world whose only request decodes."""
    world = World()
    world.add(9, 20)
    while not world.orders():
        world.work()[0][1]()
    return world


def walk(world: World, steps: int, *, order_at: int = 0) -> None:
    """Run with no faults: all that can be done is done in turn, with a decode step now and then."""
    for number in range(steps):
        actions = world.orders()[:1] if number == order_at else []
        act(world, actions or (world.steps() if number % 8 == 7 else []) or world.work() or world.steps(), 0)


@pytest.mark.fast
def test_a_migration_without_faults_moves_the_sequence_and_its_tokens() -> None:
    world = decoding_world()
    walk(world, 80)
    heal(world)
    told = [line.split(": ", 1)[1] for line in world.log]
    assert "Committed -> MOVED" in told
    assert "Attached -> ATTACHED" in told
    assert world.requests["q0"].recoveries == 1  # its one start
    assert world.requests["q0"].stream.epoch == world.entries["q0"].epoch


def test_every_fault_at_every_point_of_a_migration() -> None:
    """One fault each, of every kind there is at that point; then the network heals."""
    met: set[str] = set()
    for step in range(60):
        for number in range(200):
            world = decoding_world()
            walk(world, step)
            faults = [*world.network_faults(), *world.ledger_faults(), *world.preemptions()]
            faults += [*world.timers(), *world.disasters()]
            if number >= len(faults):
                break
            name, fault = faults[number]
            try:
                fault()
                heal(world)
            except Exception as error:
                raise AssertionError(f"{name} at {step}: {error!r}; it went {world.log}") from error
            met |= world.marks
    assert {"NoAnswer -> TAKING_BACK", "OwnerIs -> MOVED", "OwnerIs -> STAYED", "AbortAsked -> STOPPING"} <= met


def test_two_faults_during_a_migration() -> None:
    """A fault of every kind at every point, and another one a little later."""
    draw = random.Random(11)
    for step in range(20, 60):
        for number in range(200):
            world = decoding_world()
            walk(world, step)
            kinds = (world.network_faults, world.ledger_faults, world.timers, world.disasters)
            faults = [action for kind in kinds for action in kind()]
            if number >= len(faults):
                break
            story = [faults[number]]
            try:
                story[0][1]()
                walk(world, draw.randint(0, 6), order_at=-1)
                story.append(draw.choice([action for kind in kinds for action in kind()]))
                story[1][1]()
                heal(world)
            except Exception as error:
                raise AssertionError(f"{[name for name, _ in story]} from {step}: {error!r}, {world.log}") from error


# The fast lane has the first seeds below, in the test of what they meet, and here the last.
@pytest.mark.parametrize("first", [*range(0, SEEDS - 50, 50), pytest.param(SEEDS - 50, marks=pytest.mark.fast)])
def test_many_faults_from_seeds(first: int) -> None:
    for seed in range(first, first + 50):
        run(seed)


@pytest.mark.fast
def test_the_seeds_meet_what_they_are_meant_to() -> None:
    met: set[str] = set()
    for seed in range(SEEDS):
        met |= run(seed).marks
        if met >= MARKS:
            return
    raise AssertionError(f"no seed has met {MARKS - met}")


@pytest.mark.fast
@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1 << 16)), max_size=200))
def test_faults_that_hypothesis_chooses(choices: list[tuple[int, int]]) -> None:
    """As the seeds, but a failure shrinks to the actions that it takes."""
    world = decoding_world()
    kinds = (
        world.work,
        world.orders,
        world.steps,
        world.timers,
        world.network_faults,
        world.ledger_faults,
        world.disasters,
    )
    for kind, choice in choices:
        act(world, kinds[kind](), choice)
    heal(world)


@pytest.mark.fast
def test_sequences_go_back_and_forth() -> None:
    """Many moves of one long sequence: each goes on where the last ended, and none is recovered."""
    world = World()
    world.add(5, 40)
    draw = random.Random(7)
    for _ in range(600):
        orders = world.orders() if draw.random() < 0.2 else []
        act(world, orders or (world.steps() if draw.random() < 0.08 else world.work()), draw.randrange(1 << 16))
    moves = sum(line.endswith("Committed -> MOVED") for line in world.log)
    heal(world)
    assert moves >= 5
    assert world.requests["q0"].recoveries == 1

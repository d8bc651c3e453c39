"""What an instance decides when it must give sequences up: by example, and what holds on any cluster."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.policy.evacuation import drain_plan, relief_plan
from starmesh.policy.rescheduling import InstanceSkip, Plan, PlanMemory, SequenceSkip, SkippedInstance
from starmesh.types import ClusterView, InstanceLoad, InstanceState, InstanceView, MigrationReason, SequenceLoad

from .decoding import (
    CONFIG,
    any_cluster,
    applied,
    blocks_at,
    blocks_for_sequences,
    by_id,
    decode,
    limit_of,
    running,
    seeds,
    sequence,
    upper_of,
)
from .views import NOW_S, cluster

pytestmark = pytest.mark.fast

EMPTY = PlanMemory()
ROOMY = dataclasses.replace(CONFIG, horizon_steps=100)
LIMITED = dataclasses.replace(ROOMY, max_in_flight=1, max_in_flight_per_source=2, max_in_flight_per_target=1)


def load_of(found: InstanceView) -> InstanceLoad:
    assert found.load is not None
    return found.load


def moves(decided: Plan) -> list[tuple[str, str]]:
    return [(move.request_id, move.target) for move in decided.migrations]


def reasons(decided: Plan) -> dict[str, SequenceSkip]:
    return {name: skip.reason for skip in decided.skipped for name in skip.request_ids}


def test_a_drain_spreads_over_the_others() -> None:
    leaving = decode("d0", *(sequence(f"s{number}", 100, 100) for number in range(4)))
    view = cluster(leaving, decode("d1"), decode("d2"), decode("d3", sequence("x", 900)))
    decided = drain_plan(view, "d0", load_of(leaving), EMPTY, ROOMY)
    assert moves(decided) == [("s0", "d1"), ("s1", "d2"), ("s2", "d1"), ("s3", "d2")]
    assert {(move.source, move.reason, move.epoch) for move in decided.migrations} == {("d0", MigrationReason.DRAIN, 1)}
    assert [entry.migration for entry in decided.memory.in_flight] == list(decided.migrations)


def test_what_lasts_longest_for_each_token_goes_first() -> None:
    # 300 / 100, 900 / 450, unknown and at most 999 / 500, 10 / 400.
    leaving = decode("d0", sequence("a", 400, 10), sequence("b", 450, 900), sequence("c", 100, 300), sequence("d", 500))
    view = cluster(leaving, decode("d1", total_blocks=1000))
    assert [name for name, _ in moves(drain_plan(view, "d0", load_of(leaving), EMPTY, ROOMY))] == ["c", "b", "d", "a"]


def test_limits_count_what_is_under_way_and_the_next_call_goes_on() -> None:
    leaving = decode("d0", *(sequence(f"s{number}", 100, 100) for number in range(4)))
    view = cluster(leaving, decode("d1"), decode("d2"), decode("d3"))
    first = drain_plan(view, "d0", load_of(leaving), EMPTY, LIMITED)
    assert moves(first) == [("s0", "d1"), ("s1", "d2")]
    assert reasons(first) == dict.fromkeys(("s2", "s3"), SequenceSkip.BUDGET)
    busy = drain_plan(view, "d0", load_of(leaving), first.memory, LIMITED)
    assert moves(busy) == []
    memory = busy.memory.failed("s0", now_s=NOW_S, config=LIMITED)
    again = drain_plan(view, "d0", load_of(leaving), memory, LIMITED)
    # s0 rests, and d2 still takes s1 in.
    assert moves(again) == [("s2", "d1")]
    assert reasons(again)["s0"] is SequenceSkip.COOLING_DOWN
    # What others have commanded it to send takes its slots too.
    commanded = dataclasses.replace(load_of(leaving), outgoing_migrations=2)
    assert moves(drain_plan(view, "d0", commanded, EMPTY, LIMITED)) == []


def test_the_instances_own_load_counts_not_the_ledgers() -> None:
    old = decode("d0", sequence("gone", 100), state=InstanceState.DRAINED, reported_at_s=NOW_S - 100)
    load = load_of(decode("d0", sequence("here", 100)))
    view = cluster(old, decode("d1"))
    assert moves(drain_plan(view, "d0", load, EMPTY, ROOMY)) == [("here", "d1")]
    never = dataclasses.replace(old, load=None, reported_at_s=0.0)
    assert moves(drain_plan(cluster(never, decode("d1")), "d0", load, EMPTY, ROOMY)) == [("here", "d1")]


@pytest.mark.parametrize("others", [(), (decode("d1", reported_at_s=NOW_S - 100),), (decode("d1", layout=None),)])
def test_nowhere_to_go(others: tuple[InstanceView, ...]) -> None:
    leaving = decode("d0", sequence("a", 100))
    for view in (cluster(leaving, *others), cluster(*others)):
        for decided in (
            drain_plan(view, "d0", load_of(leaving), EMPTY, ROOMY),
            relief_plan(view, "d0", load_of(leaving), EMPTY, ROOMY, steps=10),
        ):
            assert decided.migrations == ()
            assert reasons(decided) == {"a": SequenceSkip.NO_TARGET}
    if others:
        skipped = drain_plan(cluster(leaving, *others), "d0", load_of(leaving), EMPTY, ROOMY).skipped_instances
        assert SkippedInstance("d0", InstanceSkip.ALONE) in skipped


def full(*sequences: SequenceLoad, total_blocks: int) -> InstanceView:
    return decode("d0", *sequences, total_blocks=total_blocks)


def test_nothing_moves_while_everything_fits() -> None:
    # 2 x 100 tokens are 14 blocks now, and 16 from step 13 on.
    source = full(sequence("a", 100), sequence("b", 100), total_blocks=14)
    view = cluster(source, decode("d1"))
    assert relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=12).migrations == ()
    decided = relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=13)
    assert moves(decided) == [("a", "d1")]
    assert decided.migrations[0].reason is MigrationReason.MEMORY
    assert decided.migrations[0].gain_tokens == 32
    # What is on its way out is as good as gone.
    assert relief_plan(view, "d0", load_of(source), decided.memory, ROOMY, steps=13).migrations == ()


def test_of_equals_the_one_that_would_be_preempted_first() -> None:
    source = full(*(sequence(name, 100) for name in "abc"), sequence("d", 60), total_blocks=27)
    view = cluster(source, decode("d1"))
    for order, expected in ((("c", "b", "a", "d"), "c"), (("d", "c"), "d"), ((), "d")):
        decided = relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=13, preempted_first=order)
        assert moves(decided) == [(expected, "d1")]


def test_fewest_go_even_if_another_would_be_preempted() -> None:
    # 6 blocks are lacking: the young one has 3, the old one 13.
    source = full(sequence("old", 200), sequence("young", 40), sequence("other", 50), total_blocks=14)
    view = cluster(source, decode("d1"))
    decided = relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=0, preempted_first=("young", "other"))
    assert moves(decided) == [("old", "d1")]


def test_relief_does_not_wait_and_does_not_move_what_ends() -> None:
    config = dataclasses.replace(ROOMY, amortisation=2.0, cost=dataclasses.replace(ROOMY.cost, transfer_setup_s=1.0))
    ending, lasting = sequence("a", 150, 5), sequence("b", 150, 900)
    source = full(ending, lasting, total_blocks=15)
    load = dataclasses.replace(load_of(source), incoming_migrations=1)
    decided = relief_plan(cluster(source, decode("d1")), "d0", load, EMPTY, config, steps=3)
    assert moves(decided) == [("b", "d1")]
    assert reasons(decided) == {"a": SequenceSkip.NOT_AMORTISED}


def test_a_target_is_not_pressed_in_turn() -> None:
    source = full(sequence("a", 150), sequence("b", 150), total_blocks=15)
    tight = decode("d1", total_blocks=15)
    view = cluster(source, tight)
    # 150 and 100 more, over the horizon, are 16 blocks.
    assert reasons(relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=3)) == dict.fromkeys(
        "ab", SequenceSkip.NO_ROOM
    )
    enough = cluster(source, decode("d1", total_blocks=16))
    assert moves(relief_plan(enough, "d0", load_of(source), EMPTY, ROOMY, steps=3)) == [("a", "d1")]


evacuations = st.sampled_from(["drain", "relief"])


def decide(kind: str, view: ClusterView, load: InstanceLoad, memory: PlanMemory, seed: int) -> Plan:
    draw = random.Random(seed)
    config = draw.choice([ROOMY, LIMITED, dataclasses.replace(LIMITED, shortlist=1)])
    if kind == "drain":
        return drain_plan(view, "d0", load, memory, config)
    names = [known.request_id for known in load.sequences]
    draw.shuffle(names)
    return relief_plan(view, "d0", load, memory, config, steps=draw.choice([0, 5, 40]), preempted_first=names)


@given(evacuations, seeds, seeds)
def test_moves_are_sound(kind: str, seed: int, choices: int) -> None:
    view = any_cluster(seed)
    if "d0" not in by_id(view) or by_id(view)["d0"].load is None:
        return
    load = load_of(by_id(view)["d0"])
    decided = decide(kind, view, load, EMPTY, choices)
    assert decided == decide(kind, view, load, EMPTY, choices)
    assert len({move.request_id for move in decided.migrations}) == len(decided.migrations)
    fates = {move.request_id for move in decided.migrations} | reasons(decided).keys()
    assert len(fates) == len(decided.migrations) + len(reasons(decided))
    assert fates <= running(by_id(view)["d0"]).keys()
    if kind == "drain":
        assert fates == running(by_id(view)["d0"]).keys()
    for target, count in Counter(move.target for move in decided.migrations).items():
        there = by_id(view)[target]
        assert there.info.state is InstanceState.READY and target != "d0"
        assert there.info.layout == by_id(view)["d0"].info.layout
        assert count + load_of(there).incoming_migrations <= ROOMY.max_in_flight_per_target
        known = running(by_id(view)["d0"])
        arriving = [known[move.request_id] for move in decided.migrations if move.target == target]
        for step in range(ROOMY.horizon_steps + 1):
            still = [s for s in (*load_of(there).sequences, *arriving) if step <= upper_of(s, ROOMY)]
            assert sum(blocks_at(s, step) for s in still) <= blocks_for_sequences(there)
    for move in decided.migrations:
        assert move.source == "d0" and move.gain_tokens > 0
        assert move.reason is (MigrationReason.DRAIN if kind == "drain" else MigrationReason.MEMORY)


@given(seeds)
@settings(max_examples=40)
def test_a_drain_ends_where_there_is_room(seed: int) -> None:
    view = any_cluster(seed, plain=True)
    if len(view.instances) < 2:
        return
    others = tuple(decode(f"e{number}", total_blocks=2000) for number in range(2))
    memory, view = EMPTY, ClusterView(NOW_S, (view.instances[0], *others))
    decoding = {name for name, known in running(view.instances[0]).items() if known.resident_tokens > 0}
    for _ in range(len(decoding)):
        decided = drain_plan(view, "d0", load_of(view.instances[0]), memory, LIMITED)
        view, memory = applied(view, decided), decided.memory
        for move in decided.migrations:
            memory = memory.succeeded(move.request_id, duration_s=0.1, now_s=NOW_S, config=LIMITED)
    assert not decoding & running(view.instances[0]).keys()


@given(st.lists(st.integers(2, 300), min_size=1, max_size=6), st.integers(0, 60), seeds)
def test_as_few_as_possible_go(tokens: list[int], total_blocks: int, seed: int) -> None:
    held = [sequence(f"s{number}", size) for number, size in enumerate(tokens)]
    source = full(*held, total_blocks=total_blocks)
    order = [known.request_id for known in held]
    random.Random(seed).shuffle(order)
    view = cluster(source, decode("d1", total_blocks=5000))
    decided = relief_plan(view, "d0", load_of(source), EMPTY, ROOMY, steps=0, preempted_first=order)

    def fits(gone: tuple[SequenceLoad, ...]) -> bool:
        return sum(blocks_at(known, 0) for known in held if known not in gone) <= total_blocks

    fewest = next(count for count in range(len(held) + 1) if any(fits(gone) for gone in combinations(held, count)))
    moved = tuple(known for known in held if known.request_id in {move.request_id for move in decided.migrations})
    assert len(moved) == fewest and fits(moved)
    if fewest == 1:
        enough = [known.request_id for known in held if fits((known,))]
        assert moved[0].request_id == min(enough, key=order.index)
    assert all(limit_of(known) > 0 for known in moved)

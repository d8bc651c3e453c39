"""What holds of every rescheduling policy on any cluster."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from statistics import pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.policy.rescheduling import POLICIES, Plan, PlanMemory, ReschedulingConfig, plan
from starmesh.types import ClusterView, InstanceState, MigrationReason, SequenceLoad

from .decoding import (
    CONFIG,
    any_memory,
    applied,
    blocks_at,
    blocks_for_sequences,
    by_id,
    clusters,
    configs,
    limit_of,
    plain_clusters,
    policies,
    running,
    seeds,
    upper_of,
)
from .readable import ReadableRound, usable
from .views import NOW_S

pytestmark = pytest.mark.fast

EMPTY = PlanMemory()


situations = st.builds(
    lambda view, seed, some: (view, any_memory(view, seed) if some else EMPTY), clusters, seeds, st.booleans()
)
"""A view and what is remembered at it."""


def arriving(view: ClusterView, decided: Plan) -> dict[str, list[SequenceLoad]]:
    """By target what is on its way there, of this round and of those before, as its source reports it."""
    found: dict[str, list[SequenceLoad]] = {}
    for move in (entry.migration for entry in decided.memory.in_flight):
        for reporter in by_id(view).values():
            known = running(reporter).get(move.request_id) if reporter.load is not None else None
            if known is not None and known.epoch == move.epoch and reporter.info.instance_id != move.target:
                found.setdefault(move.target, []).append(known)
    return found


@given(situations, configs)
def test_targets_hold_what_they_get_over_the_horizon(
    situation: tuple[ClusterView, PlanMemory], config: ReschedulingConfig
) -> None:
    view, memory = situation
    decided = plan(view, memory, config)
    believe = POLICIES[config.policy].foresight.value != "now"
    for target in {move.target for move in decided.migrations}:
        there = by_id(view)[target]
        everything = [*running(there).values(), *arriving(view, decided)[target]]
        horizons = config.memory_horizons if config.policy == "star_plus" else 1
        for step in range(config.horizon_steps * horizons + 1):
            still = [known for known in everything if step <= upper_of(known, config, believe=believe)]
            assert sum(blocks_at(known, step) for known in still) <= blocks_for_sequences(there)


@given(clusters, configs, seeds)
def test_wrong_estimates_cost_no_more_than_what_outlives_them(
    view: ClusterView, config: ReschedulingConfig, seed: int
) -> None:
    """Whatever the true lengths are: a target lacks at most what those hold that run beyond their upper estimates."""
    draw = random.Random(seed)
    decided = plan(view, EMPTY, config)
    believe = POLICIES[config.policy].foresight.value != "now"
    for target in {move.target for move in decided.migrations}:
        there = by_id(view)[target]
        everything = [*running(there).values(), *arriving(view, decided)[target]]
        true = {known.request_id: draw.randint(0, limit_of(known)) for known in everything}
        horizons = config.memory_horizons if config.policy == "star_plus" else 1
        for step in range(config.horizon_steps * horizons + 1):
            still = [known for known in everything if step <= true[known.request_id]]
            wrong = [known for known in still if step > upper_of(known, config, believe=believe)]
            lacking = sum(blocks_at(known, step) for known in still) - blocks_for_sequences(there)
            assert lacking <= sum(blocks_at(known, step) for known in wrong)


@given(situations, configs)
def test_moves_are_sound(situation: tuple[ClusterView, PlanMemory], config: ReschedulingConfig) -> None:
    view, memory = situation
    found = by_id(view)
    decided = plan(view, memory, config)
    for move in decided.migrations:
        source, target = found[move.source], found[move.target]
        known = running(source)[move.request_id]
        assert move.gain_tokens > 0
        assert move.source != move.target
        assert move.epoch == known.epoch
        assert known.resident_tokens == known.prompt_tokens + known.output_tokens - 1
        assert source.info.layout == target.info.layout
        assert target.info.state is InstanceState.READY and source.info.state is not InstanceState.DRAINED
        assert source.reported_at_s == target.reported_at_s == NOW_S
        assert target.load is not None and target.load.waiting_sequences == 0
        assert (move.reason is MigrationReason.DRAIN) == (source.info.state is InstanceState.DRAINING)
    moved = Counter(move.request_id for move in decided.migrations)
    assert max(moved.values(), default=0) <= 1


@given(situations, configs)
def test_no_instance_sends_and_receives(situation: tuple[ClusterView, PlanMemory], config: ReschedulingConfig) -> None:
    """Within a round none does, so nothing goes from A to B and from B to A; nor against what is still under way, but
    for drains."""
    decided = plan(*situation, config)
    assert not {move.source for move in decided.migrations} & {move.target for move in decided.migrations}
    levels = [move for move in decided.migrations if move.reason is not MigrationReason.DRAIN]
    under_way = {(entry.migration.target, entry.migration.source) for entry in decided.memory.in_flight}
    assert not {(move.source, move.target) for move in levels} & under_way


@given(clusters, configs)
def test_budget(view: ClusterView, config: ReschedulingConfig) -> None:
    decided = plan(view, EMPTY, config)
    sources = Counter(move.source for move in decided.migrations)
    targets = Counter(move.target for move in decided.migrations)
    assert len(decided.migrations) <= config.max_in_flight
    assert max(sources.values(), default=0) <= config.max_in_flight_per_source
    assert max(targets.values(), default=0) <= config.max_in_flight_per_target
    for name, count in targets.items():
        found = by_id(view)[name]
        assert found.load is not None
        places = found.info.max_sequences or 1000
        assert len(found.load.sequences) + len(found.reservations) + count <= places
    # What is in flight counts: the next round has only the rest.
    again = plan(view, decided.memory, config)
    assert len(again.memory.in_flight) <= config.max_in_flight
    both = Counter(entry.migration.source for entry in again.memory.in_flight)
    assert max(both.values(), default=0) <= config.max_in_flight_per_source
    assert not {m.request_id for m in again.migrations} & {m.request_id for m in decided.migrations}


@given(clusters, configs, st.integers(0, 1000))
def test_order_does_not_matter(view: ClusterView, config: ReschedulingConfig, seed: int) -> None:
    shuffle = random.Random(seed).shuffle
    shuffled = []
    for found in view.instances:
        if found.load is not None:
            known = list(found.load.sequences)
            shuffle(known)
            found = dataclasses.replace(found, load=dataclasses.replace(found.load, sequences=tuple(known)))
        shuffled.append(found)
    shuffle(shuffled)
    first = plan(view, EMPTY, config)
    assert plan(ClusterView(view.now_s, tuple(shuffled)), EMPTY, config) == first
    assert plan(view, first.memory, config) == plan(ClusterView(view.now_s, tuple(shuffled)), first.memory, config)


@given(clusters, configs)
def test_plan_is_pure(view: ClusterView, config: ReschedulingConfig) -> None:
    inputs = copy.deepcopy((view, EMPTY, config))
    first = plan(view, EMPTY, config)
    assert (view, EMPTY, config) == inputs
    assert plan(*copy.deepcopy(inputs)) == first
    later = dataclasses.replace(view, now_s=view.now_s + 1)
    plan(later, first.memory, config)
    assert plan(view, EMPTY, config) == first


@given(clusters, configs)
def test_everything_has_one_fate(view: ClusterView, config: ReschedulingConfig) -> None:
    """A sequence moves or has at most one reason to stay; an instance is considered or has one reason not to be."""
    decided = plan(view, EMPTY, config)
    stays = [name for skip in decided.skipped for name in skip.request_ids]
    moves = [move.request_id for move in decided.migrations]
    assert len(set(stays + moves)) == len(stays + moves)
    out = [skip.instance_id for skip in decided.skipped_instances]
    assert out == sorted(set(out))
    used = {move.source for move in decided.migrations} | {move.target for move in decided.migrations}
    assert not used & set(out)
    for skip in decided.skipped:
        assert skip.request_ids <= running(by_id(view)[skip.instance_id]).keys()


@given(plain_clusters, configs)
def test_spread_shrinks(view: ClusterView, config: ReschedulingConfig) -> None:
    decided = plan(view, EMPTY, config)
    levels = {MigrationReason.LOAD, MigrationReason.PREDICTED_LOAD}
    if config.policy != "llumnix" and {move.reason for move in decided.migrations} <= levels:
        gained = sum(move.gain_tokens for move in decided.migrations)
        shrunk = decided.spread_before_tokens - decided.spread_after_tokens
        assert shrunk == pytest.approx(gained, abs=1e-6)


def settle(view: ClusterView, config: ReschedulingConfig) -> tuple[ClusterView, Plan]:
    """Plan and apply until nothing moves."""
    memory = EMPTY
    for _ in range(60):
        decided = plan(view, memory, config)
        if not decided.migrations:
            return view, decided
        view, memory = applied(view, decided), decided.memory
    raise AssertionError("never settles")


@settings(max_examples=50)
@given(plain_clusters, policies)
def test_rounds_settle_and_stay(view: ClusterView, policy: str) -> None:
    config = dataclasses.replace(CONFIG, policy=policy)
    settled, decided = settle(view, config)
    assert plan(settled, decided.memory, config).migrations == ()
    # Also when everything has cooled down, the spread only shrinks and comes to rest.
    assert settle(settled, config)[1].spread_after_tokens <= decided.spread_after_tokens + 1e-9 or policy == "llumnix"


@settings(max_examples=60)
@given(plain_clusters, st.sampled_from(["star_plus", "star", "current_load"]))
def test_a_plan_without_limits_is_stable(view: ClusterView, policy: str) -> None:
    """Where no limit has ended a round, there is nothing left to do: with its moves under way, and with them done."""
    config = dataclasses.replace(CONFIG, policy=policy, star_moves_per_round=1000)
    decided = plan(view, EMPTY, config)
    assert plan(view, decided.memory, config).migrations == ()
    assert plan(applied(view, decided), decided.memory, config).migrations == ()
    memory = decided.memory
    for move in decided.migrations:
        memory = memory.succeeded(move.request_id, duration_s=0.1, now_s=NOW_S, config=config)
    assert plan(applied(view, decided), memory, config).migrations == ()


def estimating(view: ClusterView, now_s: float, estimate: Callable[[SequenceLoad], SequenceLoad]) -> ClusterView:
    """The view at another time and with other estimates."""
    found = []
    for one in view.instances:
        load = one.load
        if load is not None:
            load = dataclasses.replace(load, sequences=tuple(map(estimate, load.sequences)))
        found.append(dataclasses.replace(one, load=load, reported_at_s=now_s))
    return ClusterView(now_s, tuple(found))


@settings(max_examples=60)
@given(plain_clusters, configs, st.booleans())
def test_without_believed_estimates_the_current_load_decides(
    view: ClusterView, config: ReschedulingConfig, aged: bool
) -> None:
    def doubtful(known: SequenceLoad) -> SequenceLoad:
        if aged:
            return dataclasses.replace(known, prediction_age_tokens=config.max_prediction_age_tokens + 1)
        return dataclasses.replace(known, remaining_tokens=None, remaining_tokens_upper=None)

    unknown = estimating(view, NOW_S, doubtful)
    star, current = (
        plan(unknown, EMPTY, dataclasses.replace(config, policy=policy)) for policy in ("star", "current_load")
    )
    assert [dataclasses.replace(move, gain_tokens=0.0) for move in star.migrations] == [
        dataclasses.replace(move, gain_tokens=0.0) for move in current.migrations
    ]
    assert star.skipped == current.skipped
    # The cost model of these tests weighs sequences by their tokens alone, so that star_plus levels the same.
    decided = plan(unknown, EMPTY, dataclasses.replace(config, policy="star_plus"))
    if {move.reason for move in decided.migrations} <= {MigrationReason.LOAD}:
        assert spread(applied(unknown, decided)) <= spread(unknown) * (1 + 1e-12)


def spread(view: ClusterView) -> float:
    """Of the tokens held now."""
    held = [sum(s.prompt_tokens + s.output_tokens for s in running(found).values()) for found in view.instances]
    return pstdev(held) if held else 0.0


@settings(max_examples=30)
@given(plain_clusters, policies, seeds)
def test_no_estimates_make_sequences_go_round(view: ClusterView, policy: str, seed: int) -> None:
    """With estimates drawn anew each second a sequence moves once in a cool-down at most, and no instance turns from
    sending to receiving before it has settled."""
    config = dataclasses.replace(CONFIG, policy=policy, cool_down_s=4.0, settle_s=2.0)
    draw = random.Random(seed)

    def anything(known: SequenceLoad) -> SequenceLoad:
        guess = draw.choice([None, 0, 1, 10, 1000])
        upper = None if guess is None else guess + draw.choice([0, 50])
        return dataclasses.replace(
            known, remaining_tokens=guess, remaining_tokens_upper=upper, prediction_age_tokens=draw.choice([0, 500])
        )

    memory = EMPTY
    last: dict[tuple[str, str], float] = {}
    for second in range(9):
        now_s = NOW_S + second
        view = estimating(view, now_s, anything)
        decided = plan(view, memory, config)
        view, memory = applied(view, decided), decided.memory
        for move in decided.migrations:
            memory = memory.succeeded(move.request_id, duration_s=0.1, now_s=now_s, config=config)
            assert now_s - last.get(("moves", move.request_id), 0.0) >= config.cool_down_s
            for key in (("receives", move.source), ("sends", move.target)):
                assert now_s - last.get(key, 0.0) >= config.settle_s
            last["moves", move.request_id] = now_s
        for move in decided.migrations:
            last["sends", move.source] = last["receives", move.target] = now_s


@given(clusters, configs)
def test_whatever_might_have_moved_says_why_it_stays(view: ClusterView, config: ReschedulingConfig) -> None:
    """Each sequence of an overloaded or draining instance has moved, or has a reason."""
    decided = plan(view, EMPTY, config)
    reasons = {name for skip in decided.skipped for name in skip.request_ids}
    fates = reasons | {move.request_id for move in decided.migrations}
    if config.policy == "none":
        assert decided.migrations == () and decided.skipped == ()
        return
    groups, _ = usable(view, config)
    for group in groups:
        draining = [found for found in group if found.info.state is InstanceState.DRAINING]
        assert {name for found in draining for name in running(found)} <= fates
        # Others than for balance have changed the loads by which instances are overloaded.
        here = {found.info.instance_id for found in group}
        others = {MigrationReason.DRAIN, MigrationReason.MEMORY}
        if config.policy == "llumnix" or any(m.source in here and m.reason in others for m in decided.migrations):
            continue
        before = ReadableRound(group, EMPTY, config, view.now_s)
        for host in before.hosts:
            limits = [(1 + config.overload_margin) * mean for mean in before.means()]
            if host.ready and any(load > limit for load, limit in zip(host.loads, limits, strict=True)):
                assert {known.request_id for known in host.sequences} <= fates


@given(clusters, configs)
def test_cool_downs_are_honoured(view: ClusterView, config: ReschedulingConfig) -> None:
    decided = plan(view, EMPTY, config)
    memory = decided.memory
    for number, move in enumerate(decided.migrations):
        if number % 2:
            memory = memory.failed(move.request_id, now_s=NOW_S, config=config)
        else:
            memory = memory.succeeded(move.request_id, duration_s=0.1, now_s=NOW_S, config=config)
    assert memory.in_flight == ()
    resting = {cool.request_id for cool in memory.cool_downs}
    assert resting == {move.request_id for move in decided.migrations}
    again = plan(view, memory, config)
    drained = {m.request_id for m in again.migrations if m.reason is MigrationReason.DRAIN}
    failed = {cool.request_id for cool in memory.cool_downs if cool.failures}
    assert not (resting - drained) & {move.request_id for move in again.migrations}
    assert not drained & failed

"""What holds of every rescheduling policy on any cluster."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.rescheduling import POLICIES, Plan, PlanMemory, ReschedulingConfig, plan
from starmesh.types import ClusterView, InstanceState, InstanceView, MigrationReason, SequenceLoad

from .decoding import CONFIG, applied, clusters, configs, plain_clusters, policies
from .views import NOW_S

pytestmark = pytest.mark.fast

EMPTY = PlanMemory()


def by_id(view: ClusterView) -> dict[str, InstanceView]:
    return {found.info.instance_id: found for found in view.instances}


def loads(found: InstanceView) -> dict[str, SequenceLoad]:
    assert found.load is not None
    return {known.request_id: known for known in found.load.sequences}


def most_blocks(known: SequenceLoad, config: ReschedulingConfig, step: int) -> int:
    """Blocks that a sequence may hold at a step: by its upper quantile if that is believed, or by its limit."""
    limit = known.max_output_tokens - known.output_tokens
    upper = limit
    believed = known.remaining_tokens and (known.prediction_age_tokens or 0) <= config.max_prediction_age_tokens
    if believed and known.remaining_tokens_upper and POLICIES[config.policy].foresight.value != "now":
        assert known.remaining_tokens is not None
        upper = min(limit, max(known.remaining_tokens_upper, known.remaining_tokens))
    return -(-(known.prompt_tokens + known.output_tokens + step) // 16) if step <= upper else 0


@given(clusters, configs)
def test_targets_hold_what_they_get_over_the_horizon(view: ClusterView, config: ReschedulingConfig) -> None:
    found = by_id(view)
    decided = plan(view, EMPTY, config)
    for target in {move.target for move in decided.migrations}:
        load = found[target].load
        assert load is not None
        arriving = [loads(found[m.source])[m.request_id] for m in decided.migrations if m.target == target]
        room = load.total_blocks * 16 - found[target].reserved_tokens
        for step in range(config.horizon_steps + 1):
            assert sum(most_blocks(s, config, step) for s in [*load.sequences, *arriving]) * 16 <= room


@given(clusters, configs)
def test_moves_are_sound(view: ClusterView, config: ReschedulingConfig) -> None:
    found = by_id(view)
    decided = plan(view, EMPTY, config)
    pairs = {(move.source, move.target) for move in decided.migrations}
    for move in decided.migrations:
        source, target = found[move.source], found[move.target]
        known = loads(source)[move.request_id]
        assert move.gain_tokens > 0
        assert move.source != move.target
        assert move.epoch == known.epoch
        assert known.resident_tokens == known.prompt_tokens + known.output_tokens - 1
        assert source.info.layout == target.info.layout
        assert target.info.state is InstanceState.READY and source.info.state is not InstanceState.DRAINED
        assert source.reported_at_s == target.reported_at_s == NOW_S
        assert target.load is not None and target.load.waiting_sequences == 0
        assert (move.reason is MigrationReason.DRAIN) == (source.info.state is InstanceState.DRAINING)
        back = [m for m in decided.migrations if (m.source, m.target) == (move.target, move.source)]
        if (move.target, move.source) in pairs:
            # Only the halves of one swap.
            assert config.policy == "star_plus" and len(back) == 1
            assert back[0].gain_tokens == move.gain_tokens
    moved = Counter(move.request_id for move in decided.migrations)
    assert max(moved.values(), default=0) <= 1


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
        assert skip.request_ids <= loads(by_id(view)[skip.instance_id]).keys()


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


@given(plain_clusters, policies)
def test_rounds_settle_and_stay(view: ClusterView, policy: str) -> None:
    config = dataclasses.replace(CONFIG, policy=policy)
    settled, decided = settle(view, config)
    assert plan(settled, decided.memory, config).migrations == ()
    # Also when everything has cooled down, the spread only shrinks and comes to rest.
    assert settle(settled, config)[1].spread_after_tokens <= decided.spread_after_tokens + 1e-9 or policy == "llumnix"


@given(plain_clusters)
def test_a_plan_without_limits_is_stable(view: ClusterView) -> None:
    config = dataclasses.replace(CONFIG, policy="star_plus")
    decided = plan(view, EMPTY, config)
    assert plan(applied(view, decided), decided.memory, config).migrations == ()


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

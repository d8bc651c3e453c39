"""Dispatch: every reason by example, and what holds of every policy on any view."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.admission import AdmissionConfig, Need, Room
from starmesh.policy.dispatch import (
    POLICIES,
    Choice,
    DispatchConfig,
    DispatchMemory,
    DispatchRequest,
    NoPlacement,
    Skipped,
    SkipReason,
)
from starmesh.types import ClusterView, InstanceState, InstanceView, RemainingEstimate, Role

from .views import LAYOUT, NOW_S, OTHER_LAYOUT, cluster, clusters, instance, prefill

pytestmark = pytest.mark.fast

CONFIG = DispatchConfig(admission=AdmissionConfig(headroom_tokens=64, watermark=0.1), max_waiting_sequences=2)
REQUEST = DispatchRequest("r", Need(tokens=40, remaining_output_tokens=100))
EMPTY = DispatchMemory()

policies = st.sampled_from(sorted(POLICIES))
requests = st.builds(
    DispatchRequest,
    request_id=st.text("abcdefgh", min_size=1, max_size=8),
    need=st.builds(Need, tokens=st.integers(1, 400), remaining_output_tokens=st.integers(0, 300)),
    excluded=st.frozensets(st.sampled_from(["p0", "p1", "d0", "d1", "d2"])),
    estimate=st.none() | st.builds(RemainingEstimate, st.just(0), st.integers(0, 400), st.integers(0, 800)),
)


def decode_id(policy: str, *instances: InstanceView, memory: DispatchMemory = EMPTY, request_id: str = "r") -> str:
    request = dataclasses.replace(REQUEST, request_id=request_id)
    decision, _ = POLICIES[policy].choose(cluster(prefill(), *instances), request, memory, CONFIG)
    assert decision.decode is not None
    return decision.decode.instance_id


def test_registry_names() -> None:
    assert sorted(POLICIES) == [
        "held_peak",
        "least_requests",
        "least_tokens",
        "power_of_two",
        "predicted_load",
        "predicted_peak",
        "round_robin",
    ]
    assert all(name == policy.name for name, policy in POLICIES.items())


def test_choice_says_what_to_reserve() -> None:
    view = cluster(prefill(), instance("d0"))
    decision, memory = POLICIES["least_tokens"].choose(view, REQUEST, EMPTY, CONFIG)
    # 40 tokens so far in whole blocks; with the next token and 64 of headroom 105, in whole blocks 112.
    assert decision.prefill == Choice("prefill-0", 48, 1600)
    assert decision.decode == Choice("d0", 112, 1600)
    assert (decision.reason, decision.skipped) == (None, ())
    assert memory == DispatchMemory(last_decode_id="d0")


@pytest.mark.parametrize(
    ("unusable", "reason", "outcome"),
    [
        (instance("d0", state=InstanceState.DRAINING), SkipReason.NOT_READY, NoPlacement.ALL_DRAINING),
        (instance("d0", state=InstanceState.DRAINED), SkipReason.NOT_READY, NoPlacement.ALL_DRAINING),
        (instance("d0", reported_at_s=NOW_S - 6), SkipReason.STALE, NoPlacement.NO_INSTANCE),
        (instance("d0", layout=OTHER_LAYOUT), SkipReason.LAYOUT_MISMATCH, NoPlacement.NO_INSTANCE),
        (instance("d0", layout=None), SkipReason.LAYOUT_MISMATCH, NoPlacement.NO_INSTANCE),
        (instance("d0", total_blocks=2, free_blocks=2), SkipReason.TOO_LONG, NoPlacement.TOO_LONG),
        (instance("d0", max_sequence_tokens=40), SkipReason.TOO_LONG, NoPlacement.TOO_LONG),
        (instance("d0", waiting=2), SkipReason.QUEUE, NoPlacement.NO_CAPACITY),
        (instance("d0", running=8, max_sequences=8, reserved=(1, 1)), SkipReason.QUEUE, NoPlacement.NO_CAPACITY),
        (instance("d0", free_blocks=6, running=1), SkipReason.NO_BLOCKS, NoPlacement.NO_CAPACITY),
        (instance("d0", reserved=(1500,)), SkipReason.NO_BLOCKS, NoPlacement.NO_CAPACITY),
        (instance("d0", lacking_tokens=1500), SkipReason.NO_BLOCKS, NoPlacement.NO_CAPACITY),
        # 7 blocks would do, were it not for the watermark of 10.
        (instance("d0", free_blocks=16, running=1), SkipReason.NO_BLOCKS, NoPlacement.NO_CAPACITY),
        (instance("d0", reported_at_s=None, max_sequence_tokens=0), SkipReason.TOO_LONG, NoPlacement.TOO_LONG),
    ],
)
def test_reasons_against_a_decode_instance(unusable: InstanceView, reason: SkipReason, outcome: NoPlacement) -> None:
    for policy in POLICIES.values():
        decision, memory = policy.choose(cluster(prefill(), unusable), REQUEST, EMPTY, CONFIG)
        assert decision.skipped == (Skipped("d0", reason),)
        assert (decision.decode, decision.prefill, decision.reason) == (None, None, outcome)
        assert memory == EMPTY


@pytest.mark.parametrize(
    ("unusable", "reason", "outcome"),
    [
        (prefill("p0", state=InstanceState.DRAINING), SkipReason.NOT_READY, NoPlacement.ALL_DRAINING),
        (prefill("p0", reported_at_s=NOW_S - 6), SkipReason.STALE, NoPlacement.NO_INSTANCE),
        (prefill("p0", layout=None), SkipReason.LAYOUT_MISMATCH, NoPlacement.NO_INSTANCE),
        (prefill("p0", max_sequence_tokens=39), SkipReason.TOO_LONG, NoPlacement.TOO_LONG),
        (prefill("p0", waiting=2), SkipReason.QUEUE, NoPlacement.NO_CAPACITY),
        (prefill("p0", free_blocks=2), SkipReason.NO_BLOCKS, NoPlacement.NO_CAPACITY),
    ],
)
def test_reasons_against_a_prefill_instance(unusable: InstanceView, reason: SkipReason, outcome: NoPlacement) -> None:
    decision, memory = POLICIES["round_robin"].choose(cluster(instance("d0"), unusable), REQUEST, EMPTY, CONFIG)
    assert decision.skipped == (Skipped("p0", reason),)
    assert (decision.decode, decision.prefill, decision.reason) == (None, None, outcome)
    assert memory == EMPTY


def test_an_excluded_instance_has_no_say_in_why() -> None:
    request = dataclasses.replace(REQUEST, excluded=frozenset({"d0"}))
    decision, _ = POLICIES["round_robin"].choose(cluster(prefill(), instance("d0")), request, EMPTY, CONFIG)
    assert decision.skipped == (Skipped("d0", SkipReason.EXCLUDED),)
    assert decision.reason is NoPlacement.NO_INSTANCE
    draining = instance("d1", state=InstanceState.DRAINING)
    decision, _ = POLICIES["round_robin"].choose(cluster(prefill(), instance("d0"), draining), request, EMPTY, CONFIG)
    assert decision.reason is NoPlacement.ALL_DRAINING


@pytest.mark.parametrize("view", [cluster(), cluster(prefill()), cluster(instance("d0"))])
def test_no_instance(view: ClusterView) -> None:
    decision, _ = POLICIES["least_tokens"].choose(view, REQUEST, EMPTY, CONFIG)
    assert decision.reason is NoPlacement.NO_INSTANCE


def test_an_idle_instance_may_be_filled_past_the_watermark() -> None:
    whole = dataclasses.replace(REQUEST, need=Need(tokens=1590, remaining_output_tokens=9))
    decision, _ = POLICIES["least_tokens"].choose(cluster(prefill(), instance("d0")), whole, EMPTY, CONFIG)
    assert decision.decode == Choice("d0", 1600, 1600)


def test_prefill_goes_to_the_fewest_outstanding_prompt_tokens() -> None:
    view = cluster(
        prefill("p0", resident_tokens=100),
        prefill("p1", resident_tokens=20, reserved=(90,)),
        prefill("p2", resident_tokens=50, lacking_tokens=40),
        prefill("p3", resident_tokens=50, lacking_tokens=40),
        instance("d0"),
    )
    decision, _ = POLICIES["round_robin"].choose(view, REQUEST, EMPTY, CONFIG)
    assert decision.prefill is not None
    assert decision.prefill.instance_id == "p2"


def test_prefill_and_decode_share_a_layout() -> None:
    view = cluster(
        instance("d0", layout=OTHER_LAYOUT, resident_tokens=5),
        instance("d1", resident_tokens=9),
        prefill("p0"),
        prefill("p1", layout=OTHER_LAYOUT, resident_tokens=9),
    )
    decision, _ = POLICIES["least_tokens"].choose(view, REQUEST, EMPTY, CONFIG)
    assert decision.decode is not None and decision.decode.instance_id == "d0"
    assert decision.prefill is not None and decision.prefill.instance_id == "p1"
    assert decision.skipped == (Skipped("p0", SkipReason.LAYOUT_MISMATCH),)


def test_decode_alone_for_kv_that_is_ready() -> None:
    view = cluster(instance("d0", layout=OTHER_LAYOUT), instance("d1", resident_tokens=9))
    decision, memory = POLICIES["least_tokens"].choose_decode(view, REQUEST, EMPTY, CONFIG, layout=LAYOUT)
    assert decision.decode == Choice("d1", 112, 1600) and decision.prefill is None and decision.reason is None
    assert memory == DispatchMemory("d1")


def test_reservations_weigh_as_requests_and_tokens() -> None:
    busy = instance("d0", running=1, resident_tokens=10, reserved=(100, 100))
    quiet = instance("d1", running=2, resident_tokens=150)
    assert decode_id("least_requests", busy, quiet) == "d1"
    assert decode_id("least_tokens", busy, quiet) == "d1"
    assert decode_id("least_requests", instance("d0", running=1, reserved=(1,)), quiet) == "d0", "ties break by id"


def test_round_robin_goes_on_when_instances_come_and_go() -> None:
    at = DispatchMemory("d1")
    assert decode_id("round_robin", instance("d0"), instance("d1"), instance("d2"), memory=at) == "d2"
    assert decode_id("round_robin", instance("d0"), instance("d2"), memory=at) == "d2"
    assert decode_id("round_robin", instance("d0"), instance("d1"), memory=at) == "d0"


def test_power_of_two_is_stable_and_spreads() -> None:
    idle = [instance(f"d{i}") for i in range(5)]
    heavy = [dataclasses.replace(idle[0], reservations=instance("d0", reserved=(500,)).reservations), *idle[1:]]
    names = [f"request-{i}" for i in range(2000)]
    chosen = Counter(decode_id("power_of_two", *idle, request_id=name) for name in names)
    # Of two drawn from five equals the lower id wins: 4, 3, 2, 1 and 0 of ten pairs.
    assert [round(chosen[f"d{i}"] / len(names), 1) for i in range(5)] == [0.4, 0.3, 0.2, 0.1, 0.0]
    assert all(decode_id("power_of_two", *heavy, request_id=name) != "d0" for name in names[:200])
    assert decode_id("power_of_two", idle[3]) == "d3"


@given(clusters(), requests, policies, st.text("d0123", max_size=2))
def test_what_is_chosen_can_take_it(view: ClusterView, request: DispatchRequest, policy: str, last: str) -> None:
    decision, memory = POLICIES[policy].choose(view, request, DispatchMemory(last), CONFIG)
    by_id = {found.info.instance_id: found for found in view.instances}
    assert (decision.decode is None) == (decision.prefill is None) == (decision.reason is not None)
    chosen = [choice for choice in (decision.prefill, decision.decode) if choice is not None]
    for choice, role in zip(chosen, (Role.PREFILL, Role.DECODE), strict=False):
        found = by_id[choice.instance_id]
        assert found.info.role is role
        assert found.info.state is InstanceState.READY
        assert choice.instance_id not in request.excluded
        assert found.load is None or view.now_s - found.reported_at_s <= CONFIG.stale_after_s
        # What the ledger will demand.
        free = choice.limit_tokens
        if found.load is not None:
            free = min(free, found.load.free_blocks * 16)
        assert request.need.tokens <= choice.reserve_tokens <= free - found.reserved_tokens
    if chosen:
        assert by_id[chosen[0].instance_id].info.layout == by_id[chosen[1].instance_id].info.layout
    assert memory.last_decode_id == (decision.decode.instance_id if decision.decode else last)
    # Each instance has at most one reason, and none that was chosen has any.
    skipped = [skip.instance_id for skip in decision.skipped]
    assert len(set(skipped)) == len(skipped)
    assert not set(skipped) & {choice.instance_id for choice in chosen}


@given(clusters(), requests, policies, st.randoms(use_true_random=False))
def test_order_of_the_view_does_not_matter(view: ClusterView, request: DispatchRequest, policy: str, r: object) -> None:
    shuffled = list(view.instances)
    r.shuffle(shuffled)  # type: ignore[attr-defined]
    outcomes = [POLICIES[policy].choose(v, request, EMPTY, CONFIG) for v in (view, ClusterView(NOW_S, tuple(shuffled)))]
    assert outcomes[0] == outcomes[1]


@given(clusters(), requests)
def test_least_policies_pick_the_minimum(view: ClusterView, request: DispatchRequest) -> None:
    for policy in ("least_tokens", "least_requests"):
        decision, _ = POLICIES[policy].choose_decode(view, request, EMPTY, CONFIG, layout=LAYOUT)
        skipped = {skip.instance_id for skip in decision.skipped}
        usable = [v for v in view.of_role(Role.DECODE) if v.info.instance_id not in skipped]
        assert (decision.decode is None) == (not usable)
        if decision.decode is None:
            continue

        def weight(found: InstanceView, policy: str = policy) -> int:
            load = found.load
            if policy == "least_requests":
                return len(found.reservations) + (load.running_sequences + load.waiting_sequences if load else 0)
            lacking = sum(s.prompt_tokens for s in load.sequences) if load else 0
            return found.reserved_tokens + lacking + (load.resident_tokens if load else 0)

        chosen = next(v for v in usable if v.info.instance_id == decision.decode.instance_id)
        assert weight(chosen) == min(map(weight, usable))


@given(clusters(), requests, st.integers(1, 4))
def test_round_robin_visits_all_equally(view: ClusterView, request: DispatchRequest, rounds: int) -> None:
    memory = EMPTY
    visits: Counter[str] = Counter()
    usable = len(view.of_role(Role.DECODE))
    for _ in range(rounds * max(1, usable)):
        decision, memory = POLICIES["round_robin"].choose_decode(view, request, memory, CONFIG, layout=LAYOUT)
        if decision.decode is None:
            return
        visits[decision.decode.instance_id] += 1
    assert max(visits.values()) - min(visits.values()) <= 1
    assert len(visits) == usable - len(decision.skipped)


@given(clusters(), requests)
def test_room_holds_what_fits_an_idle_instance(view: ClusterView, request: DispatchRequest) -> None:
    """No request waits forever: what fits at all has room once the instance is idle."""
    for found in view.instances:
        load = found.load and dataclasses.replace(
            found.load, free_blocks=found.load.total_blocks, running_sequences=0, waiting_sequences=0, sequences=()
        )
        room = Room(dataclasses.replace(found, load=load, reservations=()), CONFIG.admission)
        assert room.has_room(request.need) or not room.fits(request.need)

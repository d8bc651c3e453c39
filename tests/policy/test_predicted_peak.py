"""Dispatch by predicted peak: by example, against the rule counted one step at a time, and that nobody starves."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starmesh.policy.admission import AdmissionConfig, Need, Room
from starmesh.policy.dispatch import (
    POLICIES,
    Decision,
    DispatchConfig,
    DispatchMemory,
    DispatchRequest,
    NoPlacement,
    SkipReason,
)
from starmesh.types import ClusterView, InstanceView, RemainingEstimate, SequenceLoad

from .decoding import any_cluster, decode, limit_of, sequence
from .views import LAYOUT, NOW_S, cluster, prefill

pytestmark = pytest.mark.fast

CONFIG = DispatchConfig(
    admission=AdmissionConfig(headroom_tokens=16, watermark=0.1),
    horizon_steps=40,
    min_horizon_steps=4,
    max_horizon_steps=60,
    max_waiting_sequences=4,
    hold_s=5.0,
)
EMPTY = DispatchMemory()
POLICY = POLICIES["held_peak"]

seeds = st.integers(0, 2**32)
counts = st.sampled_from([-1, 0, 1, 3, 10, 45, 500])
requests = st.builds(
    DispatchRequest,
    request_id=st.just("r"),
    need=st.builds(Need, tokens=st.integers(1, 400), remaining_output_tokens=st.sampled_from([0, 1, 20, 50, 900])),
    estimate=st.none() | st.builds(RemainingEstimate, st.just(1), counts, counts),
    placed_id=st.sampled_from(["", "d0", "d1", "d2", "d3"]),
    held_s=st.sampled_from([0.0, 4.9, 5.0]),
)
configs = st.builds(dataclasses.replace, st.just(CONFIG), peak_caution=st.sampled_from([0.0, 0.5, 1.0]))


def decide(
    *instances: InstanceView, remaining: int | None = None, tokens: int = 32, limit: int = 900, held_s: float = 0.0
) -> Decision:
    """Where a new request goes that is predicted to generate ``remaining`` tokens."""
    estimate = None if remaining is None else RemainingEstimate(0, remaining, remaining)
    request = DispatchRequest("r", Need(tokens, limit), estimate=estimate, held_s=held_s)
    return POLICY.choose(cluster(prefill(), *instances), request, EMPTY, CONFIG)[0]


def asked(*instances: InstanceView, **fields: object) -> str | None:
    decision = decide(*instances, **fields)  # type: ignore[arg-type]
    return None if decision.decode is None else decision.decode.instance_id


def full(instance_id: str, *, remaining: int | None, count: int = 8) -> InstanceView:
    """800 of 1,440 usable tokens."""
    ones = (sequence(f"{instance_id}{at}", 100, remaining, output_tokens=90) for at in range(count))
    return decode(instance_id, *ones)


def test_memory_at_the_peak_goes_before_load() -> None:
    # 8 sequences that grow to 190 outgrow 1,440; the 9 of d1 end at 130.
    assert asked(full("d0", remaining=90), full("d1", remaining=30, count=9), remaining=200) == "d1"
    # All that fit: the least loaded.
    assert asked(full("d0", remaining=20), full("d1", remaining=20, count=9), remaining=20) == "d0"


def test_the_peak_is_not_the_sum_of_all_ends() -> None:
    # Each would fit 1,440 at its own longest only if the others had ended, and they will have.
    staggered = decode("d0", *(sequence(f"s{at}", 60, 40 * at + 20) for at in range(9)))
    assert 9 * 60 + sum(40 * at + 20 for at in range(9)) > 1440
    assert asked(staggered, remaining=100) == "d0"


def test_a_request_is_held_while_no_memory_will_do_and_not_for_ever() -> None:
    both = full("d0", remaining=90), full("d1", remaining=95)
    decision = decide(*both, remaining=200)
    assert decision.decode is None and decision.prefill is None
    assert decision.reason is NoPlacement.NO_CAPACITY
    assert [(skip.instance_id, skip.reason) for skip in decision.skipped] == [
        ("d0", SkipReason.PEAK),
        ("d1", SkipReason.PEAK),
    ]
    assert asked(*both, remaining=200, held_s=4.9) is None
    # Then the one that lacks least; and at once, if nothing is to be held.
    assert asked(*both, remaining=200, held_s=5.0) == "d0"
    request = DispatchRequest("r", Need(32, 900), estimate=RemainingEstimate(0, 200, 200))
    unheld, _ = POLICIES["predicted_peak"].choose(cluster(prefill(), *both), request, EMPTY, CONFIG)
    assert unheld.decode is not None and unheld.decode.instance_id == "d0"


def test_what_is_prefilled_is_not_held() -> None:
    view = cluster(full("d0", remaining=90), full("d1", remaining=95))
    request = DispatchRequest("r", Need(32, 900), estimate=RemainingEstimate(1, 200, 200))
    decision, _ = POLICY.choose_decode(view, request, EMPTY, CONFIG, layout=LAYOUT)
    assert decision.decode is not None and decision.decode.instance_id == "d0"


def test_a_nearly_idle_instance_takes_what_may_outgrow_it() -> None:
    assert asked(decode("d0", max_sequences=8), remaining=1500, limit=1500) == "d0"
    assert asked(decode("d0", sequence("a", 300, 1200, 1200)), remaining=1200, tokens=32) == "d0"
    assert asked(decode("d0", sequence("a", 400, 1200, 1200)), remaining=1200, tokens=32) is None


def test_without_predictions_a_batch_is_half_way() -> None:
    # 90 generated, so 90 to come: as if predicted.
    assert asked(full("d0", remaining=None)) is None
    young = decode("d0", *(sequence(f"y{at}", 100, output_tokens=10) for at in range(8)))
    assert asked(young) == "d0"
    # Old predictions are none, and none bounds what a limit does.
    ending = decode("d0", *(sequence(f"e{at}", 100, output_tokens=90, max_output_tokens=100) for at in range(8)))
    assert asked(ending, limit=10) == "d0"


def test_reservations_are_taken_to_grow_like_the_others() -> None:
    one = decode("d0", *(sequence(f"s{at}", 100, 50, output_tokens=90) for at in range(7)))
    assert asked(one, remaining=50) == "d0"
    view = dataclasses.replace(one, reservations=decode("d0", reserved=(250,)).reservations)
    assert asked(view, remaining=50) is None


def test_an_estimate_may_change_the_place_that_it_has() -> None:
    early, late = full("d0", remaining=20, count=7), full("d1", remaining=60, count=7)
    view = cluster(early, late)
    for remaining, expected in ((10, "d1"), (300, "d0")):
        request = DispatchRequest("r", Need(32, 900), frozenset(), RemainingEstimate(1, remaining, remaining), "d1")
        decision, _ = POLICY.choose_decode(view, request, EMPTY, CONFIG, layout=LAYOUT)
        assert decision.decode is not None and decision.decode.instance_id == expected


def taken(known: SequenceLoad, config: DispatchConfig) -> int:
    """What a sequence is taken to generate still."""
    limit, median, upper = limit_of(known), known.remaining_tokens or 0, known.remaining_tokens_upper or 0
    fresh = known.remaining_tokens is not None and (known.prediction_age_tokens or 0) <= 200
    if fresh and median > 0:
        low = min(median, limit)
        high = min(max(upper, median), limit) if upper > 0 else limit
        return low + round(config.peak_caution * (high - low))
    return min(known.output_tokens, limit, upper if fresh and upper > 0 else limit)


def readable(view: ClusterView, request: DispatchRequest, config: DispatchConfig) -> str | None:
    """The rule, one number at a time, among those that have room."""
    roomy = [
        found
        for found in view.instances
        if found.load is not None
        and Room(found, config.admission).fits(request.need)
        and Room(found, config.admission).has_room(request.need)
    ]
    if not roomy:
        return None
    running = [known for found in roomy if found.load is not None for known in found.load.sequences]
    typical = sum(taken(known, config) for known in running) // len(running) if running else config.horizon_steps
    limit, estimate = request.need.remaining_output_tokens, request.estimate
    own = min(typical, limit)
    if estimate is not None and estimate.remaining_tokens > 0:
        low = min(estimate.remaining_tokens, limit)
        bound = estimate.remaining_tokens_upper
        high = min(max(bound, estimate.remaining_tokens), limit) if bound > 0 else limit
        own = low + round(config.peak_caution * (high - low))
    steps = min(max(own, config.min_horizon_steps), config.max_horizon_steps)
    rated = []
    for found in roomy:
        assert found.load is not None
        there = [(k.prompt_tokens + k.output_tokens, taken(k, config)) for k in found.load.sequences]
        there += [(each.tokens, typical) for each in found.reservations] + [(request.need.tokens + 1, own)]
        load = sum(sum(c + t for t in range(min(y, steps) + 1)) for c, y in there)
        ends = sorted({0, *(y for _, y in there)})
        needs = [sum(math.ceil((c + t) / 16) for c, y in there if t <= y) for t in ends]
        others = sum(math.ceil(k.resident_tokens / 16) for k in found.load.sequences)
        blocks = math.floor(found.load.total_blocks * (1 - config.admission.watermark))
        blocks -= max(found.load.total_blocks - found.load.free_blocks - others, 0)
        lacks = 0 if needs[0] * 4 <= blocks else max(0, max(needs) - blocks)
        rated.append((lacks, load, found.info.instance_id != request.placed_id, found.info.instance_id))
    lacks, *_, best = min(rated)
    return best if lacks == 0 or request.held_s >= config.hold_s else None


@given(seeds, requests, configs)
def test_arrays_choose_as_the_readable_form(seed: int, request: DispatchRequest, config: DispatchConfig) -> None:
    view = any_cluster(seed, plain=True)
    decision, memory = POLICY.choose(ClusterView(NOW_S, (*view.instances, prefill())), request, EMPTY, config)
    chosen = None if decision.decode is None else decision.decode.instance_id
    assert chosen == readable(view, request, config)
    again, _ = POLICY.choose(ClusterView(NOW_S, (*view.instances, prefill())), request, memory, config)
    assert again == decision


@given(seeds, requests)
@example(0, DispatchRequest("r", Need(1, 0)))
def test_who_has_room_somewhere_is_never_held_beyond_its_time(seed: int, request: DispatchRequest) -> None:
    view = any_cluster(seed)
    request = dataclasses.replace(request, held_s=CONFIG.hold_s)
    by_tokens, _ = POLICIES["least_tokens"].choose_decode(view, request, EMPTY, CONFIG, layout=LAYOUT)
    by_peak, _ = POLICY.choose_decode(view, request, EMPTY, CONFIG, layout=LAYOUT)
    assert (by_tokens.decode is None) == (by_peak.decode is None)

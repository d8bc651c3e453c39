"""Dispatch by predicted load: by example, against the rule counted one token at a time, and what it does without
predictions."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.admission import AdmissionConfig, Need
from starmesh.policy.dispatch import POLICIES, DispatchConfig, DispatchMemory, DispatchRequest
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import ClusterView, InstanceView, RemainingEstimate, SequenceLoad

from .decoding import any_cluster, decode, holding, sequence
from .readable import held, whole_blocks
from .views import LAYOUT, cluster

pytestmark = pytest.mark.fast

CONFIG = DispatchConfig(
    admission=AdmissionConfig(headroom_tokens=16, watermark=0.1),
    horizon_steps=40,
    min_horizon_steps=4,
    max_horizon_steps=60,
    max_waiting_sequences=4,
)
EMPTY = DispatchMemory()
POLICY = POLICIES["predicted_load"]

seeds = st.integers(0, 2**32)
counts = st.sampled_from([-1, 0, 1, 3, 10, 45, 500])
requests = st.builds(
    DispatchRequest,
    request_id=st.just("r"),
    need=st.builds(Need, tokens=st.integers(1, 400), remaining_output_tokens=st.sampled_from([0, 1, 20, 50, 900])),
    estimate=st.none() | st.builds(RemainingEstimate, st.just(1), counts, counts),
    placed_id=st.sampled_from(["", "d0", "d1", "d2", "d3"]),
)


def chosen(view: ClusterView, request: DispatchRequest, config: DispatchConfig = CONFIG) -> str | None:
    decision, _ = POLICY.choose_decode(view, request, EMPTY, config, layout=LAYOUT)
    return None if decision.decode is None else decision.decode.instance_id


def asked(
    *instances: InstanceView, remaining: int | None = None, upper: int = 0, tokens: int = 32, **fields: str
) -> str | None:
    estimate = None if remaining is None else RemainingEstimate(1, remaining, max(upper, remaining))
    request = DispatchRequest("r", Need(tokens, 900), estimate=estimate, **fields)  # type: ignore[arg-type]
    return chosen(cluster(*instances), request)


def test_a_long_request_goes_where_load_ends_and_a_short_one_where_it_is_low() -> None:
    ending = decode("d0", sequence("a", 200, 6), sequence("b", 100, 6))
    lasting = decode("d1", sequence("c", 150, 500, max_output_tokens=550))
    assert asked(ending, lasting, remaining=5) == "d1"
    assert asked(ending, lasting, remaining=50) == "d0"
    # Unknown is taken to stay for the default horizon; a prediction of no more tokens is none.
    assert asked(ending, lasting) == asked(ending, lasting, remaining=0) == "d0"


def test_memory_over_the_horizon_goes_before_load() -> None:
    # 1,440 tokens below the watermark. d0 is lighter now, but its sequences may fill it.
    growing = decode("d0", *(sequence(f"g{i}", 100, 20, 900) for i in range(9)))
    steady = decode("d1", *(sequence(f"s{i}", 100, 8, 9) for i in range(10)))
    assert asked(growing, steady, remaining=5) == "d0"
    assert asked(growing, steady, remaining=60) == "d1"
    # Where neither leaves room, the one that lacks least: 40 more tokens each of ten, or 60 of nine.
    both = [decode("d1", *(sequence(f"s{i}", 100, 20, 40) for i in range(10))), growing]
    assert asked(*both, remaining=60, upper=800) == "d1"


def test_reservations_count_as_staying() -> None:
    busy = decode("d0", sequence("a", 100, 2), reserved=(200,))
    idle = decode("d1", sequence("b", 250, 900, max_output_tokens=902))
    assert asked(busy, idle, remaining=50) == "d0"
    assert asked(decode("d0", sequence("a", 100, 2), reserved=(300,)), idle, remaining=50) == "d1"


def test_an_instance_without_a_report_counts_as_empty() -> None:
    fresh = dataclasses.replace(decode("d9", reported_at_s=None))
    fresh = dataclasses.replace(fresh, info=dataclasses.replace(fresh.info, max_sequence_tokens=800))
    assert asked(decode("d0", sequence("a", 100, 900)), fresh) == "d9"


def test_a_place_is_kept_unless_another_is_better() -> None:
    assert asked(decode("d0"), decode("d1"), decode("d2")) == "d0"
    assert asked(decode("d0"), decode("d1"), decode("d2"), placed_id="d1") == "d1"
    assert asked(decode("d0"), decode("d1", sequence("a", 2, 1)), placed_id="d1", remaining=30) == "d0"


def rated(found: InstanceView, request: DispatchRequest, config: DispatchConfig) -> tuple[int, int]:
    """What the instance may lack with the request, and its load over the horizon, as the module's docstring says."""
    load, limit, estimate = found.load, request.need.remaining_output_tokens, request.estimate
    assert load is not None
    steps, upper = config.horizon_steps, limit
    if estimate is not None and estimate.remaining_tokens > 0:
        median = min(estimate.remaining_tokens, limit)
        steps = max(config.min_horizon_steps, min(config.max_horizon_steps, median))
        if estimate.remaining_tokens_upper > 0:
            upper = min(max(estimate.remaining_tokens_upper, estimate.remaining_tokens), limit)
    steps = min(steps, limit)
    weight = (steps + 1) * found.reserved_tokens
    running: list[tuple[int, int]] = [(request.need.tokens, upper)]
    for known in load.sequences:
        tokens = known.prompt_tokens + known.output_tokens
        most = max(0, known.max_output_tokens - known.output_tokens)
        median_, bound = None, most
        if (known.remaining_tokens or 0) > 0 and (known.prediction_age_tokens or 0) <= config.max_prediction_age_tokens:
            assert known.remaining_tokens is not None and known.remaining_tokens_upper is not None
            median_ = min(known.remaining_tokens, most)
            if known.remaining_tokens_upper > 0:
                bound = min(max(known.remaining_tokens_upper, known.remaining_tokens), most)
        weight += sum(held(tokens, median_, step) for step in range(steps + 1))
        running.append((tokens, bound))
    own = sum(math.ceil(known.resident_tokens / LAYOUT.block_tokens) for known in load.sequences)
    blocks = math.floor(load.total_blocks * (1 - config.admission.watermark))
    blocks -= max(load.total_blocks - load.free_blocks - own, 0)
    capacity = blocks * LAYOUT.block_tokens - found.reserved_tokens
    parts = min(8, steps + 1)
    edges = [at * (steps + 1) // parts for at in range(parts + 1)]
    needed = [
        sum(whole_blocks(tokens + min(bound, end - 1), LAYOUT) for tokens, bound in running if first <= bound)
        for first, end in pairwise(edges)
    ]
    return max(0, max(needed) - capacity), weight


@given(seeds, requests, st.sampled_from([5, 200]))
def test_the_choice_is_the_least_by_the_rule(seed: int, request: DispatchRequest, max_age: int) -> None:
    view = any_cluster(seed)
    config = dataclasses.replace(CONFIG, max_prediction_age_tokens=max_age)
    decision, memory = POLICY.choose_decode(view, request, EMPTY, config, layout=LAYOUT)
    skipped = {skip.instance_id for skip in decision.skipped}
    usable = [found for found in view.instances if found.info.instance_id not in skipped]
    assert (decision.decode is None) == (not usable)
    if decision.decode is None:
        return
    by_rule = min(
        (*rated(found, request, config), found.info.instance_id != request.placed_id, found.info.instance_id)
        for found in usable
    )
    assert decision.decode.instance_id == memory.last_decode_id == by_rule[-1]


@given(st.lists(st.integers(0, 10), min_size=9, max_size=24), requests)
def test_the_choice_is_the_least_of_many(sizes: list[int], request: DispatchRequest) -> None:
    """More than are looked at first, most of them short of room."""
    found = [
        decode(f"d{i:02}", *(sequence(f"s{i}-{j}", 100 - j, 3 * j or None, 20 * j) for j in range(size)))
        for i, size in enumerate(sizes)
    ]
    usable = [one for one in found if chosen(cluster(one), request) is not None]
    if usable:
        names = [(*rated(one, request, CONFIG), one.info.instance_id) for one in usable]
        assert chosen(cluster(*found), dataclasses.replace(request, placed_id="")) == min(names)[-1]


def unpredicted(known: SequenceLoad) -> SequenceLoad:
    """Without an estimate, and all of it resident."""
    return dataclasses.replace(
        known,
        resident_tokens=known.prompt_tokens + known.output_tokens,
        remaining_tokens=None,
        remaining_tokens_upper=None,
        prediction_age_tokens=None,
    )


@given(seeds, requests)
def test_without_predictions_and_with_memory_enough_tokens_decide(seed: int, request: DispatchRequest) -> None:
    found = []
    for one in any_cluster(seed, plain=True).instances:
        assert one.load is not None
        roomy = dataclasses.replace(one, load=dataclasses.replace(one.load, total_blocks=2000))
        found.append(holding(roomy, tuple(map(unpredicted, one.load.sequences))))
    request = dataclasses.replace(request, placed_id="")
    least, _ = POLICIES["least_tokens"].choose_decode(cluster(*found), request, EMPTY, CONFIG, layout=LAYOUT)
    assert POLICY.choose_decode(cluster(*found), request, EMPTY, CONFIG, layout=LAYOUT)[0] == least


@given(seeds, requests)
def test_columns_decide_as_rows(seed: int, request: DispatchRequest) -> None:
    view = any_cluster(seed)
    in_columns = tuple(
        dataclasses.replace(
            found, load=dataclasses.replace(found.load, sequences=SequenceLoads.of(found.load.sequences))
        )
        if found.load is not None
        else found
        for found in view.instances
    )
    assert chosen(ClusterView(view.now_s, in_columns), request) == chosen(view, request)


def test_horizons_have_bounds() -> None:
    with pytest.raises(ValueError, match="horizon_steps"):
        DispatchConfig(horizon_steps=10, min_horizon_steps=20)

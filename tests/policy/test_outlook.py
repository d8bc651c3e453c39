"""Reports are read as a round of rescheduling reads them, and once: what is remembered of them changes no choice."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.admission import AdmissionConfig, Need
from starmesh.policy.dispatch import POLICIES, DispatchConfig, DispatchMemory, DispatchRequest
from starmesh.policy.dispatch.outlook import Reading, outlooks_of
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import measure
from starmesh.policy.rescheduling.sequences import Foresight
from starmesh.types import ClusterView, InstanceView, RemainingEstimate

from .decoding import any_cluster
from .views import LAYOUT, cluster, instance

pytestmark = pytest.mark.fast

CONFIG = DispatchConfig(
    admission=AdmissionConfig(headroom_tokens=16, watermark=0.1), min_horizon_steps=4, max_waiting_sequences=4
)

seeds = st.integers(0, 2**32)
requests = st.builds(
    DispatchRequest,
    request_id=st.just("r"),
    need=st.builds(Need, tokens=st.integers(1, 400), remaining_output_tokens=st.sampled_from([0, 1, 20, 900])),
    estimate=st.none() | st.builds(RemainingEstimate, st.just(1), st.integers(0, 100), st.integers(0, 200)),
)


@given(seeds, st.sampled_from([5, 200]))
def test_reports_are_read_as_rescheduling_reads_them(seed: int, max_age: int) -> None:
    found = tuple(one for one in any_cluster(seed).instances if one.load is not None and one.info.layout == LAYOUT)
    if not found:
        return
    outlooks = outlooks_of(found, {}, Reading(0.0, max_age, 0.1))
    read = [outlooks[one.info.instance_id] for one in found]
    measuring = ReschedulingConfig(watermark=0.1, max_prediction_age_tokens=max_age)
    group = measure(found, measuring, Foresight.MEAN)
    assert [len(one.tokens) for one in read] == np.diff(group.sequences.first_row).tolist()
    for ours, theirs in (
        ([one.tokens for one in read], group.sequences.tokens),
        ([one.believed for one in read], group.sequences.remaining),
        ([one.upper for one in read], group.sequences.upper),
    ):
        assert np.concatenate(ours).tolist() == theirs.tolist()
    assert [one.blocks * LAYOUT.block_tokens for one in read] == (group.capacity + group.reserved).tolist()


@given(seeds, requests, st.sampled_from(sorted(POLICIES)))
def test_what_is_remembered_changes_no_choice(seed: int, request: DispatchRequest, policy: str) -> None:
    draw = random.Random(seed)
    before, after = any_cluster(seed).instances, any_cluster(seed + 1).instances
    later = {one.info.instance_id: one for one in after if draw.random() < 0.5}
    mixed = cluster(*(later.get(one.info.instance_id, one) for one in before))
    memory = DispatchMemory()
    for view in (ClusterView(mixed.now_s, before), mixed):
        fresh = DispatchMemory(memory.last_decode_id)
        decision, memory_after = POLICIES[policy].choose_decode(view, request, memory, CONFIG, layout=LAYOUT)
        assert (decision, memory_after) == POLICIES[policy].choose_decode(view, request, fresh, CONFIG, layout=LAYOUT)
        memory = memory_after


def test_a_report_is_read_once() -> None:
    reading = Reading(0.0, 200, 0.1)
    found: list[InstanceView] = [instance("d0", lacking_tokens=3), instance("d1", reported_at_s=None)]
    first = outlooks_of(found, {}, reading)
    again = outlooks_of([dataclasses.replace(found[0], reservations=()), found[1]], first, reading)
    assert again["d0"] is first["d0"]
    # An instance without a report has room for one sequence of the longest kind.
    assert (first["d1"].blocks, len(first["d1"].tokens)) == (90, 0)
    assert outlooks_of(found, first, Reading(0.5, 200, 0.1))["d0"] is not first["d0"]

"""The search for candidates, one pass over all numbers, against admission's rule asked one question at a time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.admission import AdmissionConfig, Need, Room, lacking_tokens
from starmesh.policy.dispatch import DispatchConfig, DispatchRequest, Skipped, SkipReason
from starmesh.policy.dispatch.candidates import Candidate, find_candidates
from starmesh.types import ClusterView, InstanceState, InstanceView, KvLayout, Role

from .views import LAYOUT, OTHER_LAYOUT, clusters

pytestmark = pytest.mark.fast

Layouts = set[KvLayout | None] | None

configs = st.builds(
    DispatchConfig,
    admission=st.builds(
        AdmissionConfig,
        headroom_tokens=st.sampled_from([0, 1, 64, 256]),
        watermark=st.sampled_from([0.0, 0.1, 0.5]),
        admit_all=st.booleans(),
    ),
    stale_after_s=st.sampled_from([0.5, 5.0]),
    max_waiting_sequences=st.integers(0, 4),
)
outputs = st.integers(0, 300)
requests = st.builds(
    DispatchRequest,
    request_id=st.just("r"),
    need=st.builds(
        Need, tokens=st.integers(1, 400) | st.integers(1, 2000), remaining_output_tokens=st.integers(0, 300)
    ),
    excluded=st.frozensets(st.sampled_from(["p0", "p1", "d0", "d1", "d2"]), max_size=2),
)


def by_the_rule(
    view: ClusterView, role: Role, request: DispatchRequest, config: DispatchConfig, layouts: Layouts
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    """What ``find_candidates`` is to find."""
    ordered = sorted(view.of_role(role), key=lambda one: one.info.instance_id)
    reasons = [(one, reason_against(one, view.now_s, request, config, layouts)) for one in ordered]
    candidates = tuple(candidate(one) for one, reason in reasons if reason is None)
    return candidates, tuple(Skipped(one.info.instance_id, reason) for one, reason in reasons if reason is not None)


def reason_against(
    one: InstanceView, now_s: float, request: DispatchRequest, config: DispatchConfig, layouts: Layouts
) -> SkipReason | None:
    info, room = one.info, Room(one, config.admission)
    if info.instance_id in request.excluded:
        return SkipReason.EXCLUDED
    if info.state is not InstanceState.READY:
        return SkipReason.NOT_READY
    if one.load is not None and now_s - one.reported_at_s > config.stale_after_s:
        return SkipReason.STALE
    if info.layout is None or (layouts is not None and info.layout not in layouts):
        return SkipReason.LAYOUT_MISMATCH
    if not room.fits(request.need):
        return SkipReason.TOO_LONG
    admit_all = config.admission.admit_all and info.role is not Role.PREFILL
    if waiting(one) >= config.max_waiting_sequences and not admit_all:
        return SkipReason.QUEUE
    return None if room.has_room(request.need) else SkipReason.NO_BLOCKS


def waiting(one: InstanceView) -> int:
    """Requests that wait there, or will: those beyond what it runs at once."""
    reported = 0 if one.load is None else one.load.waiting_sequences
    most = one.info.max_sequences
    return max(reported, candidate(one).requests - most) if most else reported


def candidate(one: InstanceView) -> Candidate:
    running = resident = 0
    if one.load is not None:
        running = one.load.running_sequences + one.load.waiting_sequences
        resident = one.load.resident_tokens
    return Candidate(
        instance=one,
        tokens=resident + lacking_tokens(one) + one.reserved_tokens,
        requests=running + len(one.reservations),
        reserved_tokens=one.reserved_tokens,
    )


@given(
    view=clusters(),
    role=st.sampled_from([Role.PREFILL, Role.DECODE, Role.DECODE]),
    request=requests,
    config=configs,
    layouts=st.none() | st.sets(st.sampled_from([LAYOUT, OTHER_LAYOUT])),
    order=st.randoms(use_true_random=False),
)
def test_the_candidates_are_those_by_the_rule(
    view: ClusterView,
    role: Role,
    request: DispatchRequest,
    config: DispatchConfig,
    layouts: Layouts,
    order: random.Random,
) -> None:
    shuffled = ClusterView(view.now_s, tuple(order.sample(view.instances, len(view.instances))))
    for seen in (view, shuffled):
        found = find_candidates(seen, role, request, config, layouts=layouts)
        assert found == by_the_rule(seen, role, request, config, layouts)

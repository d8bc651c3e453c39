"""Cluster views to decide on: by hand, and drawn at random."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    KvLayout,
    Reservation,
    Role,
    SequenceLoad,
)

NOW_S = 1000.0
LAYOUT = KvLayout(model_revision="r", dtype="float32", layers=2, kv_heads=1, head_dim=8, block_tokens=16)
OTHER_LAYOUT = dataclasses.replace(LAYOUT, model_revision="other")


def instance(
    instance_id: str,
    *,
    role: Role = Role.DECODE,
    state: InstanceState = InstanceState.READY,
    layout: KvLayout | None = LAYOUT,
    max_sequence_tokens: int = 1600,
    max_sequences: int = 0,
    total_blocks: int = 100,
    free_blocks: int = 100,
    running: int = 0,
    waiting: int = 0,
    resident_tokens: int = 0,
    lacking_tokens: int = 0,
    reserved: tuple[int, ...] = (),
    reported_at_s: float | None = NOW_S,
) -> InstanceView:
    """An idle instance of 1,600 tokens, but for what is said."""
    sequences = (SequenceLoad(f"{instance_id}-s", 1, lacking_tokens, 0, 0, 10),) if lacking_tokens else ()
    return InstanceView(
        info=InstanceInfo(
            instance_id=instance_id,
            incarnation="one",
            role=role,
            address="127.0.0.1:1",
            state=state,
            layout=layout,
            max_sequence_tokens=max_sequence_tokens,
            max_sequences=max_sequences,
        ),
        load=None
        if reported_at_s is None
        else InstanceLoad(
            total_blocks=total_blocks,
            free_blocks=free_blocks,
            running_sequences=running,
            waiting_sequences=waiting,
            resident_tokens=resident_tokens,
            sequences=sequences,
        ),
        reported_at_s=reported_at_s or 0.0,
        reservations=tuple(
            Reservation(f"{instance_id}-r{i}", instance_id, tokens, NOW_S + 10) for i, tokens in enumerate(reserved)
        ),
    )


def prefill(instance_id: str = "prefill-0", **fields: object) -> InstanceView:
    """An idle prefill instance, but for what is said."""
    return instance(instance_id, role=Role.PREFILL, **fields)  # type: ignore[arg-type]


def cluster(*instances: InstanceView) -> ClusterView:
    """A view of these at NOW_S."""
    return ClusterView(NOW_S, instances)


@st.composite
def instances(draw: st.DrawFn, instance_id: str, role: Role) -> InstanceView:
    """Any instance, most of them usable."""
    total_blocks = draw(st.integers(1, 100))
    return instance(
        instance_id,
        role=role,
        state=draw(st.sampled_from([InstanceState.READY] * 4 + [InstanceState.DRAINING, InstanceState.DRAINED])),
        layout=draw(st.sampled_from([LAYOUT] * 4 + [OTHER_LAYOUT, None])),
        max_sequence_tokens=draw(st.sampled_from([0, 100, 1600, 1600])),
        max_sequences=draw(st.sampled_from([0, 1, 8])),
        total_blocks=total_blocks,
        free_blocks=draw(st.integers(0, total_blocks)),
        running=draw(st.integers(0, 8)),
        waiting=draw(st.integers(0, 3)),
        resident_tokens=draw(st.integers(0, 500)),
        lacking_tokens=draw(st.integers(0, 60)),
        reserved=tuple(draw(st.lists(st.integers(1, 100), max_size=3))),
        reported_at_s=draw(st.sampled_from([NOW_S, NOW_S - 1, NOW_S - 100, None])),
    )


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    """Up to three prefill and six decode instances, ordered by id as the ledger orders them."""
    found = [draw(instances(f"p{i}", Role.PREFILL)) for i in range(draw(st.integers(0, 3)))]
    found += [draw(instances(f"d{i}", Role.DECODE)) for i in range(draw(st.integers(0, 6)))]
    return cluster(*sorted(found, key=lambda view: view.info.instance_id))

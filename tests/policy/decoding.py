"""Decode instances full of sequences, to reschedule: by hand, and drawn at random."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import strategies as st

from starmesh.policy.cost import CostModel
from starmesh.policy.rescheduling import POLICIES, InFlight, Plan, PlanMemory, ReschedulingConfig
from starmesh.types import ClusterView, InstanceState, InstanceView, Migration, MigrationReason, SequenceLoad

from .views import LAYOUT, NOW_S, OTHER_LAYOUT, instance

# Moving costs next to nothing: what is tested is which moves help.
CHEAP = CostModel(
    step_base_s=0.02, step_sequence_s=0.0, step_token_s=1e-5, transfer_setup_s=1e-9, transfer_bytes_per_s=1e15
)
CONFIG = ReschedulingConfig(
    policy="star",
    cost=CHEAP,
    horizon_steps=40,
    memory_horizons=1,
    overload_margin=0.0,
    amortisation=0.0,
    watermark=0.0,
    hysteresis=0.0,
    max_in_flight=100,
    max_in_flight_per_source=100,
    max_in_flight_per_target=100,
)
"""Without thresholds and limits."""


def sequence(
    request_id: str,
    tokens: int,
    remaining: int | None = None,
    upper: int | None = None,
    *,
    age: int = 0,
    output_tokens: int = 1,
    max_output_tokens: int = 1000,
    resident_tokens: int | None = None,
    epoch: int = 1,
) -> SequenceLoad:
    """A decoding sequence of ``tokens``, but for what is said."""
    return SequenceLoad(
        request_id=request_id,
        epoch=epoch,
        prompt_tokens=tokens - output_tokens,
        output_tokens=output_tokens,
        resident_tokens=tokens - 1 if resident_tokens is None else resident_tokens,
        max_output_tokens=max_output_tokens,
        remaining_tokens=remaining,
        remaining_tokens_upper=remaining if upper is None else upper,
        prediction_age_tokens=None if remaining is None else age,
    )


def decode(instance_id: str, *sequences: SequenceLoad, total_blocks: int = 100, **fields: object) -> InstanceView:
    """An instance that holds these and nothing else; 1,600 tokens, but for what is said."""
    found = instance(instance_id, total_blocks=total_blocks, max_sequence_tokens=0, **fields)  # type: ignore[arg-type]
    return found if found.load is None else holding(found, sequences)


def holding(found: InstanceView, sequences: tuple[SequenceLoad, ...]) -> InstanceView:
    """The instance with these sequences instead, reported now."""
    assert found.load is not None
    used = sum(-(-known.resident_tokens // LAYOUT.block_tokens) for known in sequences)
    load = dataclasses.replace(
        found.load,
        free_blocks=max(0, found.load.total_blocks - used),
        running_sequences=len(sequences),
        resident_tokens=sum(known.resident_tokens for known in sequences),
        sequences=sequences,
    )
    return dataclasses.replace(found, load=load)


def applied(view: ClusterView, plan: Plan) -> ClusterView:
    """The view once all moves of the plan are done, and nothing else has happened."""
    here = {found.info.instance_id: list(found.load.sequences) for found in view.instances if found.load is not None}
    for move in plan.migrations:
        gone = next(known for known in here[move.source] if known.request_id == move.request_id)
        here[move.source].remove(gone)
        here[move.target].append(dataclasses.replace(gone, epoch=gone.epoch + 1))
    return ClusterView(
        view.now_s,
        tuple(
            found if found.load is None else holding(found, tuple(here[found.info.instance_id]))
            for found in view.instances
        ),
    )


def by_id(view: ClusterView) -> dict[str, InstanceView]:
    """The instances by id."""
    return {found.info.instance_id: found for found in view.instances}


def running(found: InstanceView) -> dict[str, SequenceLoad]:
    """The sequences of an instance by request id."""
    assert found.load is not None
    return {known.request_id: known for known in found.load.sequences}


def limit_of(known: SequenceLoad) -> int:
    """What a sequence may still generate."""
    return known.max_output_tokens - known.output_tokens


def upper_of(known: SequenceLoad, config: ReschedulingConfig, *, believe: bool = True) -> int:
    """What a sequence is taken to generate at most: its upper quantile if that is believed, or its limit."""
    believed = known.remaining_tokens and (known.prediction_age_tokens or 0) <= config.max_prediction_age_tokens
    if believe and believed and (known.remaining_tokens_upper or 0) > 0:
        assert known.remaining_tokens is not None and known.remaining_tokens_upper is not None
        return min(limit_of(known), max(known.remaining_tokens_upper, known.remaining_tokens))
    return limit_of(known)


def blocks_at(known: SequenceLoad, step: int) -> int:
    """Blocks that a sequence holds while it runs."""
    return -(-(known.prompt_tokens + known.output_tokens + step) // LAYOUT.block_tokens)


def blocks_for_sequences(found: InstanceView) -> float:
    """Blocks of an instance that are neither held for others nor reserved."""
    assert found.load is not None
    own = sum(-(-known.resident_tokens // LAYOUT.block_tokens) for known in found.load.sequences)
    others = max(0, found.load.total_blocks - found.load.free_blocks - own)
    return found.load.total_blocks - others - found.reserved_tokens / LAYOUT.block_tokens


def _any_sequence(draw: random.Random, request_id: str) -> SequenceLoad:
    """Any sequence: with and without predictions, wrong and aged ones too, most of them decoding."""
    tokens = draw.choice([draw.randint(2, 60), draw.randint(2, 300), draw.randint(200, 700)])
    output = draw.randint(1, tokens - 1)
    remaining = draw.choice([None, 0, draw.randint(1, 20), draw.randint(1, 80), draw.randint(1, 80)])
    return sequence(
        request_id,
        tokens,
        remaining,
        None if remaining is None else remaining + draw.randint(-10, 60),
        age=draw.choice([0, 0, 0, 20, 1000]),
        output_tokens=output,
        max_output_tokens=output + draw.randint(0, 200),
        resident_tokens=0 if draw.random() < 0.1 else None,
    )


def any_cluster(seed: int, *, plain: bool = False) -> ClusterView:
    """A cluster by its seed, of up to five decode instances and eight sequences on each; if ``plain`` all of them
    ready, fresh and of one kind. Drawn by one number, since drawing each field takes Hypothesis longer than planning.
    """
    draw = random.Random(seed)
    found: list[InstanceView] = []
    most = draw.choice([1, 4, 8])
    for number in range(draw.choice([0, 1, 2, 3, 3, 4, 5])):
        here = [_any_sequence(draw, f"s{draw.random()}") for _ in range(draw.randint(0, most))]
        fields: dict[str, object] = {}
        if not plain:
            fields = {
                "state": draw.choice([InstanceState.READY] * 7 + [InstanceState.DRAINING, InstanceState.DRAINED]),
                "layout": draw.choice([LAYOUT] * 7 + [OTHER_LAYOUT]),
                "reported_at_s": draw.choice([NOW_S] * 7 + [NOW_S - 100, None]),
                "waiting": draw.choice([0] * 7 + [1]),
                "reserved": tuple(draw.randint(1, 100) for _ in range(draw.choice([0, 0, 2]))),
                "max_sequences": draw.choice([0, 0, 6]),
            }
        total_blocks = draw.choice([60, 200, 400])
        one = decode(f"d{number}", *here, total_blocks=total_blocks, **fields)
        if not plain and one.load is not None and draw.random() < 0.1:
            # Someone else's migrations.
            incoming = draw.choice([0, 1])
            load = dataclasses.replace(one.load, incoming_migrations=incoming, outgoing_migrations=1 - incoming)
            one = dataclasses.replace(one, load=load)
        if not plain and one.load is not None and draw.random() < 0.2:
            # Blocks that are held for pullers, or for sequences that arrive.
            free_blocks = max(0, one.load.free_blocks - draw.randint(1, 30))
            one = dataclasses.replace(one, load=dataclasses.replace(one.load, free_blocks=free_blocks))
        found.append(one)
    return ClusterView(NOW_S, tuple(found))


def any_memory(view: ClusterView, seed: int) -> PlanMemory:
    """What may be remembered at this view: moves under way, done and failed, some of sequences and instances that are
    gone."""
    draw = random.Random(seed)
    names = [found.info.instance_id for found in view.instances] + ["gone"]
    memory = PlanMemory(transfer_factor=draw.choice([0.5, 1.0, 3.0]))
    for found in view.instances:
        for known in found.load.sequences if found.load else ():
            if draw.random() < 0.8:
                continue
            source = draw.choice([found.info.instance_id] * 4 + names)
            epoch = known.epoch - draw.choice([0, 0, 0, 1])
            move = Migration(known.request_id, source, draw.choice(names), epoch, MigrationReason.LOAD, 1.0)
            memory = memory.started((InFlight(move, NOW_S - draw.choice([1.0, 1.0, 100.0]), 0.1),))
            ended_s = NOW_S - draw.choice([1.0, 5.0, 50.0])
            if draw.random() < 0.3:
                memory = memory.succeeded(known.request_id, duration_s=0.1, now_s=ended_s, config=CONFIG)
            elif draw.random() < 0.3:
                memory = memory.failed(known.request_id, now_s=ended_s, config=CONFIG)
    return memory


seeds = st.integers(0, 2**32)
clusters = st.builds(any_cluster, seeds)
plain_clusters = st.builds(lambda seed: any_cluster(seed, plain=True), seeds)
policies = st.sampled_from(sorted(POLICIES))
configs = st.builds(
    dataclasses.replace,
    st.just(CONFIG),
    policy=policies,
    horizon_steps=st.sampled_from([0, 1, 40, 100]),
    memory_horizons=st.sampled_from([1, 2]),
    overload_margin=st.sampled_from([0.0, 0.1]),
    amortisation=st.sampled_from([0.0, 2.0]),
    hysteresis=st.sampled_from([0.0, 1.0]),
    freeness_threshold_blocks=st.sampled_from([3.0, 20.0]),
    star_moves_per_round=st.integers(1, 3),
    max_in_flight=st.sampled_from([1, 3, 100]),
    max_in_flight_per_source=st.sampled_from([1, 2, 100]),
    max_in_flight_per_target=st.sampled_from([1, 2, 100]),
    shortlist=st.sampled_from([1, 2, 16]),
)

"""The policies on arrays decide what they decide when read one number at a time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starmesh.policy.rescheduling import Plan, PlanMemory, ReschedulingConfig, plan
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import ClusterView, Migration

from .decoding import CHEAP, any_cluster, any_memory, configs, seeds
from .readable import readable_plan

pytestmark = pytest.mark.fast

costs = st.builds(
    dataclasses.replace,
    st.just(CHEAP),
    step_sequence_s=st.sampled_from([0.0, 1e-3]),
    transfer_setup_s=st.sampled_from([1e-9, 0.1]),
)
more_configs = st.builds(
    dataclasses.replace,
    configs,
    cost=costs,
    watermark=st.sampled_from([0.0, 0.1]),
    sample_count=st.sampled_from([1, 2, 8]),
    memory_bins=st.sampled_from([1, 8]),
    max_waiting_sequences=st.sampled_from([0, 1]),
    max_target_failures=st.sampled_from([1, 3]),
)


def without_gains(decided: Plan) -> tuple[list[Migration], Plan]:
    """The numbers that are sums of many apart: their last bits depend on the order of adding."""
    none = dataclasses.replace(
        decided, migrations=(), memory=PlanMemory(), spread_before_tokens=0.0, spread_after_tokens=0.0
    )
    return [dataclasses.replace(move, gain_tokens=0.0) for move in decided.migrations], none


@given(seeds, seeds, st.booleans(), more_configs)
def test_arrays_decide_as_the_readable_form(
    seed: int, memory_seed: int, remembers: bool, config: ReschedulingConfig
) -> None:
    view = any_cluster(seed)
    memory = any_memory(view, memory_seed) if remembers else PlanMemory()
    decided, expected = plan(view, memory, config), readable_plan(view, memory, config)
    assert without_gains(decided) == without_gains(expected)
    assert [move.gain_tokens for move in decided.migrations] == pytest.approx(
        [move.gain_tokens for move in expected.migrations], abs=1e-6
    )
    assert decided.spread_before_tokens == pytest.approx(expected.spread_before_tokens)
    assert decided.spread_after_tokens == pytest.approx(expected.spread_after_tokens, abs=1e-6)
    assert decided.memory.cool_downs == expected.memory.cool_downs
    assert [entry.migration.request_id for entry in decided.memory.in_flight] == [
        entry.migration.request_id for entry in expected.memory.in_flight
    ]


@given(seeds, configs)
@example(0, ReschedulingConfig())
def test_columns_decide_as_rows(seed: int, config: ReschedulingConfig) -> None:
    view = any_cluster(seed)
    in_columns = tuple(
        found
        if found.load is None
        else dataclasses.replace(
            found, load=dataclasses.replace(found.load, sequences=SequenceLoads.of(found.load.sequences))
        )
        for found in view.instances
    )
    assert plan(ClusterView(view.now_s, in_columns), PlanMemory(), config) == plan(view, PlanMemory(), config)

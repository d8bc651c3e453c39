"""Rounds as lines of JSON: exact both ways, and strict."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.cost import CostModel
from starmesh.policy.rescheduling import POLICIES, CoolDown, InFlight, PlanMemory, plan
from starmesh.policy.rescheduling.record import VERSION, InvalidRecord, RecordedRound, decode_round, encode_round
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import ClusterView, Migration, MigrationReason

from .decoding import CONFIG, clusters, decode, sequence
from .views import NOW_S, cluster
from .views import clusters as mixed_clusters

pytestmark = pytest.mark.fast

ids = st.text(min_size=1, max_size=5)
times = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=sys.float_info.min, max_value=1e300)
counts = st.integers(0, 2**53)
migrations = st.builds(Migration, ids, ids, ids, counts, st.sampled_from(MigrationReason), times)
memories = st.builds(
    PlanMemory,
    in_flight=st.lists(st.builds(InFlight, migrations, times, times), max_size=3).map(tuple),
    cool_downs=st.lists(st.builds(CoolDown, ids, ids, ids, times, counts), max_size=3).map(tuple),
    transfer_factor=st.floats(0.1, 100.0),
)
configs = st.builds(
    dataclasses.replace,
    st.just(CONFIG),
    policy=st.sampled_from(sorted(POLICIES)),
    cost=st.builds(CostModel, positive, positive, positive, positive, positive),
    cool_down_s=positive | st.integers(0, 10),
    hysteresis=positive,
)


def decided(view: ClusterView, memory: PlanMemory | None = None, **fields: object) -> RecordedRound:
    memory = memory or PlanMemory()
    config = dataclasses.replace(CONFIG, **fields)  # type: ignore[arg-type]
    return RecordedRound(view, memory, config, plan(view, memory, config))


@given(clusters | mixed_clusters(), st.sampled_from(sorted(POLICIES)))
def test_a_round_comes_back_equal_and_plans_the_same(view: ClusterView, policy: str) -> None:
    first = decided(view, policy=policy)
    # The memory of a round with moves, for the next one.
    for recorded in (first, decided(dataclasses.replace(view, now_s=NOW_S + 1.1), first.plan.memory, policy=policy)):
        line = encode_round(recorded)
        again = decode_round(line)
        assert again == recorded
        assert plan(again.view, again.memory, again.config) == recorded.plan
        assert encode_round(again) == line and "\n" not in line


@given(memories, configs, times)
def test_numbers_and_names_come_back_exactly(memory: PlanMemory, config: object, now_s: float) -> None:
    view = ClusterView(now_s)
    recorded = dataclasses.replace(decided(ClusterView(0.0)), view=view, memory=memory, config=config)
    again = decode_round(encode_round(recorded))
    # repr: equal floats of different sign or kind are not the same.
    assert repr(again) == repr(recorded)


VIEW = cluster(decode("d0", *(sequence(f"s{i}", 100 + i, 50) for i in range(6))), decode("d1"))
LINE = encode_round(decided(VIEW, policy="star_plus"))


def test_sequences_in_columns_are_recorded_as_rows() -> None:
    columns = tuple(
        dataclasses.replace(
            found, load=dataclasses.replace(found.load, sequences=SequenceLoads.of(found.load.sequences))
        )
        for found in VIEW.instances
        if found.load is not None
    )
    recorded = decided(ClusterView(VIEW.now_s, columns), policy="star_plus")
    assert recorded.plan.migrations
    assert encode_round(recorded) == LINE
    assert decode_round(LINE) == recorded


def changed(line: str, *path: str | int, to: object) -> str:
    fields = json.loads(line)
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("path", "to", "why"),
    [
        (["version"], VERSION + 1, "use the release that wrote it"),
        (["version"], True, "use the release that wrote it"),
        (["extra"], 1, "round.extra is unknown"),
        (["view", "now_s"], "1", r"round.view.now_s is not a finite number"),
        (["view", "now_s"], True, r"round.view.now_s is not a finite number"),
        (["view", "instances"], {}, r"round.view.instances is not an array"),
        (["view", "instances", 0, "info", "role"], "cook", r"instances\[0\].info.role is no Role"),
        (["view", "instances", 0, "load", "sequences", 0, 1], 1.5, r"sequences\[0\] is not an integer"),
        (["view", "instances", 0, "load", "sequences", 0], [], r"sequences\[0\] is not a row of 9"),
        (["view", "instances", 0, "load"], [], "load is not an object"),
        (["config", "max_in_flight"], 0, "round.config cannot be: "),
        (["config", "policy"], None, "round.config.policy is not a string"),
        (["plan", "spread_before_tokens"], None, "spread_before_tokens is not a finite number"),
    ],
)
def test_what_is_not_a_round_is_refused(path: list[str | int], to: object, why: str) -> None:
    with pytest.raises(InvalidRecord, match=why):
        decode_round(changed(LINE, *path, to=to))


@pytest.mark.parametrize("line", ["", "[]", "nothing", LINE[:-1], LINE.replace("1000.0", "NaN"), "[" * 100_000])
def test_what_is_not_json_is_refused(line: str) -> None:
    with pytest.raises(InvalidRecord):
        decode_round(line)


def test_a_missing_field_is_refused() -> None:
    fields = json.loads(LINE)
    del fields["plan"]["memory"]
    with pytest.raises(InvalidRecord, match=r"round.plan.memory is missing"):
        decode_round(json.dumps(fields))


def test_what_has_no_plain_form_is_no_round() -> None:
    recorded = decided(VIEW)
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_round(dataclasses.replace(recorded, view=ClusterView(float("inf"))))

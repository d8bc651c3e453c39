"""Every value survives the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.rpc import convert
from starmesh.types import (
    FinishReason,
    HiddenLayout,
    KvLayout,
    KvTicket,
    RemainingEstimate,
    SamplingParams,
    SequenceSpec,
)
from starmesh.v1 import predictor_pb2, sequence_pb2

pytestmark = pytest.mark.fast

text = st.text(max_size=20)
count = st.integers(min_value=0, max_value=2**31 - 1)
token_ids = st.lists(count, max_size=20).map(tuple)
layouts = st.builds(
    KvLayout,
    model_revision=text,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    layers=count,
    kv_heads=count,
    head_dim=count,
    block_tokens=count,
)
samplings = st.builds(
    SamplingParams,
    max_output_tokens=count,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=count,
    repetition_penalty=st.floats(0.1, 10),
    stop_strings=st.lists(text, max_size=3).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    ignore_eos=st.booleans(),
)
specs = st.builds(
    SequenceSpec,
    request_id=text,
    epoch=st.integers(1, 2**53),
    prompt_token_ids=token_ids,
    output_token_ids=token_ids,
    sampling=samplings,
    priority=st.integers(-100, 100),
)


@given(specs)
def test_a_sequence_survives(spec: SequenceSpec) -> None:
    wire = convert.spec_pb(spec).SerializeToString()
    assert convert.spec(sequence_pb2.SequenceSpec.FromString(wire)) == spec


@given(layouts, text, token_ids, count, st.floats(0, 1e6))
def test_a_ticket_survives(layout: KvLayout, name: str, block_ids: tuple[int, ...], tokens: int, lease: float) -> None:
    ticket = KvTicket(
        lease_id=name,
        instance_id=name,
        address=name,
        layout=layout,
        block_ids=block_ids,
        resident_tokens=tokens,
        lease_duration_s=lease,
    )
    back = convert.ticket(sequence_pb2.KvTicket.FromString(convert.ticket_pb(ticket).SerializeToString()))
    assert back.lease_duration_s == pytest.approx(lease, abs=1e-8)
    assert (back.block_ids, back.layout, back.resident_tokens) == (block_ids, layout, tokens)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_a_finish_reason_survives(reason: FinishReason | None) -> None:
    assert convert.finish_reason(convert.finish_reason_pb(reason)) is reason


@given(st.builds(HiddenLayout, text, token_ids, count), st.builds(RemainingEstimate, count, count, count))
def test_what_a_prediction_is_made_of_survives(layout: HiddenLayout, estimate: RemainingEstimate) -> None:
    wire = convert.hidden_layout_pb(layout).SerializeToString()
    assert convert.hidden_layout(predictor_pb2.HiddenLayout.FromString(wire)) == layout
    wire = convert.estimate_pb(estimate).SerializeToString()
    assert convert.estimate(sequence_pb2.RemainingEstimate.FromString(wire)) == estimate

"""Arrivals and lengths that are drawn: their distributions, and what stays the same when one thing changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.sim.workload import (
    LENGTH_MODELS,
    SimulatedRequest,
    WorkloadConfig,
    WorkloadError,
    describe,
    draw_requests,
    output_cap,
)

pytestmark = pytest.mark.fast

K = 1024


def drawn(seed: int = 0, **changes: Any) -> list[SimulatedRequest]:
    """The requests of a workload of a thousand at one a second, changed as said."""
    return list(draw_requests(WorkloadConfig(**{"requests": 1000, "rate": 1.0, **changes}), seed=seed))


def lengths(requests: list[SimulatedRequest]) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in requests]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    rate=st.floats(1e-3, 1e4),
    variation=st.floats(0.2, 5.0),
    model=st.sampled_from(sorted(LENGTH_MODELS)),
    arrivals=st.sampled_from(["poisson", "gamma"]),
    limit=st.integers(1, 40_000),
)
def test_requests_are_in_order_and_within_bounds(
    seed: int, rate: float, variation: float, model: str, arrivals: str, limit: int
) -> None:
    requests = drawn(
        seed, requests=60, rate=rate, variation=variation, lengths=model, arrivals=arrivals, max_output_tokens=limit
    )
    assert len(requests) == len({request.request_id for request in requests}) == 60
    times = [request.arrives_s for request in requests]
    assert times == sorted(times) and times[0] >= 0
    assert all(1 <= request.output_tokens <= request.max_output_tokens == limit for request in requests)
    assert all(1 <= request.prompt_tokens <= 98_304 for request in requests)


@pytest.mark.parametrize("model", sorted(LENGTH_MODELS))
def test_a_change_of_one_thing_changes_nothing_else(model: str) -> None:
    first = drawn(7, lengths=model)
    assert first == drawn(7, lengths=model)
    assert first[:100] == drawn(7, lengths=model, requests=100)
    faster, bursty = drawn(7, lengths=model, rate=4.0), drawn(7, lengths=model, arrivals="gamma", variation=3.0)
    assert lengths(first) == lengths(faster) == lengths(bursty)
    assert [request.arrives_s for request in first] == [4.0 * request.arrives_s for request in faster]
    others = drawn(7, lengths="chat" if model == "reasoning" else "reasoning")
    assert [request.arrives_s for request in first] == [request.arrives_s for request in others]
    capped = drawn(7, lengths=model, max_output_tokens=300)
    assert [(prompt, min(output, 300)) for prompt, output in lengths(first)] == lengths(capped)
    assert lengths(first) != lengths(drawn(8, lengths=model))


@pytest.mark.parametrize(("arrivals", "variation"), [("poisson", 1.0), ("gamma", 1.0), ("gamma", 3.0), ("gamma", 0.5)])
def test_gaps_have_the_rate_and_the_variation_asked_for(arrivals: str, variation: float) -> None:
    requests = drawn(1, requests=20_000, rate=5.0, arrivals=arrivals, variation=variation)
    gaps = np.diff([request.arrives_s for request in requests])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    # No gap tells of the next one, across the pieces in which they are drawn too.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_the_reasoning_mix_is_the_papers() -> None:
    outputs = np.array([request.output_tokens for request in drawn(2, requests=20_000)])
    assert (outputs < K).mean() == pytest.approx(0.292, abs=0.008)
    assert (outputs > 30 * K).mean() == pytest.approx(0.173, abs=0.008)
    assert outputs.max() == 32 * K
    assert (outputs == 32 * K).mean() == pytest.approx(0.163, abs=0.008)


def test_a_scaled_mix_keeps_its_shape_below_a_scaled_cap() -> None:
    full = drawn(3)
    small = drawn(3, output_scale=1 / 32, max_output_tokens=K)
    for one, other in zip(full, small, strict=True):
        assert other.output_tokens == max(1, round(one.output_tokens / 32))
        assert other.prompt_tokens == one.prompt_tokens


def test_prompts_are_cut() -> None:
    requests = drawn(4, lengths="chat", max_prompt_tokens=400)
    assert max(request.prompt_tokens for request in requests) == 400


def test_how_long_the_outputs_of_a_length_model_get() -> None:
    def cap(**changes: Any) -> int:
        return output_cap(WorkloadConfig(requests=1, rate=1.0, **changes))

    assert cap() == 32 * K
    assert cap(max_output_tokens=K) == K
    assert cap(lengths="chat") == 1000
    assert cap(lengths="chat", output_scale=3.0) == 3000


def test_a_workload_is_described() -> None:
    config = WorkloadConfig(requests=20_000, rate=2.0, lengths="chat")
    summary = describe(config, seed=0)
    assert summary.requests == 20_000 and summary.cut == 0
    assert summary.rate == pytest.approx(2.0, rel=0.05)
    assert summary.outputs.quantiles[2] == pytest.approx(129, rel=0.05)
    assert summary.prompts.quantiles[2] == pytest.approx(1020, rel=0.05)
    assert "p50" in str(summary) and "at their limit" in str(summary)
    assert "outputs of up to 1,000 tokens" in str(summary)
    assert describe(config, seed=0, most_requests=1).rate == 0


def test_a_config_goes_through_json() -> None:
    config = WorkloadConfig(requests=5, rate=2.5, arrivals="gamma", variation=2.0, max_output_tokens=100)
    assert WorkloadConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requests": 0}, "at least one request"),
        ({"rate": None}, "need a rate"),
        ({"rate": 0.0}, "rate is a number above 0"),
        ({"rate": float("nan")}, "rate is a number above 0"),
        ({"variation": float("inf")}, "variation is a number above 0"),
        ({"output_scale": -1.0}, "output_scale is a number above 0"),
        ({"arrivals": "uniform"}, "arrivals are poisson, gamma, trace"),
        ({"lengths": "poems"}, "length models are reasoning, chat and trace"),
        ({"lengths": "trace"}, "set trace_path"),
        ({"arrivals": "trace"}, "set trace_path"),
        ({"max_output_tokens": 0}, "max_output_tokens is 1 to"),
        ({"max_prompt_tokens": 10**9}, "max_prompt_tokens is 1 to"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        WorkloadConfig(**{"requests": 10, "rate": 1.0, **changes})


def test_no_more_is_drawn_than_asked_for() -> None:
    endless = draw_requests(WorkloadConfig(requests=10**12, rate=1.0), seed=0)
    assert len(list(itertools.islice(endless, 3000))) == 3000

"""The emulated executor: how long its steps take, and the tokens that it makes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.engine.batch import Batch, BatchItem
from starmesh.engine.emulated import EOS_TOKEN_ID, EmulatedExecutor, StepNoise, output_token_id, step_duration_s
from starmesh.policy.cost import CostModel
from starmesh.types import KvLayout

pytestmark = pytest.mark.fast

COST = CostModel(
    step_base_s=1.0,
    step_sequence_s=0.1,
    step_token_s=0.001,
    transfer_setup_s=0.0,
    transfer_bytes_per_s=1.0,
    prefill_token_s=0.01,
    prefill_pair_s=0.0001,
)
LAYOUT = KvLayout("emulated", "bfloat16", 1, 1, 2, 4)


def decoding(tokens: int, request_id: str = "r") -> BatchItem:
    """A sequence of ``tokens`` tokens, all but the last of them computed."""
    history = list(range(tokens))
    return BatchItem(request_id, history[-1:], tokens - 1, (0,), history=history, prompt_tokens=1)


def prompt(tokens: int, start: int, *, samples: bool = True) -> BatchItem:
    """The next ``tokens`` tokens of a prompt."""
    return BatchItem("p", [7] * tokens, start, (0,), history=[7] * (start + tokens) if samples else None)


def executor(waited: list[float], *, ends_at: int = 1 << 30, noise: float = 0.0) -> EmulatedExecutor:
    """One that only says how long it would wait."""
    return EmulatedExecutor(
        layout=LAYOUT,
        total_blocks=8,
        cost=COST,
        noise=StepNoise(noise, seed=1, stream=2),
        ends_at=lambda item: ends_at,
        wait=waited.append,
    )


def test_a_step_costs_what_the_cost_model_says() -> None:
    batch = Batch((decoding(100), decoding(50), prompt(10, 4)))
    decode_s = 1.0 + 2 * 0.1 + 150 * 0.001
    pairs = sum(range(5, 15))
    assert step_duration_s(COST, batch) == pytest.approx(decode_s + 10 * 0.01 + pairs * 0.0001)
    waited: list[float] = []
    executor(waited).execute(batch)
    assert waited == [pytest.approx(step_duration_s(COST, batch))]


def test_a_prompt_in_parts_costs_what_the_whole_does() -> None:
    whole = COST.prefill_s(1000, 0)
    assert COST.prefill_s(300, 0) + COST.prefill_s(700, 300) == pytest.approx(whole)


def test_a_sequence_ends_at_its_token_and_others_differ_by_position() -> None:
    waited: list[float] = []
    ending = executor(waited, ends_at=100)
    result = ending.execute(Batch((decoding(98), decoding(99), decoding(100), prompt(5, 0, samples=False))))
    assert result.token_ids == (output_token_id(98), EOS_TOKEN_ID, EOS_TOKEN_ID, None)
    assert len({output_token_id(position) for position in range(500, 1500)}) == 1000
    assert EOS_TOKEN_ID not in {output_token_id(position) for position in range(2000)}


@given(st.integers(0, 20_000), st.integers(1, 9_000), st.integers(1, 500))
def test_noise_is_the_same_in_whatever_parts_it_is_asked_for(start: int, count: int, part: int) -> None:
    whole = StepNoise(0.1, seed=3, stream=4).factors(start, count)
    noise = StepNoise(0.1, seed=3, stream=4)
    parts = [noise.factors(at, min(part, start + count - at)) for at in range(start, start + count, part)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert noise.factor(start + count - 1) == whole[-1]


def test_noise_has_the_mean_and_the_spread_that_it_should() -> None:
    factors = StepNoise(0.2, seed=0, stream=0).factors(0, 50_000)
    assert np.mean(factors) == pytest.approx(1.0, abs=0.005)
    assert np.std(factors) == pytest.approx(0.2, abs=0.005)
    other = StepNoise(0.2, seed=0, stream=1).factors(0, 50_000)
    assert abs(np.corrcoef(factors, other)[0, 1]) < 0.02


def test_noise_multiplies_each_step_by_its_number() -> None:
    waited: list[float] = []
    noisy = executor(waited, noise=0.3)
    batch = Batch((decoding(10),))
    for _ in range(5):
        noisy.execute(batch)
    expected = StepNoise(0.3, seed=1, stream=2).factors(0, 5) * step_duration_s(COST, batch)
    assert waited == pytest.approx(list(expected))

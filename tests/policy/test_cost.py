"""The cost model's formulas and the shipped profile."""

from __future__ import annotations

import pytest

from starmesh.policy.cost import LAPTOP_CPU, CostModel

pytestmark = pytest.mark.fast


def test_costs_are_linear() -> None:
    cost = CostModel(
        step_base_s=1.0, step_sequence_s=0.5, step_token_s=0.25, transfer_setup_s=2.0, transfer_bytes_per_s=10.0
    )
    assert cost.step_s(0, 0) == 1.0
    assert cost.step_s(4, 8) == 1.0 + 2.0 + 2.0
    assert cost.transfer_s(50) == 7.0
    assert cost.sequence_tokens == 2


def test_the_profile_is_near_what_was_measured() -> None:
    measured_s = {(1, 128): 0.084, (32, 32 * 128): 0.238, (32, 32 * 1024): 0.497}
    for (sequences, tokens), seconds in measured_s.items():
        assert LAPTOP_CPU.step_s(sequences, tokens) == pytest.approx(seconds, rel=0.2)
    assert LAPTOP_CPU.transfer_s(47.2e6) == pytest.approx(0.032, rel=0.2)


@pytest.mark.parametrize(
    "wrong", [{"step_base_s": -1.0}, {"step_token_s": 0.0}, {"transfer_bytes_per_s": 0.0}, {"transfer_setup_s": -1.0}]
)
def test_costs_are_not_negative(wrong: dict[str, float]) -> None:
    right = {
        "step_base_s": 0.0,
        "step_sequence_s": 0.0,
        "step_token_s": 1.0,
        "transfer_setup_s": 0.0,
        "transfer_bytes_per_s": 1.0,
    }
    with pytest.raises(ValueError, match="0"):
        CostModel(**(right | wrong))

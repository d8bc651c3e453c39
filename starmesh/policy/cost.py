"""What a decode step and a transfer of KV cost in seconds: one linear model for policy, simulator and emulated engine.

Owns the formulas. Owns no fitting and no clock; models' and accelerators' costs are ``profiles``'.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Linear costs of one kind of instance; all in seconds, none negative.

    A decode step reads the weights once (``step_base_s``), computes for each sequence (``step_sequence_s``) and reads
    each resident token's KV (``step_token_s``, above 0). Where prompts are computed in a step, each of their tokens
    costs ``prefill_token_s``, and ``prefill_pair_s`` for each token at or before it that it attends to. A transfer has
    a set-up (``transfer_setup_s``: the messages before and after) and then moves ``transfer_bytes_per_s`` (above 0).
    """

    step_base_s: float
    step_sequence_s: float
    step_token_s: float
    transfer_setup_s: float
    transfer_bytes_per_s: float
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0

    def __post_init__(self) -> None:
        costs = (self.step_base_s, self.step_sequence_s, self.transfer_setup_s)
        if min(*costs, self.prefill_token_s, self.prefill_pair_s) < 0:
            raise ValueError(f"a cost is at least 0 s, not {self}")
        if self.step_token_s <= 0 or self.transfer_bytes_per_s <= 0:
            raise ValueError(f"step_token_s and transfer_bytes_per_s are above 0, not {self}")

    def step_s(self, sequences: int, resident_tokens: int) -> float:
        """Seconds of a decode step over a batch of ``sequences`` that hold ``resident_tokens`` together."""
        return self.step_base_s + sequences * self.step_sequence_s + resident_tokens * self.step_token_s

    def prefill_s(self, tokens: int, start: int) -> float:
        """Seconds that the ``tokens`` next tokens of a prompt, of which ``start`` are computed, add to a step."""
        pairs = tokens * start + tokens * (tokens + 1) // 2
        return tokens * self.prefill_token_s + pairs * self.prefill_pair_s

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds to move ``size_bytes`` of KV between two instances."""
        return self.transfer_setup_s + size_bytes / self.transfer_bytes_per_s

    @property
    def sequence_tokens(self) -> int:
        """Resident tokens that slow a step as much as one more sequence in the batch does."""
        return round(self.step_sequence_s / self.step_token_s)


LAPTOP_CPU = CostModel(
    step_base_s=0.0707,
    step_sequence_s=0.00527,
    step_token_s=9.05e-6,
    transfer_setup_s=0.00445,
    transfer_bytes_per_s=1.5e9,
    prefill_token_s=0.00376,
    prefill_pair_s=2.21e-6,
)
"""The policy's default: the costs of the profile laptop-cpu, which says where they come from. Here as well because the
policy reads no files; a test holds both together."""

"""About how many requests per second a cluster carries: a first guess, from the cost model alone.

Pure. Assumes perfect balance and full batches, so a real cluster saturates somewhat earlier. Owns no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from starmesh.profiles import Profile
from starmesh.sim.workload import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Saturation:
    """Requests per second that one instance of each role carries; ``sequences`` are in the decode instance's batch
    then, a step takes ``step_s``, and the longest of the requests looked at ``longest_s``."""

    prefill_rate: float
    decode_rate: float
    sequences: float
    step_s: float
    longest_s: float

    def rate(self, *, prefill_instances: int, decode_instances: int) -> float:
        """Requests per second that a cluster carries."""
        return min(self.prefill_rate * prefill_instances, self.decode_rate * decode_instances)

    def prefill_instances(self, rate: float, *, decode_instances: int, slack: float = 1.5) -> int:
        """How many do not hold up ``rate`` requests per second, or as many of them as ``decode_instances`` carry, with
        ``slack`` for bursts."""
        return max(1, math.ceil(slack * min(rate, self.decode_rate * decode_instances) / self.prefill_rate))


def estimate(profile: Profile, requests: Sequence[SimulatedRequest]) -> Saturation:
    """For requests like ``requests``, of which there is at least one.

    A sequence that has P prompt tokens and generates O holds P + O/2 on average, and does so for O steps: over all
    sequences in a batch that is sum(P O + O^2 / 2) / sum(O). As many fit as memory and ``max_sequences`` allow.
    """
    outputs = [request.output_tokens for request in requests]
    total = sum(outputs)
    held = sum(
        request.prompt_tokens * request.output_tokens + request.output_tokens**2 / 2 for request in requests
    ) / max(1, total)
    sequences = max(1.0, min(profile.max_sequences, profile.kv_tokens / max(1.0, held)))
    cost = profile.cost
    step_s = cost.step_base_s + sequences * cost.step_sequence_s + sequences * held * cost.step_token_s
    mean_output = total / len(requests)
    # Prompts share the steps that compute them.
    prompt_s = math.fsum(
        cost.prefill_s(request.prompt_tokens, 0) + cost.step_base_s * request.prompt_tokens / profile.max_step_tokens
        for request in requests
    )
    return Saturation(
        prefill_rate=len(requests) / prompt_s if prompt_s > 0 else math.inf,
        decode_rate=sequences / step_s / max(1.0, mean_output),
        sequences=sequences,
        step_s=step_s,
        longest_s=max(outputs) * step_s,
    )

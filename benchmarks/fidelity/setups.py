"""What is compared: an instance, a load that two cores can carry live, and strategies that need no predictor.

Owns the choice. Lengths are the paper's mix at 8 % (the longest answer has 2,621 tokens), and a token's KV is eight
times as dear to read and to move as that of the profile: so batches and memory are as out of balance as they are with
whole lengths, and some 45 sequences at a time suffice for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from starmesh.profiles import Profile, load_profile
from starmesh.sim.config import SimulationConfig
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import WorkloadConfig

SEED = 1
DECODE_INSTANCES = 3
OUTPUT_SCALE = 0.08
KV_COST = 8.0
AMPLE_KV_TOKENS = 60_000


@dataclass(frozen=True, slots=True)
class Setup:
    """A strategy of ``STRATEGIES`` on instances with memory for ``kv_tokens``."""

    name: str
    strategy: str
    kv_tokens: int = AMPLE_KV_TOKENS
    rate: float = 2.0

    @property
    def directory(self) -> str:
        """Its name for files."""
        return self.name.replace(" ", "-").replace(",", "")

    def profile(self) -> Profile:
        """Its instances."""
        found = load_profile("rtx4090-7b")
        cost = replace(found.cost, step_token_s=KV_COST * found.cost.step_token_s)
        dearer = replace(found, cost=cost).with_link(bytes_per_s=found.link.bytes_per_s / KV_COST)
        return dearer.with_memory(self.kv_tokens)

    def drawn(self, requests: int) -> WorkloadConfig:
        """Its requests, to be drawn once."""
        return WorkloadConfig(
            requests=requests,
            rate=self.rate,
            output_scale=OUTPUT_SCALE,
            max_output_tokens=round(32_768 * OUTPUT_SCALE),
            max_prompt_tokens=2_000,
        )

    def replayed(self, requests: int, trace_path: str, *, seed: int) -> SimulationConfig:
        """A simulation of requests that were drawn; ``seed`` is only that of the steps' noise."""
        return SimulationConfig(
            profile=self.profile(),
            strategy=STRATEGIES[self.strategy],
            workload=replace(
                self.drawn(requests),
                rate=None,
                arrivals="trace",
                lengths="trace",
                output_scale=1.0,
                trace_path=trace_path,
            ),
            prefill_instances=1,
            decode_instances=DECODE_INSTANCES,
            seed=seed,
        )


SETUPS = (
    Setup("ample memory", "least_tokens"),
    Setup("edge of memory", "least_tokens", kv_tokens=25_000),
    Setup("edge of memory, in turn", "round_robin", kv_tokens=25_000),
    Setup("ample memory, current load", "current_load"),
    Setup("edge of memory, star_plus", "star_plus_unpredicted", kv_tokens=25_000),
)

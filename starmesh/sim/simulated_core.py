"""What a simulated instance computes with: the live engine core, and the stand-ins that it is given.

Owns how these are put together: an executor that moves a clock, a pool that may owe blocks, sequences that count their
tokens. Owns no event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from starmesh.clock import VirtualClock
from starmesh.engine.emulated import EOS_TOKEN_ID, EmulatedExecutor, StepNoise
from starmesh.engine.engine import EngineConfig, EngineCore
from starmesh.profiles import Profile
from starmesh.sim.leaping_sequence import OwingPool, SharedSteps
from starmesh.types import SequenceSpec


class SimulatedCore:
    """``engine``, with the clock, the executor and the shared steps that it goes by.

    ``seed`` and ``stream`` draw the noise of its steps. ``total_tokens`` says for each request with how many tokens,
    prompt included, it ends.
    """

    def __init__(
        self, profile: Profile, *, now_s: float, seed: int, stream: int, total_tokens: Mapping[str, int]
    ) -> None:
        self.clock = VirtualClock(now_s)
        self.executor = EmulatedExecutor(
            layout=profile.layout,
            total_blocks=profile.total_blocks,
            cost=profile.cost,
            noise=StepNoise(profile.step_noise, seed=seed, stream=stream),
            ends_at=lambda item: total_tokens[item.request_id],
            wait=self.clock.advance,
        )
        pool = OwingPool(profile.total_blocks, block_tokens=profile.layout.block_tokens)
        self.shared = SharedSteps(pool, ends_at=self._ends_at)
        self.engine = EngineCore(
            self.executor,
            EngineConfig(
                eos_token_ids=frozenset({EOS_TOKEN_ID}),
                max_sequence_tokens=profile.max_sequence_tokens,
                max_step_tokens=profile.max_step_tokens,
                max_sequences=profile.max_sequences,
            ),
            stop_checker=_no_stop_strings,
            clock=self.clock,
            pool=pool,
            make_sequence=self.shared.sequence,
            checks_when_idle=False,  # a recount of a large pool costs more than a thousand steps
        )
        self._total_tokens = total_tokens

    def _ends_at(self, spec: SequenceSpec) -> int:
        total = math.inf if spec.sampling.ignore_eos else self._total_tokens[spec.request_id]
        limit = self.engine.scheduler.limit_tokens(hold=False)
        return int(min(total, len(spec.prompt_token_ids) + spec.sampling.max_output_tokens, limit))


def _no_stop_strings(spec: SequenceSpec) -> NoReturn:
    raise ValueError(f"{spec.request_id} has stop strings, but a simulated output has no text")

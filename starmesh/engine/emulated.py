"""An executor without a model: steps take the time that the cost model says, and sequences end where they are told to.

Owns a step's duration, its noise and the tokens that stand for output. Owns no scheduling: the engine core, its
scheduler and its block pool are the real ones. What it means that time passes is the caller's: a live engine sleeps, a
simulator moves a clock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from starmesh.engine.batch import Batch, BatchItem, StepResult
from starmesh.policy.cost import CostModel
from starmesh.types import HiddenLayout, KvLayout

EOS_TOKEN_ID = 2
"""Ends an emulated sequence."""

FILLER_TOKEN_ID = 3
FILLER_TOKENS = 1000
"""The ids from ``FILLER_TOKEN_ID`` on that stand for text."""

_NOISE_CHUNK = 4096


class StepNoise:
    """The factor by which each step is slower or faster than the cost model, by its number: log-normal with mean 1.

    Drawn by (``seed``, ``stream``) and the step's number alone, so that it does not matter in which order or in how
    large parts they are asked for.
    """

    def __init__(self, relative: float, *, seed: int, stream: int) -> None:
        self._sigma = float(np.sqrt(np.log1p(relative * relative)))
        self._key = (seed, stream)
        self._chunks: dict[int, npt.NDArray[np.float64]] = {}

    def factor(self, step: int) -> float:
        """The factor of one step."""
        return float(self._chunk(step // _NOISE_CHUNK)[step % _NOISE_CHUNK])

    def factors(self, step: int, count: int) -> npt.NDArray[np.float64]:
        """The factors of ``count`` steps from ``step`` on, [count]."""
        first, last = step // _NOISE_CHUNK, (step + count - 1) // _NOISE_CHUNK
        chunks = [self._chunk(chunk) for chunk in range(first, last + 1)]
        offset = step - first * _NOISE_CHUNK
        return (chunks[0] if first == last else np.concatenate(chunks))[offset : offset + count]

    def _chunk(self, chunk: int) -> npt.NDArray[np.float64]:
        found = self._chunks.get(chunk)
        if found is None:
            # Steps only go forward, so the last two chunks are all that is asked for again.
            for old in [number for number in self._chunks if number < chunk - 1]:
                del self._chunks[old]
            draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((*self._key, chunk))))
            found = np.exp(draw.normal(-(self._sigma**2) / 2, self._sigma, _NOISE_CHUNK))
            self._chunks[chunk] = found
        return found


def step_duration_s(cost: CostModel, batch: Batch) -> float:
    """Seconds of one step without noise. An item of one token reads the KV before it, as a decoding sequence does."""
    resident_tokens = sequences = 0
    prefill_s = 0.0
    for item in batch.items:
        if len(item.token_ids) == 1:
            sequences += 1
            resident_tokens += item.start + 1
        else:
            prefill_s += cost.prefill_s(len(item.token_ids), item.start)
    return cost.step_s(sequences, resident_tokens) + prefill_s


def output_token_id(position: int) -> int:
    """Stands for the output token at ``position`` of a sequence: neighbours differ, so that none can be lost or doubled
    unseen."""
    return FILLER_TOKEN_ID + position % FILLER_TOKENS


def decode_durations_s(cost: CostModel, sequences: int, resident_tokens: int, steps: int) -> npt.NDArray[np.float64]:
    """Seconds of each of ``steps`` steps without noise, as ``step_duration_s`` has them, while ``sequences`` decode
    that hold ``resident_tokens`` together in the first of them, [steps]."""
    resident = np.arange(steps, dtype=np.float64) * sequences + resident_tokens
    return (cost.step_base_s + sequences * cost.step_sequence_s) + resident * cost.step_token_s


class EmulatedExecutor:
    """Executes batches by ``cost``; implements ``Executor``.

    ``ends_at`` says at how many tokens, prompt included, an item's sequence ends; ``wait`` lets seconds pass.
    """

    hidden_layout: HiddenLayout | None = None

    def __init__(
        self,
        *,
        layout: KvLayout,
        total_blocks: int,
        cost: CostModel,
        noise: StepNoise,
        ends_at: Callable[[BatchItem], int],
        wait: Callable[[float], None],
    ) -> None:
        self.layout = layout
        self.total_blocks = total_blocks
        self.steps = 0
        self._cost = cost
        self._noise = noise
        self._ends_at = ends_at
        self._wait = wait

    def execute(self, batch: Batch) -> StepResult:
        """Let the step's time pass."""
        self._wait(step_duration_s(self._cost, batch) * self._noise.factor(self.steps))
        self.steps += 1
        return StepResult(tuple(map(self._sampled, batch.items)))

    def next_durations_s(self, sequences: int, resident_tokens: int, steps: int) -> npt.NDArray[np.float64]:
        """How long its next ``steps`` steps would take; arguments and result as of ``decode_durations_s``."""
        quiet_s = decode_durations_s(self._cost, sequences, resident_tokens, steps)
        return quiet_s * self._noise.factors(self.steps, steps)

    def next_token_id(self, item: BatchItem) -> int:
        """The token that follows an item's history."""
        position = len(item.history or ())
        return EOS_TOKEN_ID if position + 1 >= self._ends_at(item) else output_token_id(position)

    def _sampled(self, item: BatchItem) -> int | None:
        return None if item.history is None else self.next_token_id(item)

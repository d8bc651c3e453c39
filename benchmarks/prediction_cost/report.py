"""What the blocks' figures come to: step times, ratios to the block without predictions just before, CPU times."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.migration.spread import NAMES, spread
from benchmarks.prediction_cost.phases import ANSWERING, PHASES, PLAIN_PHASE, Measured


@dataclass(frozen=True, slots=True)
class Block:
    """A measured block; of the plain block before it, the median step and the CPU time of a step, in seconds."""

    measured: Measured
    before_s: float
    before_cpu_s: float

    @property
    def ratios(self) -> list[float]:
        """Each step's time over that median: so the machine's slow and fast times cancel out."""
        return [step / self.before_s for step in self.measured.steps_s]


class Report:
    """Gathers blocks in the order in which they were measured; the first is plain."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[Block]] = defaultdict(list)
        self._plain_s, self._plain_cpu_s = math.nan, math.nan

    def add(self, phase: str, measured: Measured) -> str:
        """Note a block. Returns a line on it for people."""
        block = Block(measured, self._plain_s, self._plain_cpu_s)
        if not math.isnan(self._plain_s):
            self._blocks[phase].append(block)
        if phase == PLAIN_PHASE:
            self._plain_s, self._plain_cpu_s = statistics.median(measured.steps_s), measured.decode_cpu_s
        return (
            f"{phase}: step {1e3 * statistics.median(measured.steps_s):.0f} ms, "
            f"{statistics.median(block.ratios):.2f} of the plain one before, at most {max(block.ratios):.2f}; a step "
            f"has {1e3 * measured.decode_cpu_s:.1f} ms CPU, waits {1e3 * measured.decode_wait_s:.1f} for a core, and "
            f"takes {1e3 * measured.predictor_cpu_s:.2f} of the predictor; {measured.answered} answered, oldest "
            f"estimate {max(measured.ages)}"
        )

    def new_batches(self) -> None:
        """What comes next is not to be compared with what was before."""
        self._plain_s = math.nan

    def describe(self) -> dict[str, Any]:
        """What the benchmark's result has."""
        everything = (PLAIN_PHASE, *PHASES)
        return {
            "spread": NAMES,
            "step_ms": {
                phase: self._spread(phase, lambda one: 1e3 * statistics.median(one.measured.steps_s))
                for phase in everything
            },
            "step_over_plain": {
                phase: {
                    "p50": self._spread(phase, lambda one: statistics.median(one.ratios)),
                    "pooled": self._pooled(phase),
                }
                for phase in everything
            },
            "decode_cpu_ms_per_step": {
                phase: self._spread(phase, lambda one: 1e3 * one.measured.decode_cpu_s) for phase in everything
            },
            "decode_cpu_over_plain": {
                phase: self._spread(phase, lambda one: one.measured.decode_cpu_s / one.before_cpu_s)
                for phase in everything
            },
            "decode_wait_ms_per_step": {
                phase: self._spread(phase, lambda one: 1e3 * one.measured.decode_wait_s) for phase in everything
            },
            "predictor_cpu": {
                **{kind: self._predictor(kind) for kind in ANSWERING},
                "idle_ms_per_s": self._spread(
                    PLAIN_PHASE,
                    lambda one: 1e3 * one.measured.predictor_cpu_s / statistics.fmean(one.measured.steps_s),
                ),
            },
            "answered": {phase: sum(one.measured.answered for one in self._blocks[phase]) for phase in PHASES},
            "oldest_estimate_tokens": {
                phase: [max(one.measured.ages) for one in self._blocks[phase]] for phase in PHASES
            },
        }

    def _spread(self, phase: str, value: Callable[[Block], float]) -> list[float]:
        return spread([value(one) for one in self._blocks[phase]])

    def _pooled(self, phase: str) -> dict[str, float]:
        ratios = [ratio for one in self._blocks[phase] for ratio in one.ratios]
        found = {f"p{percent}": round(percentile(ratios, percent), 4) for percent in (50, 90, 99)}
        return {**found, "max": round(max(ratios), 4), "steps": len(ratios)}

    def _predictor(self, kind: str) -> dict[str, Any]:
        return {
            "ms_per_step": self._spread(kind, lambda one: 1e3 * one.measured.predictor_cpu_s),
            "part_of_step": self._spread(
                kind, lambda one: one.measured.predictor_cpu_s / statistics.fmean(one.measured.steps_s)
            ),
        }


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that ``percent`` of 100 values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

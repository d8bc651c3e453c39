"""Fits the cost model of a step to measured steps. Pure; measuring is ``instance.measuring``'s."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A step that took ``seconds``: ``sequences`` decoded a token each over ``resident_tokens`` together, themselves
    included; beside them ``prefill_tokens`` of prompts were computed, which attended to ``prefill_pairs`` tokens."""

    seconds: float
    sequences: int = 0
    resident_tokens: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0

    @property
    def row(self) -> tuple[int, int, int, int, int]:
        """What its costs are multiplied with, in the order of ``StepFit.costs``."""
        return (1, self.sequences, self.resident_tokens, self.prefill_tokens, self.prefill_pairs)


@dataclass(frozen=True, slots=True)
class StepFit:
    """Costs as in ``CostModel``, none negative, and how far off they are.

    ``errors`` are (modelled - measured) / measured, one for each step measured, in order.
    """

    step_base_s: float
    step_sequence_s: float
    step_token_s: float
    prefill_token_s: float
    prefill_pair_s: float
    errors: tuple[float, ...]

    @property
    def costs(self) -> tuple[float, float, float, float, float]:
        """All five."""
        return (
            self.step_base_s, self.step_sequence_s, self.step_token_s, self.prefill_token_s, self.prefill_pair_s,
        )  # fmt: skip

    @property
    def median_error(self) -> float:
        """The median absolute relative error."""
        return statistics.median(map(abs, self.errors))


def fit_steps(times: Sequence[StepTime]) -> StepFit:
    """The costs with the least sum of squared relative errors. Raises ValueError for fewer steps than costs."""
    rows = np.array([step.row for step in times], dtype=np.float64)
    seconds = np.array([step.seconds for step in times])
    if len(rows) < 5:
        raise ValueError(f"{len(rows)} different steps say too little of 5 costs: measure more")
    costs = _nonnegative_least_squares(rows / seconds[:, None], np.ones(len(rows)))
    errors = rows @ costs / seconds - 1
    base, sequence, token, prefill_token, prefill_pair = map(float, costs)
    return StepFit(base, sequence, token, prefill_token, prefill_pair, tuple(map(float, errors)))


def _nonnegative_least_squares(matrix: Floats, wanted: Floats) -> Floats:
    """The x >= 0 with the least ||matrix x - wanted||.

    Where x is not 0 it solves the plain problem of those columns alone, so of all subsets whose plain solution is not
    negative the best has it; with five columns there are 31.
    """
    columns = matrix.shape[1]
    # Seconds per token and per step differ by many orders of magnitude; least squares want like with like.
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(np.float64).tiny)
    scaled = matrix / scale
    best: Floats = np.zeros(columns)
    least = float(np.linalg.norm(wanted))
    for count in range(1, columns + 1):
        for subset in itertools.combinations(range(columns), count):
            found = np.linalg.lstsq(scaled[:, subset], wanted, rcond=None)[0]
            rest = float(np.linalg.norm(scaled[:, subset] @ found - wanted))
            if found.min() >= 0 and rest < least:
                best, least = np.zeros(columns), rest
                best[list(subset)] = found
    solution: Floats = best / scale
    return solution

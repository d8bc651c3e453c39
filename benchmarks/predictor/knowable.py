"""What no prediction from the prompt can know: how far apart two answers to the same prompt end.

With X and X' the lengths of two answers to one prompt, drawn alike, the best guess from the prompt is the median of its
lengths, and its mean absolute error lies between E|X - X'| / 2 (by the triangle inequality) and E|X - X'| (guessing the
other answer's length is a guess too).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from starmesh.prediction.dataset import Dataset


@dataclass(frozen=True, slots=True)
class SamePrompt:
    """Means over prompts with more than one answer, in tokens: the difference between two answers of one prompt, and
    between two answers whatever their prompts."""

    prompts: int
    difference: float
    difference_of_any: float


def same_prompt(dataset: Dataset) -> SamePrompt:
    """From the prompts that were answered more than once; cut answers count as long as they were."""
    several = [group for group in _groups(dataset) if len(group) > 1]
    if not several:
        return SamePrompt(0, float("nan"), float("nan"))
    within = [np.mean([abs(a - b) for a, b in itertools.combinations(group, 2)]) for group in several]
    pooled = np.concatenate(several).astype(np.float64)
    apart = np.abs(pooled[:, None] - pooled[None]).sum() / (len(pooled) * (len(pooled) - 1))
    return SamePrompt(len(several), float(np.mean(within)), float(apart))


def _groups(dataset: Dataset) -> list[np.ndarray]:
    order = np.argsort(dataset.prompt, kind="stable")
    lengths, prompts = dataset.total_tokens[order], dataset.prompt[order]
    return np.split(lengths, np.flatnonzero(np.diff(prompts)) + 1)

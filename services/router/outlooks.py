"""What the instances of a view will hold, as predicted: for people. The policies reckon for themselves.

Owns which estimates are believed here, the policies' way, and how they are summed up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.peak import peak_blocks, taken_remaining
from starmesh.policy.rescheduling import ReschedulingConfig
from starmesh.sequence_loads import COUNTS, UNKNOWN, SequenceLoads
from starmesh.types import ClusterView

_MAX_AGE_TOKENS: Final = ReschedulingConfig().max_prediction_age_tokens


@dataclass(frozen=True, slots=True)
class Outlook:
    """``predicted_tokens``: of all its sequences at their ends, one without an estimate as it is. ``peak_tokens``:
    the most that they will hold at one moment, by the medians; 0 where none has an estimate."""

    predicted_tokens: int
    peak_tokens: int


def outlooks(view: ClusterView) -> dict[str, Outlook]:
    """By instance id, of those that have sequences."""
    found = [item for item in view.instances if item.load is not None and len(item.load.sequences)]
    if not found:
        return {}
    loads = [SequenceLoads.of(item.load.sequences) for item in found if item.load is not None]
    columns = {
        name: np.concatenate([np.frombuffer(load.columns[place], dtype=np.int64) for load in loads])
        for place, name in enumerate(COUNTS)
    }
    owner = np.repeat(np.arange(len(loads)), [len(load) for load in loads])
    tokens, output, median = columns["resident_tokens"], columns["output_tokens"], columns["remaining_tokens"]
    remaining = taken_remaining(
        output,
        median,
        columns["remaining_tokens_upper"],
        columns["prediction_age_tokens"],
        np.maximum(0, columns["max_output_tokens"] - output),
        caution=0.0,
        max_age_tokens=_MAX_AGE_TOKENS,
    )
    known = median != UNKNOWN

    def summed(values: Integers) -> Integers:
        return np.bincount(owner, weights=values, minlength=len(loads)).astype(np.int64)

    predicted = summed(tokens + np.where(known, np.maximum(0, median), 0))
    # In tokens: blocks of one.
    peaks = peak_blocks(np.maximum(1, tokens), remaining, owner, len(loads), 1)
    peaks[summed(known.astype(np.int64)) == 0] = 0
    names = [item.info.instance_id for item in found]
    return {name: Outlook(*counts) for name, *counts in zip(names, predicted.tolist(), peaks.tolist(), strict=True)}

"""The steps before a choice: classify instances, collect candidates, and drop those that are not worth a transfer.

Owns no choice between moves (``select``) and no bookkeeping (``round``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Round
from starmesh.sequence_loads import UNKNOWN


@dataclass(frozen=True, slots=True)
class Classes:
    """Instances by load, most overloaded and least loaded first; ties by id. An instance may be both, if overloaded at
    one time and underloaded at another."""

    overloaded: Integers
    underloaded: Integers


def classify(round_: Round) -> Classes:
    """Overloaded: above the mean by the margin at any sample. Underloaded: below the mean at any sample."""
    mean, loads = round_.mean, round_.loads
    heat = loads.sum(axis=1)
    over = (loads > (1 + round_.config.overload_margin) * mean).any(axis=1) & round_.group.ready
    under = (loads < mean).any(axis=1) & round_.group.ready
    # Rows are ordered by id and the sort is stable: ties by id.
    hottest = np.argsort(-heat, kind="stable")
    coldest = np.argsort(heat, kind="stable")
    return Classes(hottest[over[hottest]], coldest[under[coldest]])


def candidates(round_: Round, sources: Integers, *, urgent: bool = False) -> Integers:
    """The sequences of these instances that may move."""
    return round_.screen(round_.group.sequences.of(sources)[0], urgent=urgent)


def amortised(round_: Round, rows: Integers) -> Integers:
    """Those that will run several times longer than their transfer takes.

    By the median. Without a prediction the most that they may generate counts: dropped is only what certainly ends too
    soon.
    """
    step_s = round_.group.step_s[round_.group.sequences.owner[rows]]
    worth = remaining_or_limit(round_, rows) * step_s >= round_.config.amortisation * round_.transfer_s(rows)
    round_.skip(rows[~worth], SequenceSkip.NOT_AMORTISED)
    return rows[worth]


def remaining_or_limit(round_: Round, rows: Integers) -> Integers:
    """The median of the remaining tokens; without a believed prediction, the most that these may generate."""
    known = round_.group.sequences
    return np.where(known.remaining[rows] == UNKNOWN, known.limit[rows], known.remaining[rows])


def by_request_id(round_: Round, rows: Integers) -> Integers:
    """In the order of request ids, so that the first of equals is the one of the lowest id."""
    return np.array(sorted(rows.tolist(), key=round_.group.sequences.name), dtype=np.int64)

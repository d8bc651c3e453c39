"""Swaps: two sequences change places where no single move helps.

When a few long sequences make up an instance's load, each may be larger than the gap to the others, and a move would
only turn the imbalance round. Moving a from s to d and b back weighs like one move of n = a - b. The only case in which
a round moves both from A to B and from B to A; the gain is that of both together.
"""

from __future__ import annotations

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.measure import Booleans
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.select import Worth, balancing, spread_drop
from starmesh.policy.rescheduling.steps import amortised, by_request_id, candidates, classify


def swap(round_: Round, worth: Worth) -> None:
    """Make the best swap of each overloaded instance, the most loaded first. Each instance takes part once at most."""
    classes = classify(round_)
    most = round_.config.shortlist
    for source in classes.overloaded[_idle(round_, classes.overloaded)][:most].tolist():
        others = classes.underloaded[_idle(round_, classes.underloaded)]
        others = others[others != source][:most]
        if len(others) == 0 or not _idle(round_, np.array([source]))[0]:
            continue
        best = _best(round_, worth, source, np.sort(others))
        if best is not None:
            there, back, target, drop = best
            gain = spread_drop(round_, drop)
            reason = balancing(round_)
            # Half of the gain each: neither helps alone.
            round_.move(there, target, reason, gain / 2)
            round_.move(back, source, reason, gain / 2)


def _idle(round_: Round, instances: Integers) -> Booleans:
    """Those that may send and receive, and have done neither lately."""
    ends = round_.ends
    idle: Booleans = (round_.targets() & ~ends.receives & (ends.sending_slots > 0))[instances]
    return idle


def _best(round_: Round, worth: Worth, source: int, others: Integers) -> tuple[int, int, int, float] | None:
    if round_.budget < 2:
        return None
    ours = by_request_id(round_, amortised(round_, candidates(round_, np.array([source]))))
    best: tuple[int, int, int, float] | None = None
    best_worth = 0.0
    for other in others.tolist():
        theirs = by_request_id(round_, amortised(round_, round_.screen(round_.group.rows_of(other), note=False)))
        if len(ours) == 0 or len(theirs) == 0:
            continue
        weights = round_.group.weights
        net = weights[ours][:, None, :] - weights[theirs][None, :, :]
        gap = round_.loads[source] - round_.loads[other]
        drops = -2.0 * (net * (net - gap)).sum(axis=2)
        values = drops * worth.price - worth.cost(ours)[:, None] - worth.cost(theirs)[None, :]
        # Both ends hold both sequences until the swap is done.
        fits = round_.fits(ours, np.array([other])) & round_.fits(theirs, np.array([source])).T
        values = np.where(fits, values, -np.inf)
        there, back = np.unravel_index(int(values.argmax()), values.shape)
        if values[there, back] > best_worth:
            best_worth = float(values[there, back])
            best = int(ours[there]), int(theirs[back]), other, float(drops[there, back])
    return best

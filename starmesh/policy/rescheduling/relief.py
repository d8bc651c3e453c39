"""Moves that are not for balance: everything away from a draining instance, and something away from one that is about
to run out of blocks.

Owns the choice of those moves. Both look for a target as balancing does: of those with room, the one whose load suffers
least.
"""

from __future__ import annotations

import numpy as np

from starmesh.policy.forecast import Integers, sample_steps, tokens_at
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.steps import by_request_id, candidates
from starmesh.types import MigrationReason


def drain(round_: Round) -> None:
    """Move the sequences of draining instances away, the longest first: they take longest, and are hardest to place."""
    group = round_.group
    # All that are measured are either ready or draining.
    for source in np.flatnonzero(~group.ready).tolist():
        rows = by_request_id(round_, round_.screen(group.rows_of(source), drain=True))
        for row in rows[np.argsort(-group.tokens[rows], kind="stable")].tolist():
            if round_.budget <= 0 or round_.ends.sending_slots[source] <= 0:
                round_.skip(np.array([row]), SequenceSkip.BUDGET)
                continue
            target = _place(round_, row, drain=True)
            if target is not None:
                round_.move(row, target, MigrationReason.DRAIN, float(group.tokens[row]))


def relieve(round_: Round) -> None:
    """Move sequences away from instances that would otherwise preempt, as far as predicted by the median: the upper
    quantile would raise the alarm for most full instances, and a needless move costs the target room."""
    group = round_.group
    counts = np.diff(group.first_row)
    held = np.bincount(group.owner, weights=group.tokens, minlength=len(group.ids))
    # No sequence grows by more than the horizon, and then to the end of a block.
    doubtful = (held + counts * (group.config.horizon_steps + group.layout.block_tokens) > group.capacity) & group.ready
    for source in np.flatnonzero(doubtful).tolist():
        _relieve(round_, source)


def _relieve(round_: Round, source: int) -> None:
    group = round_.group
    rows = group.rows_of(source)
    steps = sample_steps(group.config.horizon_steps, group.config.sample_count)
    staying = np.concatenate((rows[~round_.in_flight[rows]], round_.incoming_rows(source)))
    excess = _held(round_, staying, steps).sum(axis=0) - group.capacity[source]
    if excess.max() <= 0:
        return
    movable = by_request_id(round_, candidates(round_, np.array([source])))
    tokens = _held(round_, movable, steps)
    for _ in range(group.config.max_in_flight_per_source):
        if len(movable) == 0 or excess.max() <= 0:
            break
        # What each would spare; of equals the one with the least to move.
        spared = excess.max() - np.maximum((excess[None, :] - tokens).max(axis=1), 0)
        order = np.lexsort((np.arange(len(movable)), group.tokens[movable], -spared))
        for pick in order.tolist():
            row = int(movable[pick])
            target = _place(round_, row) if spared[pick] > 0 else None
            if target is not None and round_.ends.sending_slots[source] > 0 and round_.budget > 0:
                round_.move(row, target, MigrationReason.MEMORY, float(spared[pick]))
                excess = excess - tokens[pick]
                movable, tokens = np.delete(movable, pick), np.delete(tokens, pick, axis=0)
                break
        else:
            break


def _held(round_: Round, rows: Integers, steps: Integers) -> Integers:
    """Tokens in whole blocks that these are predicted to hold at each step, [rows, steps]."""
    group = round_.group
    block_tokens = group.layout.block_tokens
    return -(-tokens_at(group.tokens[rows], group.remaining[rows], steps) // block_tokens) * block_tokens


def _place(round_: Round, row: int, *, drain: bool = False) -> int | None:
    """The target with room whose load suffers least; None, with a reason, where there is none."""
    group = round_.group
    rows = np.array([row])
    targets = np.flatnonzero(round_.targets(drain=drain))
    targets = targets[targets != group.owner[row]]
    if len(targets) == 0:
        round_.skip(rows, SequenceSkip.NO_TARGET)
        return None
    targets = targets[round_.fits(rows, targets)[0]]
    if len(targets) == 0:
        round_.skip(rows, SequenceSkip.NO_ROOM)
        return None
    suffers = (round_.loads[targets] * group.weights[row]).sum(axis=1)
    return int(targets[int(suffers.argmin())])

"""Moves that are not for balance: everything away from a draining instance, and something away from one that is about
to run out of blocks.

Owns the choice of those moves. Both look for a target as balancing does: of those with room, the one whose load suffers
least.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from starmesh.policy.forecast import Integers, sample_steps, tokens_at
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Mover, Round
from starmesh.policy.rescheduling.steps import amortised, by_request_id, candidates, remaining_or_limit
from starmesh.types import MigrationReason


def drain(round_: Round) -> None:
    """Empty the draining instances: all that are measured are either ready or draining."""
    for source in np.flatnonzero(~round_.group.ready).tolist():
        empty(round_, source)


def empty(round_: Round, source: int) -> None:
    """Move everything away from an instance, first what it would have to decode longest for each token to copy: what
    the time does not suffice for is the least, and has the best chance to end by itself."""
    group = round_.group
    rows = by_request_id(round_, candidates(round_, np.array([source]), urgent=True))
    lasting = remaining_or_limit(round_, rows) / np.maximum(group.sequences.tokens[rows], 1)
    for row in rows[np.argsort(-lasting, kind="stable")].tolist():
        if round_.budget <= 0 or round_.ends.sending_slots[source] <= 0:
            round_.skip(np.array([row]), SequenceSkip.BUDGET)
            continue
        mover = round_.mover(row)
        target = _place(round_, mover, np.flatnonzero(round_.targets(urgent=True)))
        if target is not None:
            round_.move(mover, target, MigrationReason.DRAIN, float(group.sequences.tokens[row]))


def relieve(round_: Round) -> None:
    """Move sequences away from instances that would otherwise preempt, as far as predicted by the median: the upper
    quantile would raise the alarm for most full instances, and a needless move costs the target room."""
    group, most = round_.group, round_.config.shortlist
    counts = np.diff(group.sequences.first_row)
    held = np.bincount(group.sequences.owner, weights=group.sequences.tokens, minlength=len(group.ids))
    # No sequence grows by more than the horizon, and then to the end of a block.
    doubt = held + counts * (group.config.horizon_steps + group.layout.block_tokens) - group.capacity
    fullest = np.argsort(-doubt, kind="stable")
    for source in fullest[((doubt > 0) & group.ready)[fullest]][:most].tolist():
        unburden(round_, source, group.config.horizon_steps)


def unburden(
    round_: Round, source: int, steps: int, ranks: Mapping[str, int] | None = None, *, urgent: bool = False
) -> None:
    """Move the fewest sequences by which an instance holds the others over the next ``steps``; of those that spare
    alike the one of the lowest rank (by request id; one that is not in ``ranks`` comes last), then the one with the
    least to move. What fits has no reason to stay."""
    group = round_.group
    here, _ = group.sequences.of(np.array([source]))
    at = sample_steps(steps, group.config.sample_count)
    staying = np.concatenate((here[~round_.in_flight[here]], np.array(round_.incoming.get(source, []), dtype=np.int64)))
    excess = _held(round_, staying, at).sum(axis=0) - group.capacity[source]
    if excess.max() <= 0:
        return
    movable = by_request_id(round_, amortised(round_, candidates(round_, np.array([source]), urgent=urgent)))
    tokens = _held(round_, movable, at)
    known = ranks or {}
    while len(movable) > 0 and excess.max() > 0 and round_.ends.sending_slots[source] > 0 and round_.budget > 0:
        # What each would spare; no more counts than is needed.
        spared = excess.max() - np.maximum((excess[None, :] - tokens).max(axis=1), 0)
        rank = np.array([known.get(group.sequences.name(row), len(known)) for row in movable.tolist()])
        order = np.lexsort((np.arange(len(movable)), group.sequences.tokens[movable], rank, -spared))
        targets = _roomiest(round_, source)
        for pick in order[spared[order] > 0].tolist():
            mover = round_.mover(int(movable[pick]))
            target = _place(round_, mover, targets)
            if target is not None:
                round_.move(mover, target, MigrationReason.MEMORY, float(spared[pick]))
                excess = excess - tokens[pick]
                movable, tokens = np.delete(movable, pick), np.delete(tokens, pick, axis=0)
                break
        else:
            # Those that would spare something have found no place.
            round_.skip(movable, SequenceSkip.NO_GAIN)
            return
    if excess.max() > 0:
        round_.skip(movable, SequenceSkip.BUDGET)


def _held(round_: Round, rows: Integers, steps: Integers) -> Integers:
    """Tokens in whole blocks that these are predicted to hold at each step, [rows, steps]. Without a prediction a
    sequence grows up to its limit: for balance it counts as staying, but memory it will need."""
    block_tokens = round_.group.layout.block_tokens
    held = tokens_at(round_.group.sequences.tokens[rows], remaining_or_limit(round_, rows), steps)
    return -(-held // block_tokens) * block_tokens


def _roomiest(round_: Round, source: int) -> Integers:
    """The targets with the most tokens free now, a shortlist of them."""
    group = round_.group
    held = np.bincount(group.sequences.owner, weights=group.sequences.tokens, minlength=len(group.ids))
    free = np.argsort(held - group.capacity, kind="stable")
    targets: Integers = free[round_.targets()[free] & (free != source)]
    return targets[: round_.config.shortlist]


def _place(round_: Round, mover: Mover, targets: Integers) -> int | None:
    """Of these the target with room whose load suffers least; None, with a reason, where there is none."""
    most = round_.config.shortlist
    rows = np.array([mover.row])
    targets = np.sort(targets[targets != round_.group.sequences.owner[mover.row]])
    if len(targets) == 0:
        round_.skip(rows, SequenceSkip.NO_TARGET)
        return None
    suffers = round_.loads[targets] @ mover.weight
    targets = targets[np.argsort(suffers, kind="stable")]
    # Most find room at once: only for the others that of all targets is looked at.
    for some in (targets[:most], targets[most:]):
        fitting = some[round_.fits(rows, some)[0]]
        if len(fitting) > 0:
            return int(fitting[0])
    round_.skip(rows, SequenceSkip.NO_ROOM)
    return None

"""Llumnix's balancing: the least free instance gives its shortest sequence to the freest, and so on inwards.

Freeness is F = (M - V) / B: free memory M less what waiting sequences lack V, over the batch size B; that is for how
many steps the batch may grow until blocks run out (Llumnix, OSDI'24, section 4.4.2; in the published code the load
metric "remaining steps"). Ours counts tokens instead of blocks and takes what is dispatched but not reported as
waiting. As there: sources are those below a threshold, both sides are paired in order of freeness, the shortest running
sequence goes, and only if the target stays above the threshold and the gap shrinks without turning round. Predictions
play no part; a draining instance is handled by ``relief`` instead of by an infinitely large virtual sequence.
"""

from __future__ import annotations

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.measure import Floats
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.steps import by_request_id, candidates
from starmesh.types import MigrationReason


def pair_by_freeness(round_: Round) -> None:
    """One move for each pair of a short and a free instance, where it helps. Its gain is what the gap shrinks by."""
    group = round_.group
    free, batch = _free_tokens(round_)
    freeness = _freeness(free, batch)
    threshold = round_.config.freeness_threshold_blocks * group.layout.block_tokens
    short = (freeness < threshold) & group.ready
    order = np.argsort(freeness, kind="stable")
    sources = order[short[order]]
    roomy = (freeness > threshold) & round_.targets()
    targets = np.argsort(-freeness, kind="stable")
    targets = targets[roomy[targets]]
    for source, target in zip(sources.tolist(), targets.tolist(), strict=False):
        rows = by_request_id(round_, candidates(round_, np.array([source])))
        if len(rows) == 0:
            continue
        row = int(rows[int(group.sequences.tokens[rows].argmin())])
        tokens = int(group.sequences.tokens[row])
        before = float(freeness[target] - freeness[source])
        left = _freeness(free[[source]] + tokens, batch[[source]] - 1)[0]
        right = _freeness(free[[target]] - tokens, batch[[target]] + 1)[0]
        gain = before - float(right - left)
        if right < threshold or not 0 < right - left < before:
            round_.skip(rows, SequenceSkip.NO_GAIN)
        elif not round_.fits(np.array([row]), np.array([target]))[0, 0]:
            round_.skip(rows, SequenceSkip.NO_ROOM)
        else:
            round_.move(round_.mover(row), target, MigrationReason.LOAD, gain)
            round_.skip(rows[rows != row], SequenceSkip.BUDGET)
    round_.skip(candidates(round_, sources[len(targets) :]), SequenceSkip.NO_TARGET)


def _free_tokens(round_: Round) -> tuple[Floats, Integers]:
    """Tokens free beyond all that is there, waits, is reserved or on its way, and the batch size."""
    group, known = round_.group, round_.group.sequences
    count = len(group.ids)
    owner, tokens = known.owner[~round_.in_flight], known.tokens[~round_.in_flight]
    used: Floats = np.bincount(owner, weights=tokens, minlength=count).astype(np.float64)
    batch: Integers = np.bincount(owner, minlength=count).astype(np.int64)
    for target, rows in round_.incoming.items():
        used[target] += known.tokens[rows].sum()
        batch[target] += len(rows)
    free: Floats = group.capacity - used
    return free, batch


def _freeness(free: Floats, batch: Integers) -> Floats:
    """In tokens for each sequence; an idle instance's are all its tokens."""
    freeness: Floats = free / np.maximum(batch, 1)
    return freeness

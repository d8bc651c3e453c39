"""Load over the coming steps: what sequences hold now and will hold, as long as they are predicted to run.

Owns which estimates are believed and the arithmetic on arrays of sequences, exact in integers. Owns no instance and no
choice. Time counts decode steps
from now; a step adds one token to each running sequence. A sequence with c tokens and y remaining holds
n(t) = c + t for t <= y and nothing after; with y UNKNOWN it is taken to stay as it is, n(t) = c: so a cluster without
predictions is balanced by its current load.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from starmesh.sequence_loads import UNKNOWN

Integers = npt.NDArray[np.int64]


def believe(
    median: Integers, quantile: Integers, age: Integers, limit: Integers, *, max_age_tokens: int
) -> tuple[Integers, Integers]:
    """What sequences are taken to generate still, and what bounds that, both [sequences] and at most ``limit``.

    Not believed are estimates older than ``max_age_tokens``, and those that say that a running sequence has ended: a
    wrong 0 would hide its whole load. Then the first is UNKNOWN and the bound is the limit, since memory must hold
    whatever may come.
    """
    believed = (median > 0) & (age <= max_age_tokens)
    remaining = np.where(believed, np.minimum(median, limit), UNKNOWN)
    upper = np.where(believed & (quantile > 0), np.minimum(np.maximum(quantile, median), limit), limit)
    return remaining, upper


def token_steps(tokens: Integers, remaining: Integers, horizon: int) -> Integers:
    """The sum of n(t) over t = 0..horizon, [sequences]; divided by horizon + 1 it is the mean load.

    With m = min(horizon, y) that is (m+1)c + m(m+1)/2: our form of what STAR calls a
    request's load over time.
    """
    last = np.minimum(remaining, horizon)
    ends = (last + 1) * tokens + last * (last + 1) // 2
    return np.where(remaining == UNKNOWN, (horizon + 1) * tokens, ends)


def sample_steps(horizon: int, count: int) -> Integers:
    """Up to ``count`` evenly spaced steps from 0 to ``horizon``, both included."""
    return np.unique(np.linspace(0, horizon, min(count, horizon + 1)).round().astype(np.int64))


def tokens_at(tokens: Integers, remaining: Integers, steps: Integers) -> Integers:
    """n(t) at each of ``steps``, [sequences, steps]."""
    known = (remaining != UNKNOWN)[:, None]
    held: Integers = tokens[:, None] + steps * known
    held *= (steps <= remaining[:, None]) | ~known
    return held


def sum_at(tokens: Integers, remaining: Integers, steps: Integers, owner: Integers, count: int) -> Integers:
    """``tokens_at`` summed over the sequences of each of ``count`` owners, [owners, steps].

    Sequences that run through the same steps grow alike: they are summed first, and then over what outlasts each step.
    Exact below 2**53 tokens an owner.
    """
    known = remaining != UNKNOWN
    lasts = np.where(known, np.count_nonzero(remaining >= steps[:, None], axis=0), len(steps))
    width = len(steps) + 1
    key = owner * width + lasts
    held = np.bincount(key, weights=tokens, minlength=count * width).reshape(count, width)
    growing = np.bincount(key, weights=known, minlength=count * width).reshape(count, width)
    # Column k sums those that run through exactly the first k steps.
    held, growing = (part[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] for part in (held, growing))
    return (held + growing * steps).astype(np.int64)


def bin_edges(horizon: int, count: int) -> tuple[Integers, Integers]:
    """The first and last step of up to ``count`` bins that together are 0..horizon."""
    edges = np.arange(min(count, horizon + 1) + 1) * (horizon + 1) // min(count, horizon + 1)
    return edges[:-1], edges[1:] - 1


def peak_tokens(tokens: Integers, upper: Integers, bins: tuple[Integers, Integers], block_tokens: int) -> Integers:
    """The most tokens that each sequence holds within each bin, in whole blocks, [sequences, bins].

    ``upper`` bounds its remaining tokens. A sum over sequences is at least the true peak of the bin: sequences count
    as at their longest together, and one that ends within the bin counts until its end. (After LightLLM's future peak
    of KV use, which is exact but must be sorted anew for each candidate.)
    """
    first, last = bins
    upper = upper[:, None]
    held = np.where(first <= upper, tokens[:, None] + np.minimum(upper, last), 0)
    return -(-held // block_tokens) * block_tokens

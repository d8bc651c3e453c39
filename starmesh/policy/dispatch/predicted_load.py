"""The decode instance that is least loaded while the request is predicted to stay.

Our idea; of STAR's dispatch we know that it uses input length, initial prediction and current load. Instances are
measured as a round of rescheduling measures them (``rescheduling.measure``), but each report is read once
(``outlook``): running sequences by their estimates, those without one and what is reserved as staying as they are.
Compared are the mean loads over the steps until the request's own median, among the instances whose blocks hold it and
all others by their upper quantiles; where none do, the one that lacks least is taken. Without any estimate, and with
memory enough, that is ``least_tokens``.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from starmesh.policy.dispatch.candidates import Candidate
from starmesh.policy.dispatch.decision import DispatchConfig, DispatchMemory, DispatchRequest
from starmesh.policy.dispatch.outlook import Outlook
from starmesh.policy.forecast import Integers, believe, bin_edges, peak_tokens, token_steps
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.sequence_loads import UNKNOWN

# Most often one of the least loaded has room: only for the others that of all is looked at.
_FIRST_LOOK = 8
_MEMORY_BINS = ReschedulingConfig().memory_bins


def pick_by_predicted_load(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    """The one that lacks fewest tokens at the worst, then the one of the least mean load; of equals the one that the
    request has a place on already, then the lowest id. The memory is one of ``predicted_peak.read_reports``."""
    if len(candidates) == 1:
        return candidates[0]
    horizon_steps, upper = _outlook(request, config)
    alike: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        layout = candidate.instance.info.layout
        assert layout is not None
        alike[layout.block_tokens].append(candidate)
    best: list[tuple[int, int, bool, str, Candidate]] = []
    for block_tokens, members in alike.items():
        outlooks = [memory.outlooks[member.instance_id] for member in members]
        reserved = np.array([member.reserved_tokens for member in members], dtype=np.int64)
        loads = _loads(outlooks, horizon_steps) + (horizon_steps + 1) * reserved
        elsewhere = np.array([member.instance_id != request.placed_id for member in members])
        # Members are ordered by id and the sort is stable: ties by id.
        order = np.lexsort((elsewhere, loads))
        bins = bin_edges(horizon_steps, _MEMORY_BINS)
        own = peak_tokens(np.array([request.need.tokens]), np.array([upper]), bins, block_tokens)
        for some in (order[:_FIRST_LOOK], order[_FIRST_LOOK:]):
            needed = _needed_tokens([outlooks[row] for row in some], bins, block_tokens) + own
            capacity = np.array([outlooks[row].blocks * block_tokens for row in some], dtype=np.int64) - reserved[some]
            lacking = (needed.max(axis=1) - capacity).clip(min=0)
            for row, lacks in zip(some.tolist(), lacking.tolist(), strict=True):
                member = members[row]
                best.append((lacks, int(loads[row]), bool(elsewhere[row]), member.instance_id, member))
            if not lacking.all():
                break
    return min(best, key=lambda rated: rated[:4])[-1]


def _outlook(request: DispatchRequest, config: DispatchConfig) -> tuple[int, int]:
    """For how many steps the request is taken to stay, and how many tokens it may add at most."""
    limit, estimate = request.need.remaining_output_tokens, request.estimate
    steps, upper = config.horizon_steps, limit
    if estimate is not None:
        foreseen = (estimate.remaining_tokens, estimate.remaining_tokens_upper, 0, limit)
        columns = (np.array([count], dtype=np.int64) for count in foreseen)
        median, bound = believe(*columns, max_age_tokens=config.max_prediction_age_tokens)
        upper = int(bound[0])
        if median[0] != UNKNOWN:
            steps = min(max(int(median[0]), config.min_horizon_steps), config.max_horizon_steps)
    return min(steps, limit), upper


def _loads(outlooks: list[Outlook], horizon_steps: int) -> Integers:
    """What the sequences of each hold over the steps of the horizon, summed, [outlooks]; exact."""
    tokens = np.concatenate([outlook.tokens for outlook in outlooks])
    believed = np.concatenate([outlook.believed for outlook in outlooks])
    return _sums(token_steps(tokens, believed, horizon_steps), outlooks)


def _needed_tokens(outlooks: list[Outlook], bins: tuple[Integers, Integers], block_tokens: int) -> Integers:
    """What the sequences of each may hold at most in each bin of the horizon, [outlooks, bins]."""
    if not outlooks:
        return np.zeros((0, len(bins[0])), dtype=np.int64)
    tokens = np.concatenate([outlook.tokens for outlook in outlooks])
    upper = np.concatenate([outlook.upper for outlook in outlooks])
    return _sums(peak_tokens(tokens, upper, bins, block_tokens), outlooks)


def _sums(values: Integers, outlooks: list[Outlook]) -> Integers:
    """Of [sequences, ...] over those of each, [outlooks, ...]."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]), dtype=np.int64)
    np.cumsum(values, axis=0, out=sums[1:])
    found: Integers = np.diff(sums[np.cumsum([0, *(len(outlook.tokens) for outlook in outlooks)])], axis=0)
    return found

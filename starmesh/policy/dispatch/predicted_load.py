"""The decode instance that is least loaded while the request is predicted to stay.

Our idea; of STAR's dispatch we know that it uses input length, initial prediction and current load. Instances are
measured as a round of rescheduling measures them (``rescheduling.measure``): running sequences by their estimates,
those without one and what is reserved as staying as they are. Compared are the mean loads over the steps until the
request's own median, among the instances whose blocks hold it and all others by their upper quantiles; where none do,
the one that lacks least is taken. Without any estimate, and with memory enough, that is ``least_tokens``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from starmesh.policy.dispatch.candidates import Candidate
from starmesh.policy.dispatch.decision import DispatchConfig, DispatchMemory, DispatchRequest
from starmesh.policy.forecast import Integers, believe, peak_tokens
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import Group, measure
from starmesh.policy.rescheduling.sequences import Foresight
from starmesh.sequence_loads import UNKNOWN
from starmesh.types import InstanceLoad, InstanceView, KvLayout

# Most often one of the least loaded has room: only for the others that of all is looked at.
_FIRST_LOOK = 8


def pick_by_predicted_load(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    """The one that lacks fewest tokens at the worst, then the one of the least mean load; of equals the one that the
    request has a place on already, then the lowest id."""
    if len(candidates) == 1:
        return candidates[0]
    horizon_steps, upper = _outlook(request, config)
    measuring = ReschedulingConfig(
        horizon_steps=horizon_steps,
        watermark=config.admission.watermark,
        max_prediction_age_tokens=config.max_prediction_age_tokens,
    )
    alike: dict[KvLayout, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        layout = candidate.instance.info.layout
        assert layout is not None
        alike[layout].append(candidate)
    best: list[tuple[int, int, bool, str, Candidate]] = []
    for layout, members in alike.items():
        group = measure(tuple(_reported(member.instance, layout) for member in members), measuring, Foresight.MEAN)
        loads = group.loads[:, 0]
        elsewhere = np.array([member.instance_id != request.placed_id for member in members])
        # Members are ordered by id and the sort is stable: ties by id.
        order = np.lexsort((elsewhere, loads))
        for some in (order[:_FIRST_LOOK], order[_FIRST_LOOK:]):
            lacking = _lacking_tokens(group, some, request.need.tokens, upper)
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


def _reported(instance: InstanceView, layout: KvLayout) -> InstanceView:
    """The instance; one that has not reported yet with the room that admission takes it to have."""
    if instance.load is not None:
        return instance
    blocks = instance.info.max_sequence_tokens // layout.block_tokens
    return dataclasses.replace(instance, load=InstanceLoad(total_blocks=blocks, free_blocks=blocks))


def _lacking_tokens(group: Group, instances: Integers, tokens: int, upper: int) -> Integers:
    """How many tokens each of these may lack at the worst if it takes a sequence of ``tokens`` that may grow by
    ``upper``, [instances]; 0 where all fits throughout the horizon."""
    rows, begins = group.sequences.of(instances)
    held = np.zeros((len(rows) + 1, len(group.bins[0])), dtype=np.int64)
    np.cumsum(group.peaks(rows), axis=0, out=held[1:])
    own = peak_tokens(np.array([tokens]), np.array([upper]), group.bins, group.layout.block_tokens)
    needed = held[np.append(begins[1:], len(rows))] - held[begins] + own
    lacking: Integers = (needed.max(axis=1) - group.capacity[instances]).clip(min=0)
    return lacking

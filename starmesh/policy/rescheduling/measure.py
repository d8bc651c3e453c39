"""Measure: the instances of a view as arrays, one set for each group of instances that exchange KV.

Owns which instances count, which estimates are believed, and what sequences weigh. Owns no choice. Arrays of instances
are ordered by id; those of sequences are in the reports' order, on which nothing may depend.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from starmesh.policy.forecast import UNKNOWN, Integers, bin_edges, peak_tokens, sample_steps, token_steps, tokens_at
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.memory import PlanMemory
from starmesh.policy.rescheduling.outcome import InstanceSkip, SkippedInstance
from starmesh.types import ClusterView, InstanceLoad, InstanceState, InstanceView, KvLayout, Role, SequenceLoad

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
_ENDLESS = 2**53
_Number = TypeVar("_Number", np.int64, np.float64)


class Foresight(Enum):
    """How far a policy looks when it compares loads."""

    NOW = "now"
    """Tokens held now; predictions are not used."""
    MEAN = "mean"
    """The mean over the horizon: STAR's load over time as one number."""
    RESOLVED = "resolved"
    """Each of several points of the horizon, and a sequence's own share of a step beside its tokens'."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Instances of one layout, arrays [instances]; and their sequences, arrays [sequences].

    ``weights`` [sequences, samples] is what a sequence adds to its instance's load, ``loads`` [instances, samples] the
    sum with what is reserved; both are whole numbers, ``scale`` times tokens. ``tokens`` are prompt and output.
    ``remaining`` is UNKNOWN without a believed prediction; ``upper`` always bounds it: without one, the sequence's own
    limit does, since memory must hold whatever may come. ``first_row`` [instances + 1] delimits the instances' rows.
    """

    config: ReschedulingConfig
    layout: KvLayout
    instances: tuple[InstanceView, ...]
    ids: tuple[str, ...]
    index: dict[str, int]
    sequences: list[SequenceLoad]
    request_ids: list[str]
    first_row: Integers
    owner: Integers
    tokens: Integers
    decoding: Booleans
    remaining: Integers
    upper: Integers
    limit: Integers
    weights: Floats
    loads: Floats
    scale: int
    ready: Booleans
    capacity: Integers
    longest: Integers
    sequences_at: Integers
    step_s: Floats

    def peaks(self, rows: Integers) -> Integers:
        """What these sequences may hold at most in each bin of the horizon, [rows, bins]."""
        bins = bin_edges(self.config.horizon_steps, self.config.memory_bins)
        return peak_tokens(self.tokens[rows], self.upper[rows], bins, self.layout.block_tokens)

    def rows_of(self, instance: int) -> Integers:
        """The sequences that an instance reports."""
        return np.arange(self.first_row[instance], self.first_row[instance + 1])

    @property
    def predicted(self) -> bool:
        """Whether there is any believed prediction."""
        return bool((self.remaining != UNKNOWN).any())


def usable_instances(
    view: ClusterView, config: ReschedulingConfig
) -> tuple[tuple[tuple[InstanceView, ...], ...], tuple[SkippedInstance, ...]]:
    """The decode instances that can be measured, grouped by layout, and why the others cannot. All ordered by id."""
    groups: dict[KvLayout, list[InstanceView]] = {}
    skipped: list[SkippedInstance] = []
    for instance in sorted(view.of_role(Role.DECODE), key=lambda found: found.info.instance_id):
        reason = _instance_skip(instance, view.now_s, config)
        if reason is not None:
            skipped.append(SkippedInstance(instance.info.instance_id, reason))
        elif instance.info.layout is not None:
            groups.setdefault(instance.info.layout, []).append(instance)
    movable: list[tuple[InstanceView, ...]] = []
    for members in groups.values():
        ready = sum(member.info.state is InstanceState.READY for member in members)
        if ready == 0 or len(members) == 1:
            skipped += [SkippedInstance(member.info.instance_id, InstanceSkip.ALONE) for member in members]
        else:
            movable.append(tuple(members))
    return tuple(movable), tuple(sorted(skipped, key=lambda skip: skip.instance_id))


def _instance_skip(instance: InstanceView, now_s: float, config: ReschedulingConfig) -> InstanceSkip | None:
    if instance.info.state is InstanceState.DRAINED:
        return InstanceSkip.DRAINED
    if instance.load is None:
        return InstanceSkip.NO_REPORT
    if now_s - instance.reported_at_s > config.stale_after_s:
        return InstanceSkip.STALE
    return InstanceSkip.NO_LAYOUT if instance.info.layout is None else None


def reported_owners(groups: Iterable[tuple[InstanceView, ...]], memory: PlanMemory) -> dict[str, tuple[int, str]]:
    """Of the sequences in flight the newest epoch that is reported, and by which instance."""
    watched = {entry.migration.request_id for entry in memory.in_flight}
    owners: dict[str, tuple[int, str]] = {}
    for instance in chain.from_iterable(groups) if watched else ():
        for sequence in _load(instance).sequences:
            if sequence.request_id in watched:
                known = owners.get(sequence.request_id, (0, ""))
                owners[sequence.request_id] = max(known, (sequence.epoch, instance.info.instance_id))
    return owners


def measure(instances: tuple[InstanceView, ...], config: ReschedulingConfig, foresight: Foresight) -> Group:
    """The arrays of a group of instances, all reported, of one layout and ordered by id."""
    loads = [_load(instance) for instance in instances]
    layout = instances[0].info.layout
    assert layout is not None
    sequences = list(chain.from_iterable(load.sequences for load in loads))
    counts = np.array([len(load.sequences) for load in loads], dtype=np.int64)
    first_row = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(instances)), counts)
    output = _column([known.output_tokens for known in sequences])
    tokens = _column([known.prompt_tokens for known in sequences]) + output
    resident = _column([known.resident_tokens for known in sequences])
    most = _column([known.max_output_tokens for known in sequences])
    longest = np.array([instance.info.max_sequence_tokens or _ENDLESS for instance in instances], dtype=np.int64)
    limit = np.minimum(most - output, longest[owner] - tokens).clip(min=0)
    remaining, upper = _estimates(sequences, limit, config, foresight)
    reserved = np.array([instance.reserved_tokens for instance in instances], dtype=np.int64)
    weights, steps = _weights(tokens, remaining, config, foresight)
    at = np.array([load.running_sequences + load.waiting_sequences for load in loads], dtype=np.int64)
    at = np.maximum(at, counts) + np.array([len(instance.reservations) for instance in instances])
    return Group(
        config=config,
        layout=layout,
        instances=instances,
        ids=tuple(instance.info.instance_id for instance in instances),
        index={instance.info.instance_id: row for row, instance in enumerate(instances)},
        sequences=sequences,
        request_ids=[sequence.request_id for sequence in sequences],
        first_row=first_row,
        owner=owner,
        tokens=tokens,
        # All but the last token, which the next step computes.
        decoding=(output > 0) & (resident >= tokens - 1),
        remaining=remaining,
        upper=upper,
        limit=limit,
        weights=weights,
        # What is dispatched but not reported yet counts as staying: nothing is known of its length.
        loads=_sum_rows(weights, first_row) + (steps * reserved)[:, None],
        scale=steps,
        ready=np.array([instance.info.state is InstanceState.READY for instance in instances]),
        capacity=_capacity(loads, layout, resident, first_row, config) - reserved,
        longest=longest,
        sequences_at=at,
        step_s=np.array([load.step_duration_s or _step_s(load, config) for load in loads]),
    )


def _estimates(
    sequences: list[SequenceLoad], limit: Integers, config: ReschedulingConfig, foresight: Foresight
) -> tuple[Integers, Integers]:
    """Median (or UNKNOWN) and upper bound of the remaining tokens. Not believed are old predictions, and those that say
    that a running sequence has ended: a wrong 0 would hide its whole load."""
    unknown = np.full(len(sequences), UNKNOWN, dtype=np.int64)
    if foresight is Foresight.NOW:
        return unknown, limit
    median = _optional_column([known.remaining_tokens for known in sequences])
    age = _optional_column([known.prediction_age_tokens for known in sequences])
    believed = (median > 0) & (age <= config.max_prediction_age_tokens)
    if not believed.any():
        return unknown, limit
    quantile = _optional_column([known.remaining_tokens_upper for known in sequences])
    remaining = np.where(believed, np.minimum(median, limit), UNKNOWN)
    bounded = believed & (quantile > 0)
    return remaining, np.where(bounded, np.minimum(np.maximum(quantile, median), limit), limit)


def _weights(
    tokens: Integers, remaining: Integers, config: ReschedulingConfig, foresight: Foresight
) -> tuple[Floats, int]:
    """What each sequence weighs, and the scale. Whole numbers in floats: sums of them are exact below 2**53, so that no
    order of instances or sequences shows in the last bit."""
    if foresight is Foresight.NOW:
        return tokens[:, None].astype(np.float64), 1
    if foresight is Foresight.MEAN:
        summed = token_steps(tokens, remaining, config.horizon_steps)
        return summed[:, None].astype(np.float64), config.horizon_steps + 1
    steps = sample_steps(config.horizon_steps, config.sample_count)
    held = tokens_at(tokens, remaining, steps)
    return np.where(held > 0, held + config.cost.sequence_tokens, 0).astype(np.float64), 1


def _capacity(
    loads: list[InstanceLoad], layout: KvLayout, resident: Integers, first_row: Integers, config: ReschedulingConfig
) -> Integers:
    """Tokens for sequences: all blocks but the watermark and those held for others, pullers and arriving sequences."""
    total = np.array([load.total_blocks for load in loads], dtype=np.int64)
    used = total - np.array([load.free_blocks for load in loads], dtype=np.int64)
    own = _sum_rows(-(-resident // layout.block_tokens), first_row)
    usable = np.floor(total * (1 - config.watermark)).astype(np.int64)
    capacity: Integers = (usable - np.maximum(used - own, 0)) * layout.block_tokens
    return capacity


def _step_s(load: InstanceLoad, config: ReschedulingConfig) -> float:
    return config.cost.step_s(load.running_sequences, load.resident_tokens)


def _load(instance: InstanceView) -> InstanceLoad:
    assert instance.load is not None
    return instance.load


def _column(values: list[int]) -> Integers:
    return np.fromiter(values, dtype=np.int64, count=len(values))


def _optional_column(values: list[int | None]) -> Integers:
    """None as UNKNOWN."""
    return _column([UNKNOWN if value is None else value for value in values])


def _sum_rows(values: npt.NDArray[_Number], first_row: Integers) -> npt.NDArray[_Number]:
    """Sums of an instance's rows, 0 for those without any."""
    sums = np.zeros((len(first_row) - 1, *values.shape[1:]), dtype=values.dtype)
    filled = first_row[1:] > first_row[:-1]
    if filled.any():
        # The sum from each start to the next one: instances without rows lie between at no cost.
        sums[filled] = np.add.reduceat(values, first_row[:-1][filled], axis=0)
    return sums

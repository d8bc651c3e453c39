"""Measure: the instances of a view as arrays, one set for each group of instances that exchange KV.

Owns which instances count and what sequences weigh. Owns no choice. Arrays of instances are ordered by id.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from starmesh.policy.forecast import (
    Integers,
    bin_edges,
    peak_tokens,
    sample_steps,
    sum_at,
    token_steps,
    tokens_at,
)
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.outcome import InstanceSkip, SkippedInstance
from starmesh.policy.rescheduling.sequences import Booleans, Foresight, Sequences, read_sequences
from starmesh.sequence_loads import UNKNOWN
from starmesh.types import ClusterView, InstanceLoad, InstanceState, InstanceView, KvLayout, Role

Floats = npt.NDArray[np.float64]
_ENDLESS = 2**53
_load_counts = attrgetter(
    "total_blocks",
    "free_blocks",
    "running_sequences",
    "waiting_sequences",
    "incoming_migrations",
    "outgoing_migrations",
)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Instances of one layout, arrays [instances], and their sequences.

    ``loads`` [instances, samples] sums what the sequences weigh and what is reserved; whole numbers, ``scale`` times
    tokens, so that no order of instances or sequences shows in a last bit. ``capacity`` is in tokens, ``incoming`` and
    ``outgoing`` are the migrations that they report. ``steps`` [samples] and ``bins`` are where loads and memory are
    looked at.
    """

    config: ReschedulingConfig
    foresight: Foresight
    layout: KvLayout
    steps: Integers
    bins: tuple[Integers, Integers]
    ids: tuple[str, ...]
    index: dict[str, int]
    sequences: Sequences
    loads: Integers
    scale: int
    ready: Booleans
    waiting: Integers
    reserved: Integers
    capacity: Integers
    longest: Integers
    free_places: Integers
    incoming: Integers
    outgoing: Integers
    step_s: Floats

    def weights(self, rows: Integers) -> Integers:
        """What each of these adds to its instance's load, [rows, samples]."""
        tokens, remaining = self.sequences.tokens[rows], self.sequences.remaining[rows]
        if self.foresight is Foresight.RESOLVED:
            return tokens_at(tokens + self.config.cost.sequence_tokens, remaining, self.steps)
        return _weight(tokens, remaining, self.config, self.foresight)[:, None]

    def peaks(self, rows: Integers) -> Integers:
        """What these sequences may hold at most in each bin of the horizon, [rows, bins]."""
        known = self.sequences
        return peak_tokens(known.tokens[rows], known.upper[rows], self.bins, self.layout.block_tokens)

    @property
    def predicted(self) -> bool:
        """Whether the end of any sequence is foreseen."""
        return bool((self.sequences.remaining != UNKNOWN).any())


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


def reported_owners(groups: list[Group], remembered: list[list[int]]) -> dict[str, tuple[int, str]]:
    """Of the sequences in the rows that are remembered of each group, the newest epoch that is reported and by which
    instance, by request id."""
    owners: dict[str, tuple[int, str]] = {}
    for group, rows in zip(groups, remembered, strict=True):
        known = group.sequences
        for row in rows:
            reported = int(known.epochs[row]), group.ids[known.owner[row]]
            name = known.name(row)
            owners[name] = max(owners.get(name, (0, "")), reported)
    return owners


def measure(instances: tuple[InstanceView, ...], config: ReschedulingConfig, foresight: Foresight) -> Group:
    """The arrays of a group of instances, all reported, of one layout and ordered by id."""
    loads = [_load(instance) for instance in instances]
    layout = instances[0].info.layout
    assert layout is not None
    total, free, running, waiting, incoming, outgoing = np.array(
        [_load_counts(load) for load in loads], dtype=np.int64
    ).T
    longest = np.array([instance.info.max_sequence_tokens or _ENDLESS for instance in instances], dtype=np.int64)
    places = np.array([instance.info.max_sequences or _ENDLESS for instance in instances], dtype=np.int64)
    reserving = np.array([len(instance.reservations) for instance in instances], dtype=np.int64)
    reserved = np.array(
        [instance.reserved_tokens if instance.reservations else 0 for instance in instances], dtype=np.int64
    )
    sequences = read_sequences(loads, longest, config, foresight)
    own_blocks = _sum_rows(-(-sequences.resident // layout.block_tokens), sequences.first_row)
    # All blocks but the watermark and those held for others, pullers and arriving sequences.
    usable = np.floor(total * (1 - config.watermark)).astype(np.int64) - np.maximum(total - free - own_blocks, 0)
    steps = sample_steps(config.horizon_steps, config.sample_count)
    horizons = config.memory_horizons if foresight is Foresight.RESOLVED else 1
    scale = config.horizon_steps + 1 if foresight is Foresight.MEAN else 1
    return Group(
        config=config,
        foresight=foresight,
        layout=layout,
        steps=steps,
        bins=bin_edges(config.horizon_steps * horizons, config.memory_bins),
        ids=tuple(instance.info.instance_id for instance in instances),
        index={instance.info.instance_id: row for row, instance in enumerate(instances)},
        sequences=sequences,
        # What is dispatched but not reported yet counts as staying: nothing is known of its length.
        loads=_loads(sequences, steps, config, foresight) + (scale * reserved)[:, None],
        scale=scale,
        ready=np.array([instance.info.state is InstanceState.READY for instance in instances], dtype=np.bool_),
        waiting=waiting,
        reserved=reserved,
        capacity=usable * layout.block_tokens - reserved,
        longest=longest,
        free_places=places - np.maximum(running + waiting, np.diff(sequences.first_row)) - reserving,
        incoming=incoming,
        outgoing=outgoing,
        step_s=np.array(
            [load.step_duration_s or config.cost.step_s(load.running_sequences, load.resident_tokens) for load in loads]
        ),
    )


def _loads(sequences: Sequences, steps: Integers, config: ReschedulingConfig, foresight: Foresight) -> Integers:
    """The sum of ``Group.weights`` for each instance, [instances, samples]."""
    if foresight is Foresight.RESOLVED:
        weighed = sequences.tokens + config.cost.sequence_tokens
        return sum_at(weighed, sequences.remaining, steps, sequences.owner, len(sequences.names))
    return _sum_rows(_weight(sequences.tokens, sequences.remaining, config, foresight), sequences.first_row)[:, None]


def _weight(tokens: Integers, remaining: Integers, config: ReschedulingConfig, foresight: Foresight) -> Integers:
    """The weights of those that compare by one number."""
    return token_steps(tokens, remaining, config.horizon_steps) if foresight is Foresight.MEAN else tokens


def _load(instance: InstanceView) -> InstanceLoad:
    assert instance.load is not None
    return instance.load


def _sum_rows(values: Integers, first_row: Integers) -> Integers:
    """Sums of an instance's rows, 0 for those without any."""
    sums = np.concatenate(([0], np.cumsum(values)))
    return np.diff(sums[first_row])

"""What the sequences of a decode instance are taken to become, read from one report.

Owns the reading and that each report is read once: a router asks at each dispatch, and reports are rarer. Owns no
choice (``predicted_peak``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.peak import taken_remaining
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import InstanceLoad, InstanceView, KvLayout

_ENDLESS = 2**53


@dataclass(frozen=True, slots=True)
class Reading:
    """How a report is read: ``caution`` and ``max_age_tokens`` as in ``peak.taken_remaining``, and the part of the
    blocks that is kept free."""

    caution: float
    max_age_tokens: int
    watermark: float


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """The sequences that ``load`` reports, as ``reading`` takes them: ``tokens`` that each has and how many it is taken
    to generate still, [sequences], and ``blocks`` that all of them may have together."""

    load: InstanceLoad | None
    reading: Reading
    tokens: Integers
    remaining: Integers
    blocks: int


def outlooks_of(
    instances: Iterable[InstanceView], known: Mapping[str, Outlook], reading: Reading
) -> dict[str, Outlook]:
    """The outlook of each instance by id; those that ``known`` has of the same report are taken from there."""
    found: dict[str, Outlook] = {}
    for instance in instances:
        instance_id = instance.info.instance_id
        outlook = known.get(instance_id)
        if outlook is None or outlook.load is not instance.load or outlook.reading != reading:
            outlook = _read(instance, reading)
        found[instance_id] = outlook
    return found


def _read(instance: InstanceView, reading: Reading) -> Outlook:
    load, layout = instance.load, instance.info.layout
    assert layout is not None
    if load is None:
        # As admission has it: nothing else is known of an instance that has not reported yet.
        nothing = np.zeros(0, dtype=np.int64)
        blocks = _below(reading, instance.info.max_sequence_tokens // layout.block_tokens)
        return Outlook(None, reading, nothing, nothing, blocks)
    _, prompt, output, resident, most, median, quantile, age = (
        np.frombuffer(column, dtype=np.int64) for column in SequenceLoads.of(load.sequences).columns
    )
    tokens = prompt + output
    limit = np.minimum(most - output, (instance.info.max_sequence_tokens or _ENDLESS) - tokens).clip(min=0)
    return Outlook(
        load=load,
        reading=reading,
        tokens=tokens,
        remaining=taken_remaining(
            output, median, quantile, age, limit, caution=reading.caution, max_age_tokens=reading.max_age_tokens
        ),
        blocks=_below(reading, load.total_blocks) - _held_for_others(load, resident, layout),
    )


def _below(reading: Reading, blocks: int) -> int:
    return int(blocks * (1 - reading.watermark))


def _held_for_others(load: InstanceLoad, resident: Integers, layout: KvLayout) -> int:
    """Blocks of pullers and of sequences that arrive."""
    own = int((-(-resident // layout.block_tokens)).sum())
    return max(load.total_blocks - load.free_blocks - own, 0)

"""What the sequences of a decode instance are taken to become, read from one report.

Owns the reading and that each report is read once: a router asks at each dispatch, and reports are rarer. Owns no
choice (``predicted_load``, ``predicted_peak``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from starmesh.policy.forecast import Integers, believe
from starmesh.policy.peak import taken_remaining
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import InstanceLoad, InstanceView

_ENDLESS = 2**53


class Reading(NamedTuple):
    """How a report is read: ``caution`` and ``max_age_tokens`` as in ``peak.taken_remaining``, and the part of the
    blocks that is kept free."""

    caution: float
    max_age_tokens: int
    watermark: float


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """The sequences that ``load`` reports, as ``reading`` takes them, arrays [sequences]: ``tokens`` that each has and
    how many it is ``taken`` to generate still; that as far as it is ``believed``, else UNKNOWN, and ``upper``, which
    bounds it (``forecast.believe``). All of them may have ``blocks`` together."""

    load: InstanceLoad | None
    reading: Reading
    tokens: Integers
    taken: Integers
    believed: Integers
    upper: Integers
    blocks: int


def outlooks_of(
    instances: Iterable[InstanceView], known: Mapping[str, Outlook], reading: Reading
) -> dict[str, Outlook]:
    """The outlook of each instance by id; those that ``known`` has of the same report are taken from there."""
    found: dict[str, Outlook] = {}
    news: list[InstanceView] = []
    for instance in instances:
        instance_id = instance.info.instance_id
        outlook = known.get(instance_id)
        load = instance.load
        # Without a report nothing says whether it is still the same process.
        if load is not None and outlook is not None and outlook.load is load and outlook.reading == reading:
            found[instance_id] = outlook
        else:
            news.append(instance)
    if news:
        found.update(zip((instance.info.instance_id for instance in news), _read(news, reading), strict=True))
    return found


def _read(instances: list[InstanceView], reading: Reading) -> Iterator[Outlook]:
    """Together: most reports are new at once, and many small arrays take longer than a large one."""
    sizes = [_block_tokens(instance) for instance in instances]
    loads = [instance.load or _unreported(instance, size) for instance, size in zip(instances, sizes, strict=True)]
    reports = [SequenceLoads.of(load.sequences) for load in loads]
    _, prompt, output, resident, most, median, quantile, age = (
        np.frombuffer(b"".join(column), dtype=np.int64)
        for column in zip(*(report.columns for report in reports), strict=True)
    )
    counts = [len(report) for report in reports]
    ends = list(accumulate(counts, initial=0))
    tokens = prompt + output
    longest = np.repeat([instance.info.max_sequence_tokens or _ENDLESS for instance in instances], counts)
    limit = np.minimum(most - output, longest - tokens).clip(min=0)
    max_age_tokens = reading.max_age_tokens
    taken = taken_remaining(
        output, median, quantile, age, limit, caution=reading.caution, max_age_tokens=max_age_tokens
    )
    believed, upper = believe(median, quantile, age, limit, max_age_tokens=max_age_tokens)
    own = np.concatenate(([0], np.cumsum(-(-resident // np.repeat(sizes, counts)))))
    own_blocks = np.diff(own[ends]).tolist()
    for instance, load, blocks, (begin, end) in zip(instances, loads, own_blocks, pairwise(ends), strict=True):
        here = slice(begin, end)
        yield Outlook(
            load=instance.load,
            reading=reading,
            # Copies: the last of these instances to report again would keep the arrays of all.
            tokens=tokens[here].copy(),
            taken=taken[here].copy(),
            believed=believed[here].copy(),
            upper=upper[here].copy(),
            # But for the watermark and what is held for others, pullers and arriving sequences.
            blocks=int(load.total_blocks * (1 - reading.watermark))
            - max(load.total_blocks - load.free_blocks - blocks, 0),
        )


def _block_tokens(instance: InstanceView) -> int:
    assert instance.info.layout is not None
    return instance.info.layout.block_tokens


def _unreported(instance: InstanceView, block_tokens: int) -> InstanceLoad:
    """As admission has it: nothing else is known of an instance that has not reported yet."""
    blocks = instance.info.max_sequence_tokens // block_tokens
    return InstanceLoad(total_blocks=blocks, free_blocks=blocks)

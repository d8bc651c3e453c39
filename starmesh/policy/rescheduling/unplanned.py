"""Migrations under way that this memory has not planned: a former leader's, an operator's, an instance's own drain.

Instances report how many leave and arrive, not which. Owns that these take up slots and budget as planned ones do. What
memory has planned may not be reported yet, and what is reported may have ended: of both counts the higher one holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from starmesh.policy.rescheduling.memory import PlanMemory
from starmesh.policy.rescheduling.round import Round
from starmesh.types import InstanceView


@dataclass(frozen=True, slots=True)
class Unplanned:
    """Migrations by instance id, those that leave and those that arrive; instances without any are left out."""

    outgoing: dict[str, int]
    incoming: dict[str, int]

    @property
    def total(self) -> int:
        """How many there are at least: either end may be missing in the view."""
        return max(sum(self.outgoing.values()), sum(self.incoming.values()))


def unplanned_migrations(groups: Iterable[tuple[InstanceView, ...]], memory: PlanMemory) -> Unplanned:
    """What the instances report beyond what ``memory`` has in flight there."""
    out = Counter(entry.migration.source for entry in memory.in_flight)
    into = Counter(entry.migration.target for entry in memory.in_flight)
    found = Unplanned({}, {})
    for instance in chain.from_iterable(groups):
        if instance.load is None:
            continue
        name, load = instance.info.instance_id, instance.load
        if load.outgoing_migrations > out[name]:
            found.outgoing[name] = load.outgoing_migrations - out[name]
        if load.incoming_migrations > into[name]:
            found.incoming[name] = load.incoming_migrations - into[name]
    return found


def make_way(round_: Round, unplanned: Unplanned) -> None:
    """Take their slots and budget; their ends keep their direction, as those of planned moves do."""
    round_.budget -= unplanned.total
    index, ends = round_.group.index, round_.ends
    for name in unplanned.outgoing.keys() & index.keys():
        ends.sending_slots[index[name]] -= unplanned.outgoing[name]
        ends.sends[index[name]] = True
    for name in unplanned.incoming.keys() & index.keys():
        ends.receiving_slots[index[name]] -= unplanned.incoming[name]
        ends.receives[index[name]] = True

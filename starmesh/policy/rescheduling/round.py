"""A round in the making: the group's loads, room and budget as they become with each move that is chosen.

Owns the bookkeeping of moves and the reasons of those that stay. Owns no choice: the steps choose and call ``move``.
The only mutable thing of a plan; it lives within one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import Floats, Group
from starmesh.policy.rescheduling.memory import InFlight, PlanMemory
from starmesh.policy.rescheduling.outcome import SequenceSkip, SkippedSequences
from starmesh.policy.rescheduling.sequences import Booleans
from starmesh.types import Migration, MigrationReason

_REASONS = tuple(SequenceSkip)
_NONE = -1


@dataclass(frozen=True, slots=True)
class Ends:
    """What instances may do in this round, arrays [instances]."""

    sending_slots: Integers
    receiving_slots: Integers
    sends: Booleans
    """Sources of moves now or a short while ago: they receive nothing, or sequences would go round in circles."""
    receives: Booleans
    """Likewise targets: they send nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Mover:
    """A sequence that may move, its ``weight`` [samples] and its ``peaks`` [bins]."""

    row: int
    weight: Integers
    peaks: Integers


class Round:
    """Working state over ``group``. ``loads`` [instances, samples] counts sequences in flight at their target;
    ``budget`` is how many migrations may still start, ``in_flight`` [sequences] marks those of earlier rounds.

    ``remembered`` are the rows of the sequences that ``memory`` knows.
    """

    def __init__(self, group: Group, memory: PlanMemory, remembered: list[int], *, now_s: float, budget: int) -> None:
        self.group = group
        self.now_s = now_s
        self.budget = budget
        self.loads = group.loads.copy()
        self.migrations: list[InFlight] = []
        self.factor = memory.transfer_factor
        count, sequences = len(group.ids), len(group.sequences.owner)
        self._reasons = np.full(sequences, _NONE, dtype=np.int8)
        self._moved = np.zeros(sequences, dtype=np.bool_)
        self.in_flight = np.zeros(sequences, dtype=np.bool_)
        self._cooling = np.zeros(sequences, dtype=np.bool_)
        self._failed = np.zeros(sequences, dtype=np.bool_)
        self._room = np.zeros((count, len(group.bins[0])), dtype=np.int64)
        self._room_known = np.zeros(count, dtype=np.bool_)
        self.incoming: dict[int, list[int]] = {}
        """By target the sequences on their way there, as their sources report them."""
        self.ends = self._ends(memory)
        self.fit_targets = self._fit_targets(memory)
        self._note_memory(memory, remembered)
        self.spread_before = self.spread

    @property
    def config(self) -> ReschedulingConfig:
        """The round's configuration."""
        return self.group.config

    @property
    def mean(self) -> Floats:
        """The mean load of the instances that are ready, [samples]."""
        mean: Floats = self.loads[self.group.ready].mean(axis=0)
        return mean

    @property
    def spread(self) -> float:
        """Root mean square of the distance from the mean, over instances and samples, in tokens."""
        off = self.loads[self.group.ready] - self.mean
        return float(np.sqrt((off * off).mean())) / self.group.scale

    def senders(self) -> Booleans:
        """The instances that may send a sequence for balance now."""
        senders: Booleans = (self.ends.sending_slots > 0) & ~self.ends.receives & (self.budget > 0)
        return senders

    def may_send(self, instance: int) -> bool:
        """Whether it is among ``senders``."""
        ends = self.ends
        return bool(ends.sending_slots[instance] > 0 and not ends.receives[instance]) and self.budget > 0

    def may_receive(self, instance: int) -> bool:
        """Whether it is among ``targets``."""
        ends = self.ends
        return bool(self.fit_targets[instance] and ends.receiving_slots[instance] > 0 and not ends.sends[instance])

    def targets(self, *, urgent: bool = False) -> Booleans:
        """The instances that may receive a sequence now. If it is urgent also those that have sent."""
        ends = self.ends
        targets: Booleans = self.fit_targets & (ends.receiving_slots > 0) & (~ends.sends | urgent)
        return targets

    def room(self, instances: Integers) -> Integers:
        """Tokens free at each of these throughout each bin of the horizon, [instances, bins]; their own sequences
        counted by their upper bounds, and those on their way."""
        missing = instances[~self._room_known[instances]]
        if len(missing) > 0:
            group = self.group
            rows, begins = group.sequences.of(missing)
            held = np.cumsum(np.vstack((np.zeros_like(self._room[:1]), group.peaks(rows))), axis=0)
            ends = np.append(begins[1:], len(rows))
            self._room[missing] = group.capacity[missing, None] - (held[ends] - held[begins])
            for target in set(missing.tolist()) & self.incoming.keys():
                self._room[target] -= group.peaks(np.array(self.incoming[target])).sum(axis=0)
            self._room_known[missing] = True
        return self._room[instances]

    def holds_whole(self, rows: Integers, instances: Integers) -> Booleans:
        """Whether each instance runs sequences as long as these may become where they are, [rows, instances]: a move
        must not shorten an answer."""
        needed = self.group.sequences.tokens[rows] + self.group.sequences.limit[rows]
        enough: Booleans = needed[:, None] <= self.group.longest[instances][None, :]
        return enough

    def fits(self, rows: Integers, instances: Integers) -> Booleans:
        """Whether each instance can hold each sequence over the whole horizon, [rows, instances]."""
        fits = self.holds_whole(rows, instances)
        for peaks, room in zip(self.group.peaks(rows).T, self.room(instances).T, strict=True):
            fits &= peaks[:, None] <= room[None, :]
        return fits

    def transfer_s(self, rows: Integers) -> Floats:
        """Seconds that moving each of these is expected to take, going by how long moves have taken lately."""
        size = self.group.sequences.tokens[rows] * self.group.layout.token_bytes
        cost = self.config.cost
        seconds: Floats = (cost.transfer_setup_s + size / cost.transfer_bytes_per_s) * self.factor
        return seconds

    def skip(self, rows: Integers, reason: SequenceSkip) -> None:
        """Note why these stay, unless an earlier reason stands."""
        unset = rows[self._reasons[rows] == _NONE]
        self._reasons[unset] = _REASONS.index(reason)

    def screen(self, rows: Integers, *, urgent: bool = False) -> Integers:
        """Of these, the sequences that may move at all; the others get their reason. What is urgent does not wait for
        sequences or instances to cool down, except for moves that failed."""
        group = self.group
        if self.migrations:
            rows = rows[~self._moved[rows]]
        owner = group.sequences.owner[rows]
        obstacles = (
            (self.in_flight[rows], SequenceSkip.IN_FLIGHT),
            ((self._failed if urgent else self._cooling)[rows], SequenceSkip.COOLING_DOWN),
            (~group.sequences.decoding[rows], SequenceSkip.NOT_DECODING),
            ((self.ends.receives & (not urgent))[owner], SequenceSkip.SETTLING),
            (((self.ends.sending_slots <= 0) | (self.budget <= 0))[owner], SequenceSkip.BUDGET),
        )
        may = np.ones(len(rows), dtype=np.bool_)
        for obstacle, reason in obstacles:
            if obstacle.any():
                self.skip(rows[obstacle], reason)
                may &= ~obstacle
        return rows[may]

    def mover(self, row: int) -> Mover:
        """A sequence with what it brings along."""
        rows = np.array([row])
        return Mover(row, self.group.weights(rows)[0], self.group.peaks(rows)[0])

    def move(self, mover: Mover, target: int, reason: MigrationReason, gain_tokens: float) -> None:
        """Choose a move: its load counts at the target, its memory at both ends until it is done."""
        group, row = self.group, mover.row
        known = group.sequences
        source = int(known.owner[row])
        if self._room_known[target]:
            self._room[target] -= mover.peaks
        self.incoming.setdefault(target, []).append(row)
        self.loads[source] -= mover.weight
        self.loads[target] += mover.weight
        self._moved[row] = True
        self._reasons[row] = _NONE
        self.ends.sending_slots[source] -= 1
        self.ends.receiving_slots[target] -= 1
        self.ends.sends[source] = True
        self.ends.receives[target] = True
        self.budget -= 1
        estimate_s = self.config.cost.transfer_s(int(known.resident[row]) * group.layout.token_bytes)
        migration = Migration(
            known.name(row), group.ids[source], group.ids[target], int(known.epochs[row]), reason, gain_tokens
        )
        self.migrations.append(InFlight(migration, self.now_s, estimate_s))

    def skipped(self) -> tuple[SkippedSequences, ...]:
        """Those that stay, by instance and reason."""
        group = self.group
        rows = np.flatnonzero(self._reasons != _NONE)
        keys = group.sequences.owner[rows] * len(_REASONS) + self._reasons[rows]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        places = (rows - group.sequences.first_row[group.sequences.owner[rows]])[order].tolist()
        found: list[SkippedSequences] = []
        for key, (begin, end) in zip(keys[begins].tolist(), pairwise([*begins.tolist(), len(rows)]), strict=True):
            owner, reason = divmod(key, len(_REASONS))
            names = group.sequences.names[owner]
            staying = names if end - begin == len(names) else [names[place] for place in places[begin:end]]
            found.append(SkippedSequences(group.ids[owner], _REASONS[reason], frozenset(staying)))
        return tuple(found)

    def _ends(self, memory: PlanMemory) -> Ends:
        """What an instance reports beyond what the memory knows, someone else has started: it counts alike."""
        group, config, count = self.group, self.group.config, len(self.group.ids)
        out, into = np.zeros((2, count), dtype=np.int64)
        sends, receives = np.zeros((2, count), dtype=np.bool_)
        for entry in memory.in_flight:
            for name, under_way in ((entry.migration.source, out), (entry.migration.target, into)):
                if name in group.index:
                    under_way[group.index[name]] += 1
        out, into = np.maximum(out, group.outgoing), np.maximum(into, group.incoming)
        for cool in memory.cool_downs:
            for name, directed in ((cool.source, sends), (cool.target, receives)):
                if name in group.index and self.now_s < cool.settled_s:
                    directed[group.index[name]] = True
        return Ends(
            sending_slots=config.max_in_flight_per_source - out,
            receiving_slots=np.minimum(config.max_in_flight_per_target - into, group.free_places - into),
            sends=sends | (out > 0),
            receives=receives | (into > 0),
        )

    def _fit_targets(self, memory: PlanMemory) -> Booleans:
        """Ready, without a queue, and not failing."""
        group = self.group
        fit: Booleans = group.ready & (group.waiting <= self.config.max_waiting_sequences)
        failures = Counter(cool.target for cool in memory.cool_downs if cool.failures and self.now_s < cool.until_s)
        for name, count in failures.items():
            if count >= self.config.max_target_failures and name in group.index:
                fit[group.index[name]] = False
        return fit

    def _note_memory(self, memory: PlanMemory, remembered: list[int]) -> None:
        """Mark what is in flight or cooling down, and count what is in flight at its target too."""
        group, known = self.group, self.group.sequences
        moving = {entry.migration.request_id: entry.migration for entry in memory.in_flight}
        cooling = {cool.request_id: cool for cool in memory.cool_downs if self.now_s < cool.until_s}
        for row in remembered:
            migration, cool = moving.get(known.name(row)), cooling.get(known.name(row))
            if migration is not None:
                self.in_flight[row] = True
                target = group.index.get(migration.target)
                if target is not None and known.epochs[row] == migration.epoch:
                    weight = group.weights(np.array([row]))[0]
                    self.loads[known.owner[row]] -= weight
                    self.loads[target] += weight
                    self.incoming.setdefault(target, []).append(row)
            elif cool is not None:
                self._cooling[row] = True
                self._failed[row] = cool.failures > 0

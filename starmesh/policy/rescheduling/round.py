"""A round in the making: the group's loads, room and budget as they become with each move that is chosen.

Owns the bookkeeping of moves and the reasons of those that stay. Owns no choice: the steps choose and call ``move``.
The only mutable thing of a plan; it lives within one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.policy.rescheduling.measure import Booleans, Floats, Group
from starmesh.policy.rescheduling.memory import CoolDown, InFlight, PlanMemory
from starmesh.policy.rescheduling.outcome import SequenceSkip, SkippedSequences
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


class Round:
    """Working state over ``group``. ``loads`` [instances, samples] counts sequences in flight at their target;
    ``budget`` is how many migrations may still start, ``in_flight`` [sequences] marks those of earlier rounds."""

    def __init__(self, group: Group, memory: PlanMemory, *, now_s: float) -> None:
        self.group = group
        self.now_s = now_s
        self.loads = group.loads.copy()
        self.migrations: list[InFlight] = []
        self.factor = memory.transfer_factor
        self._ready_count = int(group.ready.sum())
        self._reasons = np.full(len(group.sequences), _NONE, dtype=np.int8)
        self._moved = np.zeros(len(group.sequences), dtype=np.bool_)
        self.in_flight = np.zeros(len(group.sequences), dtype=np.bool_)
        self._cooling = np.zeros(len(group.sequences), dtype=np.bool_)
        self._failed = np.zeros(len(group.sequences), dtype=np.bool_)
        self._room: dict[int, Integers] = {}
        self._incoming: dict[int, list[int]] = {}
        self.budget = group.config.max_in_flight - len(memory.in_flight)
        self.ends = self._ends(memory)
        self.fit_targets = self._fit_targets(memory)
        self._note_memory(memory)
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

    def targets(self, *, drain: bool = False) -> Booleans:
        """The instances that may receive a sequence now. For a drain also those that have sent."""
        ends = self.ends
        targets: Booleans = self.fit_targets & (ends.receiving_slots > 0) & (~ends.sends | drain)
        return targets

    def incoming_rows(self, instance: int) -> Integers:
        """The sequences in flight to an instance, as their sources report them."""
        return np.array(self._incoming.get(instance, []), dtype=np.int64)

    def room(self, instances: Integers) -> Integers:
        """Tokens free at each of these throughout each bin of the horizon, [instances, bins]; their own sequences
        counted by their upper bounds, and those on their way."""
        for instance in instances.tolist():
            if instance not in self._room:
                rows = self.group.rows_of(instance)
                held = self.group.peaks(np.concatenate((rows, self.incoming_rows(instance))))
                self._room[instance] = self.group.capacity[instance] - held.sum(axis=0)
        return np.stack([self._room[instance] for instance in instances.tolist()])

    def holds_whole(self, rows: Integers, instances: Integers) -> Booleans:
        """Whether each instance runs sequences as long as these may become where they are, [rows, instances]: a move
        must not shorten an answer."""
        needed = self.group.tokens[rows] + self.group.limit[rows]
        enough: Booleans = needed[:, None] <= self.group.longest[instances][None, :]
        return enough

    def fits(self, rows: Integers, instances: Integers) -> Booleans:
        """Whether each instance can hold each sequence over the whole horizon, [rows, instances]."""
        fits = (self.group.peaks(rows)[:, None, :] <= self.room(instances)[None, :, :]).all(axis=2)
        both: Booleans = fits & self.holds_whole(rows, instances)
        return both

    def transfer_s(self, rows: Integers) -> Floats:
        """Seconds that moving each of these is expected to take, going by how long moves have taken lately."""
        size = self.group.tokens[rows] * self.group.layout.token_bytes
        cost = self.config.cost
        seconds: Floats = (cost.transfer_setup_s + size / cost.transfer_bytes_per_s) * self.factor
        return seconds

    def skip(self, rows: Integers, reason: SequenceSkip) -> None:
        """Note why these stay, unless an earlier reason stands."""
        unset = rows[self._reasons[rows] == _NONE]
        self._reasons[unset] = _REASONS.index(reason)

    def screen(self, rows: Integers, *, drain: bool = False, note: bool = True) -> Integers:
        """Of these, the sequences that may move at all; the others get their reason, if ``note``. A drain does not wait
        for sequences or instances to cool down, except for moves that failed."""
        group = self.group
        rows = rows[~self._moved[rows]]
        owner = group.owner[rows]
        obstacles = (
            (self.in_flight[rows], SequenceSkip.IN_FLIGHT),
            ((self._failed if drain else self._cooling)[rows], SequenceSkip.COOLING_DOWN),
            (~group.decoding[rows], SequenceSkip.NOT_DECODING),
            (self.ends.receives[owner] & (not drain), SequenceSkip.SETTLING),
            ((self.ends.sending_slots[owner] <= 0) | (self.budget <= 0), SequenceSkip.BUDGET),
        )
        may = np.ones(len(rows), dtype=np.bool_)
        for obstacle, reason in obstacles:
            if note:
                self.skip(rows[obstacle], reason)
            may &= ~obstacle
        return rows[may]

    def move(self, row: int, target: int, reason: MigrationReason, gain_tokens: float) -> None:
        """Choose a move: its load counts at the target, its memory at both ends until it is done."""
        group = self.group
        source = int(group.owner[row])
        sequence = group.sequences[row]
        rows = np.array([row])
        self.room(np.array([target]))
        self._room[target] = self._room[target] - group.peaks(rows)[0]
        self.loads[source] -= group.weights[row]
        self.loads[target] += group.weights[row]
        self._moved[row] = True
        self._reasons[row] = _NONE
        self.ends.sending_slots[source] -= 1
        self.ends.receiving_slots[target] -= 1
        self.ends.sends[source] = True
        self.ends.receives[target] = True
        self.budget -= 1
        estimate_s = self.config.cost.transfer_s(sequence.resident_tokens * group.layout.token_bytes)
        migration = Migration(
            sequence.request_id, group.ids[source], group.ids[target], sequence.epoch, reason, gain_tokens
        )
        self.migrations.append(InFlight(migration, self.now_s, estimate_s))

    def skipped(self) -> tuple[SkippedSequences, ...]:
        """Those that stay, by instance and reason."""
        rows = np.flatnonzero(self._reasons != _NONE)
        keys = self.group.owner[rows] * len(_REASONS) + self._reasons[rows]
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        ids = self.group.request_ids
        found: list[SkippedSequences] = []
        for part in np.split(rows, np.flatnonzero(np.diff(keys)) + 1) if len(rows) else ():
            instance_id = self.group.ids[self.group.owner[part[0]]]
            names = frozenset(map(ids.__getitem__, part.tolist()))
            found.append(SkippedSequences(instance_id, _REASONS[self._reasons[part[0]]], names))
        return tuple(found)

    def _ends(self, memory: PlanMemory) -> Ends:
        group, count = self.group, len(self.group.ids)
        out = Counter(entry.migration.source for entry in memory.in_flight)
        into = Counter(entry.migration.target for entry in memory.in_flight)
        ends = Ends(
            sending_slots=np.array([self.config.max_in_flight_per_source - out[name] for name in group.ids]),
            receiving_slots=np.array([self.config.max_in_flight_per_target - into[name] for name in group.ids]),
            sends=np.zeros(count, dtype=np.bool_),
            receives=np.zeros(count, dtype=np.bool_),
        )
        moves = [(entry.migration.source, entry.migration.target) for entry in memory.in_flight]
        moves += [(cool.source, cool.target) for cool in memory.cool_downs if self._holds(cool)]
        for source, target in moves:
            if source in group.index:
                ends.sends[group.index[source]] = True
            if target in group.index:
                ends.receives[group.index[target]] = True
        return ends

    def _holds(self, cool: CoolDown) -> bool:
        """Whether the ends of a past move keep their direction; a failed one has moved nothing."""
        return self.now_s < cool.until_s and cool.failures == 0

    def _fit_targets(self, memory: PlanMemory) -> Booleans:
        """Ready, without a queue, and not failing; how many sequences it takes at most bounds its slots."""
        group = self.group
        failures = Counter(cool.target for cool in memory.cool_downs if cool.failures and self.now_s < cool.until_s)
        fit = group.ready.copy()
        for row, instance in enumerate(group.instances):
            waiting = instance.load.waiting_sequences if instance.load else 0
            if (
                waiting > self.config.max_waiting_sequences
                or failures[group.ids[row]] >= self.config.max_target_failures
            ):
                fit[row] = False
            if instance.info.max_sequences:
                into = self.config.max_in_flight_per_target - int(self.ends.receiving_slots[row])
                places = instance.info.max_sequences - int(group.sequences_at[row]) - into
                self.ends.receiving_slots[row] = min(int(self.ends.receiving_slots[row]), places)
        return fit

    def _note_memory(self, memory: PlanMemory) -> None:
        """Mark what is in flight or cooling down, and count what is in flight at its target too."""
        group = self.group
        targets = {entry.migration.request_id: entry.migration for entry in memory.in_flight}
        cooling = {cool.request_id: cool for cool in memory.cool_downs if self.now_s < cool.until_s}
        if not targets and not cooling:
            return
        for row, request_id in enumerate(group.request_ids):
            migration, cool = targets.get(request_id), cooling.get(request_id)
            if migration is not None:
                self.in_flight[row] = True
                target = group.index.get(migration.target)
                if target is not None and group.sequences[row].epoch == migration.epoch:
                    self.loads[group.owner[row]] -= group.weights[row]
                    self.loads[target] += group.weights[row]
                    self._incoming.setdefault(target, []).append(row)
            elif cool is not None:
                self._cooling[row] = True
                self._failed[row] = cool.failures > 0

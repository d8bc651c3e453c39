"""The rescheduling policies once more, one number at a time: slow, and to be read beside docs/rescheduling.md.

What ``starmesh.policy.rescheduling`` computes on arrays must come out the same here. Shares with it only the values
that go in and out, the cost model and how memory changes when a migration ends.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from starmesh.policy.rescheduling import (
    InFlight,
    InstanceSkip,
    Plan,
    PlanMemory,
    ReschedulingConfig,
    SequenceSkip,
    SkippedInstance,
    SkippedSequences,
)
from starmesh.types import ClusterView, InstanceState, InstanceView, KvLayout, Migration, MigrationReason, Role

LOOKS_AHEAD = {"none": "now", "current_load": "now", "llumnix": "now", "star": "mean", "star_plus": "resolved"}


@dataclass(eq=False)
class Running:
    """A sequence; ``remaining`` is None where its end is not foreseen."""

    request_id: str
    epoch: int
    at: Host
    tokens: int
    resident: int
    decoding: bool
    remaining: int | None
    upper: int
    limit: int
    weights: list[int]
    in_flight: bool = False
    cooling: bool = False
    failed: bool = False
    moved: bool = False


@dataclass(eq=False)
class Host:
    """An instance, and what it may do in this round."""

    view: InstanceView
    name: str
    ready: bool
    capacity: int
    step_s: float
    sequences: list[Running] = field(default_factory=list)
    arriving: list[Running] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    may_send: int = 0
    may_receive: int = 0
    sends: bool = False
    receives: bool = False
    fit: bool = True


def steps_of(horizon: int, count: int) -> list[int]:
    """Evenly spaced, both ends included. Halves round to even, as numpy's do."""
    count = min(count, horizon + 1)
    return sorted({round(horizon / (count - 1) * at) if count > 1 else 0 for at in range(count)})


def whole_blocks(tokens: int, layout: KvLayout) -> int:
    return math.ceil(tokens / layout.block_tokens) * layout.block_tokens


def held(tokens: int, remaining: int | None, step: int) -> int:
    """n(t)."""
    if remaining is None:
        return tokens
    return tokens + step if step <= remaining else 0


class ReadableRound:
    """One layout's instances."""

    def __init__(self, views: list[InstanceView], memory: PlanMemory, config: ReschedulingConfig, now_s: float) -> None:
        layout = views[0].info.layout
        assert layout is not None
        self.config, self.layout, self.now_s, self.memory = config, layout, now_s, memory
        self.ahead = LOOKS_AHEAD[config.policy]
        self.scale = config.horizon_steps + 1 if self.ahead == "mean" else 1
        self.steps = steps_of(config.horizon_steps, config.sample_count)
        self.reasons: dict[Running, SequenceSkip] = {}
        self.migrations: list[InFlight] = []
        self.hosts = [self._host(view) for view in views]
        self.by_name = {host.name: host for host in self.hosts}
        self.believes = any(s.remaining is not None for host in self.hosts for s in host.sequences)
        self.own_tokens = sum(s.weights[0] for host in self.hosts if host.ready for s in host.sequences)
        self._remember()
        self.spread_before = self.spread()

    def _host(self, view: InstanceView) -> Host:
        load, config = view.load, self.config
        assert load is not None
        reserved = sum(r.tokens for r in view.reservations)
        own = sum(math.ceil(s.resident_tokens / self.layout.block_tokens) for s in load.sequences)
        blocks = math.floor(load.total_blocks * (1 - config.watermark))
        blocks -= max(load.total_blocks - load.free_blocks - own, 0)
        host = Host(
            view=view,
            name=view.info.instance_id,
            ready=view.info.state is InstanceState.READY,
            capacity=blocks * self.layout.block_tokens - reserved,
            step_s=load.step_duration_s or config.cost.step_s(load.running_sequences, load.resident_tokens),
        )
        longest = view.info.max_sequence_tokens or 2**53
        for known in load.sequences:
            tokens = known.prompt_tokens + known.output_tokens
            limit = max(0, min(known.max_output_tokens - known.output_tokens, longest - tokens))
            remaining, upper = None, limit
            if self.ahead != "now" and (known.remaining_tokens or 0) > 0:
                assert known.remaining_tokens is not None
                if (known.prediction_age_tokens or 0) <= config.max_prediction_age_tokens:
                    remaining = min(known.remaining_tokens, limit)
                    if (known.remaining_tokens_upper or 0) > 0:
                        upper = min(max(known.remaining_tokens_upper or 0, known.remaining_tokens), limit)
            if remaining is None and self.ahead == "resolved" and limit <= config.horizon_steps:
                remaining = limit
            host.sequences.append(
                Running(
                    request_id=known.request_id,
                    epoch=known.epoch,
                    at=host,
                    tokens=tokens,
                    resident=known.resident_tokens,
                    decoding=known.output_tokens > 0 and known.resident_tokens >= tokens - 1,
                    remaining=remaining,
                    upper=upper,
                    limit=limit,
                    weights=self._weights(tokens, remaining),
                )
            )
        host.loads = [
            self.scale * reserved + sum(column) for column in zip(*[s.weights for s in host.sequences], strict=True)
        ]
        host.loads = host.loads or [self.scale * reserved] * len(self._weights(1, None))
        return host

    def _weights(self, tokens: int, remaining: int | None) -> list[int]:
        if self.ahead == "now":
            return [tokens]
        if self.ahead == "mean":
            return [sum(held(tokens, remaining, step) for step in range(self.config.horizon_steps + 1))]
        return [held(tokens + self.config.cost.sequence_tokens, remaining, step) for step in self.steps]

    def _remember(self) -> None:
        memory, config = self.memory, self.config
        out = Counter(entry.migration.source for entry in memory.in_flight)
        into = Counter(entry.migration.target for entry in memory.in_flight)
        current = [cool for cool in memory.cool_downs if self.now_s < cool.until_s]
        for host in self.hosts:
            load, info = host.view.load, host.view.info
            assert load is not None
            leaving = max(out[host.name], load.outgoing_migrations)
            coming = max(into[host.name], load.incoming_migrations)
            host.sends = leaving > 0 or any(
                c.source == host.name and self.now_s < c.settled_s for c in memory.cool_downs
            )
            host.receives = coming > 0 or any(
                c.target == host.name and self.now_s < c.settled_s for c in memory.cool_downs
            )
            host.may_send = config.max_in_flight_per_source - leaving
            host.may_receive = config.max_in_flight_per_target - coming
            if info.max_sequences:
                here = max(load.running_sequences + load.waiting_sequences, len(load.sequences))
                free = info.max_sequences - here - len(host.view.reservations) - coming
                host.may_receive = min(host.may_receive, free)
            failing = sum(1 for cool in current if cool.target == host.name and cool.failures)
            queue = load.waiting_sequences
            host.fit = host.ready and queue <= config.max_waiting_sequences and failing < config.max_target_failures
        moving = {entry.migration.request_id: entry.migration for entry in memory.in_flight}
        cooling = {cool.request_id: cool for cool in current}
        for known in [s for host in self.hosts for s in host.sequences]:
            if known.request_id in moving:
                known.in_flight = True
                move = moving[known.request_id]
                target = self.by_name.get(move.target)
                if target is not None and known.epoch == move.epoch:
                    self._shift(known, target)
                    target.arriving.append(known)
            elif known.request_id in cooling:
                known.cooling = True
                known.failed = cooling[known.request_id].failures > 0

    def _shift(self, known: Running, target: Host, *, back: bool = False) -> None:
        for host, sign in ((known.at, -1), (target, 1)):
            sign *= -1 if back else 1
            host.loads = [load + sign * weight for load, weight in zip(host.loads, known.weights, strict=True)]

    def means(self) -> list[float]:
        ready = [host.loads for host in self.hosts if host.ready]
        return [sum(column) / len(ready) for column in zip(*ready, strict=True)]

    def spread(self) -> float:
        squares = [
            (x - mean) ** 2 for h in self.hosts if h.ready for x, mean in zip(h.loads, self.means(), strict=True)
        ]
        return math.sqrt(sum(squares) / len(squares)) / self.scale

    def targets(self, *, urgent: bool = False) -> list[Host]:
        return [h for h in self.hosts if h.fit and h.may_receive > 0 and (urgent or not h.sends)]

    def skip(self, sequences: Iterable[Running], reason: SequenceSkip) -> None:
        for known in sequences:
            self.reasons.setdefault(known, reason)

    def candidates(self, hosts: Iterable[Host], *, urgent: bool = False) -> list[Running]:
        found = []
        for known in (s for host in hosts for s in host.sequences if not s.moved):
            reason = None
            if known.in_flight:
                reason = SequenceSkip.IN_FLIGHT
            elif known.failed if urgent else known.cooling:
                reason = SequenceSkip.COOLING_DOWN
            elif not known.decoding:
                reason = SequenceSkip.NOT_DECODING
            elif known.at.receives and not urgent:
                reason = SequenceSkip.SETTLING
            elif known.at.may_send <= 0 or self.budget <= 0:
                reason = SequenceSkip.BUDGET
            if reason is None:
                found.append(known)
            else:
                self.skip([known], reason)
        return sorted(found, key=lambda known: known.request_id)

    def transfer_s(self, known: Running) -> float:
        cost = self.config.cost
        size = known.tokens * self.layout.token_bytes
        return (cost.transfer_setup_s + size / cost.transfer_bytes_per_s) * self.memory.transfer_factor

    def amortised(self, sequences: list[Running]) -> list[Running]:
        def pays(known: Running) -> bool:
            return lasts(known) * known.at.step_s >= self.config.amortisation * self.transfer_s(known)

        self.skip([known for known in sequences if not pays(known)], SequenceSkip.NOT_AMORTISED)
        return [known for known in sequences if pays(known)]

    def fits(self, known: Running, target: Host) -> bool:
        """In each part of the horizon, all counted as at their longest in it."""
        longest = target.view.info.max_sequence_tokens or 2**53
        if known.tokens + known.limit > longest:
            return False
        steps = self.config.horizon_steps * (self.config.memory_horizons if self.ahead == "resolved" else 1)
        parts = min(self.config.memory_bins, steps + 1)
        edges = [at * (steps + 1) // parts for at in range(parts + 1)]
        for first, last in zip(edges, (edge - 1 for edge in edges[1:]), strict=False):
            needed = 0
            for each in [*target.sequences, *target.arriving, known]:
                if first <= each.upper:
                    needed += whole_blocks(each.tokens + min(each.upper, last), self.layout)
            if needed > target.capacity:
                return False
        return True

    def move(self, known: Running, target: Host, reason: MigrationReason, gain: float) -> None:
        self._shift(known, target)
        target.arriving.append(known)
        known.moved = True
        self.reasons.pop(known, None)
        known.at.may_send -= 1
        target.may_receive -= 1
        known.at.sends = target.receives = True
        self.budget -= 1
        migration = Migration(known.request_id, known.at.name, target.name, known.epoch, reason, gain)
        estimate_s = self.config.cost.transfer_s(known.resident * self.layout.token_bytes)
        self.migrations.append(InFlight(migration, self.now_s, estimate_s))

    # What the policies do in a round.

    def drain(self) -> None:
        for source in self.hosts:
            if source.ready:
                continue
            leaving = self.candidates([source], urgent=True)
            for known in sorted(leaving, key=lambda known: -lasts(known) / max(known.tokens, 1)):
                if self.budget <= 0 or source.may_send <= 0:
                    self.skip([known], SequenceSkip.BUDGET)
                    continue
                target = self.place(known, self.targets(urgent=True))
                if target is not None:
                    self.move(known, target, MigrationReason.DRAIN, float(known.tokens))

    def place(self, known: Running, targets: list[Host]) -> Host | None:
        targets = [target for target in targets if target is not known.at]
        if not targets:
            self.skip([known], SequenceSkip.NO_TARGET)
            return None
        roomy = [target for target in targets if self.fits(known, target)]
        if not roomy:
            self.skip([known], SequenceSkip.NO_ROOM)
            return None
        return min(roomy, key=lambda h: (sum(a * b for a, b in zip(h.loads, known.weights, strict=True)), h.name))

    def relieve(self) -> None:
        growth = self.config.horizon_steps + self.layout.block_tokens
        doubt = {
            host: sum(s.tokens for s in host.sequences) + len(host.sequences) * growth - host.capacity
            for host in self.hosts
        }
        fullest = [host for host in sorted(self.hosts, key=lambda h: -doubt[h]) if doubt[host] > 0 and host.ready]
        for source in fullest[: self.config.shortlist]:
            self._unburden(source)

    def _unburden(self, source: Host) -> None:
        def needs(known: Running) -> list[int]:
            return [whole_blocks(held(known.tokens, lasts(known), step), self.layout) for step in self.steps]

        staying = [needs(s) for s in [*(s for s in source.sequences if not s.in_flight), *source.arriving]]
        excess = [sum(column) - source.capacity for column in zip(*staying, strict=True)] or [-source.capacity]
        if max(excess) <= 0:
            return
        movable = self.amortised(self.candidates([source]))
        while movable and max(excess) > 0 and source.may_send > 0 and self.budget > 0:
            spared = {s: max(excess) - max(0, *(e - n for e, n in zip(excess, needs(s), strict=True))) for s in movable}
            free = {h: h.capacity - sum(s.tokens for s in h.sequences) for h in self.hosts}
            targets = sorted((h for h in self.targets() if h is not source), key=lambda h: -free[h])
            for known in sorted(movable, key=lambda s: (-spared[s], s.tokens, s.request_id)):
                target = self.place(known, targets[: self.config.shortlist]) if spared[known] > 0 else None
                if target is not None:
                    self.move(known, target, MigrationReason.MEMORY, float(spared[known]))
                    excess = [e - n for e, n in zip(excess, needs(known), strict=True)]
                    movable.remove(known)
                    break
            else:
                self.skip(movable, SequenceSkip.NO_GAIN)
                return
        if max(excess) > 0:
            self.skip(movable, SequenceSkip.BUDGET)

    def level(self, worth: Callable[[Running, int], float], most_moves: int) -> None:
        means = self.means()
        by_heat = sorted(self.hosts, key=lambda h: sum(h.loads))
        margin = 1 + self.config.overload_margin
        over = [
            h
            for h in sorted(self.hosts, key=lambda h: -sum(h.loads))
            if h.ready and any(x > margin * mean for x, mean in zip(h.loads, means, strict=True))
        ]
        under = [h for h in by_heat if h.ready and any(x < mean for x, mean in zip(h.loads, means, strict=True))]
        movable = self.amortised(self.candidates(over))
        targets = [h for h in under if h in self.targets()][: self.config.shortlist]
        if not targets:
            self.skip(movable, SequenceSkip.NO_TARGET)
            return
        free = [h for h in over if h.may_send > 0 and not h.receives and self.budget > 0]
        sources = free[: self.config.shortlist]
        unlisted = [known for known in movable if known.at not in sources]
        movable = [known for known in movable if known.at in sources]

        def drop(known: Running, target: Host) -> int:
            gaps = [a - b for a, b in zip(known.at.loads, target.loads, strict=True)]
            return sum(2 * w * (gap - w) for w, gap in zip(known.weights, gaps, strict=True))

        for _ in range(most_moves):
            allowed = [
                (-worth(known, drop(known, target)), known.request_id, target.name, known, target)
                for known in movable
                if not known.moved and known.at.may_send > 0 and not known.at.receives and self.budget > 0
                for target in targets
                if target in self.targets() and self.fits(known, target)
            ]
            helping = [move for move in allowed if move[0] < 0]
            if not helping:
                break
            *_, known, target = min(helping, key=lambda move: move[:3])
            before = self.spread()
            self._shift(known, target)
            gain = before - self.spread()
            self._shift(known, target, back=True)
            reason = MigrationReason.PREDICTED_LOAD if self.believes else MigrationReason.LOAD
            self.move(known, target, reason, gain)
        for known in (known for known in movable if not known.moved):
            helped = [t for t in targets if t is not known.at and worth(known, drop(known, t)) > 0]
            if not helped:
                self.skip([known], SequenceSkip.NO_GAIN)
            elif not any(self.fits(known, target) for target in helped):
                self.skip([known], SequenceSkip.NO_ROOM)
            else:
                self.skip([known], SequenceSkip.BUDGET)
        self.skip(unlisted, SequenceSkip.BUDGET)

    def worth_in_sequence_seconds(self) -> Callable[[Running, int], float]:
        config = self.config
        ready = [host for host in self.hosts if host.ready]
        count = max(1, sum(len(host.sequences) for host in ready))
        weight = self.own_tokens / count
        steps = (config.horizon_steps + 1) / len(self.hosts[0].loads)
        price = config.cost.step_token_s * steps / weight if weight else 0.0
        batch = 2 * count / max(1, len(ready))

        def worth(known: Running, drop: int) -> float:
            copying = self.transfer_s(known) * config.bystander_slowdown * batch
            return drop * price - config.hysteresis * (copying + known.at.step_s)

        return worth

    def pair_by_freeness(self) -> None:
        def freeness(free: float, batch: int) -> float:
            return free / max(batch, 1)

        free: dict[Host, tuple[float, int]] = {}
        for host in self.hosts:
            here = [*(s for s in host.sequences if not s.in_flight), *host.arriving]
            free[host] = host.capacity - sum(s.tokens for s in here), len(here)
        value = {host: freeness(*free[host]) for host in self.hosts}
        threshold = self.config.freeness_threshold_blocks * self.layout.block_tokens
        sources = [h for h in sorted(self.hosts, key=lambda h: value[h]) if value[h] < threshold and h.ready]
        targets = [
            h for h in sorted(self.hosts, key=lambda h: -value[h]) if value[h] > threshold and h in self.targets()
        ]
        for source, target in zip(sources, targets, strict=False):
            movable = self.candidates([source])
            if not movable:
                continue
            known = min(movable, key=lambda s: s.tokens)
            left = freeness(free[source][0] + known.tokens, free[source][1] - 1)
            right = freeness(free[target][0] - known.tokens, free[target][1] + 1)
            before = value[target] - value[source]
            if right < threshold or not 0 < right - left < before:
                self.skip(movable, SequenceSkip.NO_GAIN)
            elif not self.fits(known, target):
                self.skip(movable, SequenceSkip.NO_ROOM)
            else:
                self.move(known, target, MigrationReason.LOAD, before - (right - left))
                self.skip([s for s in movable if s is not known], SequenceSkip.BUDGET)
        self.skip(self.candidates(sources[len(targets) :]), SequenceSkip.NO_TARGET)

    budget: int

    def run(self, budget: int) -> None:
        self.budget = budget
        if self.config.policy == "none":
            return
        self.drain()
        if self.config.policy == "llumnix":
            self.pair_by_freeness()
        elif self.config.policy == "star_plus":
            self.relieve()
            self.level(self.worth_in_sequence_seconds(), self.budget)
        else:
            self.level(lambda _, drop: float(drop), self.config.star_moves_per_round)

    def skipped(self) -> list[SkippedSequences]:
        found: dict[tuple[str, int], set[str]] = defaultdict(set)
        order = list(SequenceSkip)
        for known, reason in self.reasons.items():
            found[known.at.name, order.index(reason)].add(known.request_id)
        return [SkippedSequences(name, order[at], frozenset(ids)) for (name, at), ids in sorted(found.items())]


def lasts(known: Running) -> int:
    """The predicted remaining tokens, or the most that it may generate."""
    return known.limit if known.remaining is None else known.remaining


def usable(view: ClusterView, config: ReschedulingConfig) -> tuple[list[list[InstanceView]], list[SkippedInstance]]:
    """The decode instances by layout, and why others do not count."""
    groups: dict[KvLayout, list[InstanceView]] = {}
    skipped = []
    for found in sorted(view.instances, key=lambda found: found.info.instance_id):
        name, layout = found.info.instance_id, found.info.layout
        if found.info.role is not Role.DECODE:
            continue
        if found.info.state is InstanceState.DRAINED:
            skipped.append(SkippedInstance(name, InstanceSkip.DRAINED))
        elif found.load is None:
            skipped.append(SkippedInstance(name, InstanceSkip.NO_REPORT))
        elif view.now_s - found.reported_at_s > config.stale_after_s:
            skipped.append(SkippedInstance(name, InstanceSkip.STALE))
        elif layout is None:
            skipped.append(SkippedInstance(name, InstanceSkip.NO_LAYOUT))
        else:
            groups.setdefault(layout, []).append(found)
    kept = []
    for group in groups.values():
        if len(group) > 1 and any(found.info.state is InstanceState.READY for found in group):
            kept.append(group)
        else:
            skipped += [SkippedInstance(found.info.instance_id, InstanceSkip.ALONE) for found in group]
    return kept, sorted(skipped, key=lambda skip: skip.instance_id)


def readable_plan(view: ClusterView, memory: PlanMemory, config: ReschedulingConfig) -> Plan:
    """``plan``, for reading."""
    groups, skipped_instances = usable(view, config)
    everyone = [found for group in groups for found in group]
    owners: dict[str, tuple[int, str]] = {}
    for found in everyone:
        for known in found.load.sequences if found.load else ():
            reported = known.epoch, found.info.instance_id
            owners[known.request_id] = max(owners.get(known.request_id, (0, "")), reported)
    memory = memory.reconciled(owners, now_s=view.now_s, config=config)
    names = [found.info.instance_id for found in everyone]
    out = Counter(entry.migration.source for entry in memory.in_flight)
    into = Counter(entry.migration.target for entry in memory.in_flight)
    known_out = {f.info.instance_id: f.load.outgoing_migrations for f in everyone if f.load}
    known_into = {f.info.instance_id: f.load.incoming_migrations for f in everyone if f.load}
    unplanned = max(
        sum(max(0, known_out[name] - out[name]) for name in names),
        sum(max(0, known_into[name] - into[name]) for name in names),
    )
    budget = config.max_in_flight - len(memory.in_flight) - unplanned
    rounds = []
    for group in groups:
        rounds.append(ReadableRound(group, memory, config, view.now_s))
        rounds[-1].run(budget)
        budget = rounds[-1].budget
    entries = [entry for round_ in rounds for entry in round_.migrations]
    return Plan(
        policy=config.policy,
        memory=memory.started(tuple(entries)),
        migrations=tuple(entry.migration for entry in entries),
        skipped_instances=tuple(skipped_instances),
        skipped=tuple(skip for round_ in rounds for skip in round_.skipped()),
        spread_before_tokens=max((round_.spread_before for round_ in rounds), default=0.0),
        spread_after_tokens=max((round_.spread() for round_ in rounds), default=0.0),
    )

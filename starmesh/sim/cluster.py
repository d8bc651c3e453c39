"""A simulated cluster: its instances, the network between them, and who hears of what.

Owns the wiring, and that instances join, drain and die. What each part does is its own: ``router``, ``rounds``,
``evacuations``, ``migrations``, ``instance``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from starmesh.engine.block_pool import IntegrityError
from starmesh.engine.engine import SequenceOutput
from starmesh.migration.terms import Cause
from starmesh.policy.dispatch import POLICIES
from starmesh.policy.rescheduling import ReschedulingConfig
from starmesh.profiles import Profile
from starmesh.sequence_loads import SequenceLoads
from starmesh.sim.config import Fault, FaultKind, SimulationConfig
from starmesh.sim.evacuations import Evacuations
from starmesh.sim.events import EventLoop
from starmesh.sim.expectations import Expectations
from starmesh.sim.handoff import Handoffs
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.measurements import Measurements
from starmesh.sim.migrations import Migrations
from starmesh.sim.network import Network
from starmesh.sim.outcome import RequestOutcome
from starmesh.sim.owners import Owners
from starmesh.sim.predictors import SimulatedPredictor
from starmesh.sim.rounds import Rounds
from starmesh.sim.router import LOOK_S, Router
from starmesh.sim.token_times import TokenTimes
from starmesh.sim.views import Views
from starmesh.sim.workload import SimulatedRequest
from starmesh.types import InstanceInfo, InstanceState, Migration, Role


class Cluster:
    """What ``config`` describes, on ``loop``. ``over`` is set once no request is left or will come: then it comes to
    rest."""

    def __init__(
        self,
        loop: EventLoop,
        config: SimulationConfig,
        predictor: SimulatedPredictor | None,
        measurements: Measurements,
    ) -> None:
        self.loop = loop
        self.instances: dict[str, SimulatedInstance] = {}
        self.over = False
        self._config = config
        decode = _shared(config) if config.strategy.perfect_balance else config.profile
        self._profiles = {Role.PREFILL: config.profile, Role.DECODE: decode}
        self._measurements = measurements
        self._predictor = predictor
        self._total_tokens: dict[str, int] = {}
        self._token_times = TokenTimes()
        self._streams = 0
        self.network = Network(loop)
        self._owners = Owners(loop)
        self.migrations = Migrations(loop, self.network, self.instances, self._owners, profile=decode, listener=self)
        self.views = Views(
            loop,
            report_interval_s=config.report_interval_s,
            look_interval_s=LOOK_S,
            block_tokens=decode.layout.block_tokens,
            predictor=predictor,
            facts_of=self._facts_of,
            migrations_of=lambda name: (self.migrations.outgoing(name), self.migrations.incoming(name)),
        )
        rescheduling = ReschedulingConfig(policy=config.strategy.rescheduling, cost=decode.cost)
        moves = config.strategy.rescheduling != "none"
        self.evacuations = Evacuations(
            loop,
            self.views,
            rescheduling,
            interval_s=config.report_interval_s,
            relieve=moves,
            begin=self.begin_migration,
        )
        handoffs = Handoffs(self.network, self.instances, profile=decode)
        self.router = Router(
            loop,
            dataclasses.replace(config, profile=decode),
            POLICIES[config.strategy.dispatch],
            self.views,
            self._owners,
            self.instances,
            predictor,
            handoffs.start,
            self.evacuations.changed,
            self._ended,
        )
        self.rounds: Rounds | None = None
        if moves and not config.strategy.perfect_balance:
            self.rounds = Rounds(
                loop,
                self.views,
                rescheduling,
                interval_s=config.round_interval_s,
                begin=self.begin_migration,
                over=lambda: self.over,
            )
        for number in range(config.prefill_instances):
            self._join(config.instance_id(Role.PREFILL, number), Role.PREFILL)
        for number in range(1 if config.strategy.perfect_balance else config.decode_instances):
            self._join(config.instance_id(Role.DECODE, number), Role.DECODE)
        for fault in config.faults:
            loop.at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]

    def arrive(self, number: int, request: SimulatedRequest) -> None:
        """A client asks."""
        self._total_tokens[request.request_id] = request.prompt_tokens + request.output_tokens
        self.router.arrive(number, request)

    def begin_migration(self, migration: Migration) -> bool:
        """Have a sequence move. Returns whether its source has taken the order."""
        flight = self.router.flights.get(migration.request_id)
        if flight is None or flight.decode_id != migration.source or not flight.decoding:
            return False
        return self.migrations.start(migration)

    def check_at_rest(self) -> None:
        """Once all is over: nothing may be left on any instance. Raises IntegrityError."""
        for instance in self.instances.values():
            instance.core.check_integrity()
            load = instance.core.load()
            if load.free_blocks != load.total_blocks:
                raise IntegrityError(f"{instance.info.instance_id} still holds blocks: {instance.core!r}")

    # What instances tell (``InstanceListener``).

    def outputs(self, instance: SimulatedInstance, outputs: Sequence[SequenceOutput]) -> None:
        """A step has ended."""
        for output in outputs:
            flight = self.router.flights.get(output.request_id)
            if flight is None or output.epoch < flight.epoch:
                continue
            ended = output.finish_reason is not None
            if instance.info.role is Role.PREFILL:
                self.router.prefilled(output.request_id, ended=ended)
            elif ended:
                self.migrations.sequence_ended(output.request_id)
                self.views.report(instance.info.instance_id)
                self.router.finished(output.request_id, output_tokens=output.offset + len(output.token_ids))

    def gaps(self, instance: SimulatedInstance, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        """Each of ``sequences`` sequences got its tokens so far apart."""
        self._measurements.gaps(gaps_s, sequences)

    def preempted(self, instance: SimulatedInstance, request_ids: Sequence[str]) -> None:
        """These have lost their blocks."""
        self._measurements.preempted(len(request_ids))
        for request_id in request_ids:
            self.migrations.sequence_preempted(request_id)
            self.router.preempted(request_id)
        self.evacuations.changed(instance.info.instance_id)

    # What migrations tell.

    def migration_moved(self, request_id: str, source_id: str, target_id: str, epoch: int) -> None:
        """The target owns the sequence."""
        source = self.instances.get(source_id)
        sequence = None if source is None else source.core.scheduler.sequences.get(request_id)
        self.router.moved(request_id, target_id, epoch, output_tokens=0 if sequence is None else sequence.output_tokens)
        self.views.report(target_id)
        self.evacuations.changed(target_id)

    def migration_ended(
        self,
        migration: Migration,
        *,
        moved: bool,
        cause: Cause | None,
        duration_s: float,
        size_bytes: int,
        stood_still_s: float,
    ) -> None:
        """A migration is over at its source."""
        self.views.report(migration.source)
        self._measurements.migration_ended(
            migration,
            moved=moved,
            cause=cause,
            duration_s=duration_s,
            size_bytes=size_bytes,
            stood_still_s=stood_still_s,
        )
        if self.rounds is not None:
            self.rounds.migration_ended(migration, moved=moved, cause=cause, duration_s=duration_s)
        self.evacuations.migration_ended(migration, moved=moved, cause=cause, duration_s=duration_s)

    # Instances come and go.

    def _join(self, instance_id: str, role: Role) -> None:
        profile = self._profiles[role]
        info = InstanceInfo(
            instance_id=instance_id,
            incarnation=f"{instance_id}/{self._streams}",
            role=role,
            address=instance_id,
            layout=profile.layout,
            max_sequence_tokens=profile.max_sequence_tokens,
            max_sequences=profile.max_sequences,
        )
        instance = SimulatedInstance(
            self.loop,
            profile,
            info=info,
            seed=self._config.seed,
            stream=self._streams,
            total_tokens=self._total_tokens,
            token_times=self._token_times,
            listener=self,
            every_step=self._config.every_step,
        )
        self._streams += 1
        self.instances[instance_id] = instance
        self.network.add(instance_id, profile.link)
        self.views.add(instance)
        if role is Role.DECODE:
            self.evacuations.add(instance)
            if self._predictor is not None:
                instance.core.expect(Expectations(self.loop, instance.core, self._predictor, facts_of=self._facts_of))

    def _strike(self, fault: Fault) -> None:
        if fault.kind is FaultKind.JOIN:
            if fault.instance_id not in self.instances:
                self._join(fault.instance_id, fault.role)
            return
        instance = self.instances.get(fault.instance_id)
        if instance is None:
            return
        if fault.kind is FaultKind.DRAIN:
            instance.info = dataclasses.replace(instance.info, state=InstanceState.DRAINING)
            self.views.states_changed()
            self.evacuations.changed(fault.instance_id)
        else:
            self._die(instance)

    def _die(self, instance: SimulatedInstance) -> None:
        instance_id = instance.info.instance_id
        tokens = {row.request_id: row.output_tokens for row in SequenceLoads.of(instance.load().sequences)}
        tokens |= {output.request_id: output.offset + len(output.token_ids) for output in instance.under_way}
        instance.kill()
        del self.instances[instance_id]
        self.views.remove(instance_id)
        self.evacuations.remove(instance_id)
        self.network.remove(instance_id)
        self.migrations.instance_died(instance_id)
        self.router.lost(instance_id, tokens)

    def _ended(self, outcome: RequestOutcome) -> None:
        del self._total_tokens[outcome.request_id]
        outcome.longest_gap_s = self._token_times.forget(outcome.request_id)
        self._measurements.finished(outcome)

    def _facts_of(self, request_id: str) -> tuple[int, int, int]:
        flight = self.router.flights.get(request_id)
        if flight is None:
            return (0, 0, 0)
        return (flight.number, flight.request.output_tokens, flight.request.max_output_tokens)


def _shared(config: SimulationConfig) -> Profile:
    """All decode instances as one whose sequences share them without rest: a step, recomputing included, costs as on
    each of them when the load is divided evenly, and their memory is one."""
    profile, count = config.profile, config.decode_instances
    cost = dataclasses.replace(
        profile.cost,
        step_sequence_s=profile.cost.step_sequence_s / count,
        step_token_s=profile.cost.step_token_s / count,
        prefill_token_s=profile.cost.prefill_token_s / count,
        prefill_pair_s=profile.cost.prefill_pair_s / count,
    )
    link = dataclasses.replace(profile.link, bytes_per_s=profile.link.bytes_per_s * count)
    return dataclasses.replace(
        profile,
        cost=cost,
        link=link,
        total_blocks=profile.total_blocks * count,
        max_sequences=profile.max_sequences * count,
        max_step_tokens=profile.max_step_tokens * count,
    )

"""Simulated decode instances whose sequences move, are preempted and lose their instances, run from seeds:
``python -m tests.sim.moving SEED`` tells one run event by event.

A seed draws the cluster, its requests, and how often and what it suffers. Whatever happens, a running sequence is its
owner's, and in the end each has all of its tokens, every migration is over and every block is free.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from starmesh.engine.engine import SequenceOutput
from starmesh.engine.sequence import SequenceStatus
from starmesh.migration.terms import EPOCHS_PER_MIGRATION, Cause
from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.sequence_loads import SequenceLoads
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.migrations import Migrations
from starmesh.sim.network import Network
from starmesh.sim.owners import Owners
from starmesh.sim.token_count import counted_spec
from starmesh.sim.token_times import TokenTimes
from starmesh.types import (
    FinishReason,
    InstanceInfo,
    InstanceState,
    KvLayout,
    Migration,
    MigrationReason,
    Role,
    SamplingParams,
)

MAX_EVENTS = 200_000
BLOCK_TOKENS = 16

PROFILE = Profile(
    name="small",
    cost=CostModel(0.01, 1e-4, 1e-6, 0.0, 1e8, 1e-5, 1e-9),
    layout=KvLayout("small", "bfloat16", layers=4, kv_heads=2, head_dim=64, block_tokens=BLOCK_TOKENS),
    total_blocks=400,
    link=Link(1e8, 1e-4),
    max_sequences=16,
    max_step_tokens=512,
    max_sequence_tokens=4096,
)
"""Steps of some 10 ms; a block of 32 KiB takes a third of a millisecond."""


@dataclasses.dataclass(slots=True)
class Request:
    """``ended`` counts its ends: in the end it is 1."""

    prompt_tokens: int
    output_tokens: int
    epoch: int = 0
    instance_id: str = ""
    ended: int = 0


class MovingCluster:
    """Decode instances, and a router of few words: it computes prompts where it places them, and begins again elsewhere
    what has lost its instance."""

    def __init__(
        self, profile: Profile = PROFILE, *, instances: int = 3, seed: int = 0, every_step: bool = False
    ) -> None:
        self.loop = EventLoop()
        self.profile = profile
        self.network = Network(self.loop)
        self.owners = Owners(self.loop)
        self.instances: dict[str, SimulatedInstance] = {}
        self.every: list[SimulatedInstance] = []
        self.requests: dict[str, Request] = {}
        self.migrations = Migrations(
            self.loop, self.network, self.instances, self.owners, profile=profile, listener=self
        )
        self.begun = 0
        self.ends: list[tuple[Migration, bool, Cause | None]] = []
        self.stood_still_s: list[float] = []
        self.size_bytes: list[int] = []
        self.durations_s: list[float] = []
        self.log: list[str] = []
        self._total_tokens: dict[str, int] = {}
        self._token_times = TokenTimes()
        for number in range(instances):
            self._join(f"d{number}", seed=seed, every_step=every_step)

    # What happens.

    def place(self, request_id: str, prompt_tokens: int, output_tokens: int, instance_id: str) -> None:
        """A request comes."""
        self._total_tokens[request_id] = prompt_tokens + output_tokens
        self.requests[request_id] = Request(prompt_tokens, output_tokens)
        self._begin(request_id, instance_id, output_tokens=0)

    def move(self, request_id: str, target_id: str) -> bool:
        """Order a migration."""
        request = self.requests[request_id]
        migration = Migration(request_id, request.instance_id, target_id, request.epoch, MigrationReason.LOAD)
        self.note(f"{request_id} is to move from {request.instance_id} to {target_id}")
        taken = self.migrations.start(migration)
        self.begun += taken
        return taken

    def kill(self, instance_id: str) -> None:
        """An instance dies. What it had begins anew elsewhere, from the tokens that the router has."""
        self.note(f"{instance_id} dies")
        instance = self.instances[instance_id]
        tokens = {row.request_id: row.output_tokens for row in SequenceLoads.of(instance.load().sequences)}
        instance.kill()
        del self.instances[instance_id]
        self.network.remove(instance_id)
        self.migrations.instance_died(instance_id)
        left = list(self.instances)
        for number, (request_id, request) in enumerate(self.requests.items()):
            if request.instance_id == instance_id and not request.ended:
                # The step under way counts in the load, though its token will never be told.
                known = max(0, min(tokens.get(request_id, 0), request.output_tokens - 1))
                self._begin(request_id, left[number % len(left)], output_tokens=known)

    def drain(self, instance_id: str) -> None:
        """An instance takes nothing new."""
        instance = self.instances[instance_id]
        instance.info = dataclasses.replace(instance.info, state=InstanceState.DRAINING)

    def run(self, *, until_s: float = float("inf")) -> None:
        """Let events happen up to a time, or all."""
        turns = 0
        while (next_s := self.loop.next_s) is not None and next_s <= until_s:
            self.loop.turn()
            self.check()
            turns += 1
            assert turns < MAX_EVENTS, "it comes to no end"

    def note(self, what: str) -> None:
        """Add to the log."""
        self.log.append(f"{self.loop.now_s:.9f} {what}")

    # What must hold.

    def check(self) -> None:
        """Whoever runs a sequence, or would as soon as it has blocks, owns it under its epoch."""
        for instance_id, instance in self.instances.items():
            for sequence in instance.core.scheduler.sequences.values():
                owner = self.owners.owner(sequence.request_id)
                held = sequence.status is SequenceStatus.HELD
                if not held:
                    assert owner is not None, f"nobody owns {sequence.request_id}"
                    assert (owner.instance_id, owner.epoch) == (instance_id, sequence.epoch), sequence.request_id

    def check_at_rest(self) -> None:
        """Nothing is left of anything."""
        assert {name: request.ended for name, request in self.requests.items()} == dict.fromkeys(self.requests, 1)
        assert len(self.ends) == self.begun
        assert len(self.owners) == 0
        for instance in self.every:
            instance_id = instance.info.instance_id
            assert (self.migrations.outgoing(instance_id), self.migrations.incoming(instance_id)) == (0, 0)
        for instance in self.instances.values():
            instance.core.check_integrity()
            load = instance.core.load()
            assert load.free_blocks == load.total_blocks, f"{instance!r} keeps blocks"

    # What instances and migrations tell.

    def outputs(self, instance: SimulatedInstance, outputs: Sequence[SequenceOutput]) -> None:
        for output in outputs:
            if output.finish_reason is None:
                continue
            request_id = output.request_id
            request = self.requests[request_id]
            self.note(f"{request_id} ends on {instance.info.instance_id}")
            assert output.finish_reason is FinishReason.STOP
            assert output.offset + len(output.token_ids) == request.output_tokens
            owner = self.owners.owner(request_id)
            assert owner is not None
            assert (owner.instance_id, owner.epoch) == (instance.info.instance_id, output.epoch)
            request.ended += 1
            self.migrations.sequence_ended(request_id)
            self.owners.disown(request_id)

    def gaps(self, instance: SimulatedInstance, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        assert (gaps_s > 0).all()

    def preempted(self, instance: SimulatedInstance, request_ids: Sequence[str]) -> None:
        self.note(f"{instance.info.instance_id} preempts {', '.join(request_ids)}")
        for request_id in request_ids:
            self.migrations.sequence_preempted(request_id)

    def migration_moved(self, request_id: str, source_id: str, target_id: str, epoch: int) -> None:
        self.note(f"{request_id} has moved from {source_id} to {target_id} under {epoch}")
        request = self.requests[request_id]
        assert request.instance_id == source_id and epoch == request.epoch + 1
        request.instance_id, request.epoch = target_id, epoch

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
        self.note(f"the migration of {migration.request_id} ends, {moved=}, {cause=}, {size_bytes} bytes")
        self.ends.append((migration, moved, cause))
        self.size_bytes.append(size_bytes)
        self.stood_still_s.append(stood_still_s)
        self.durations_s.append(duration_s)
        owner = self.owners.owner(migration.request_id)
        if cause is not None and owner is not None and migration.source in self.instances:
            # It may have been taken back under another epoch.
            self.requests[migration.request_id].epoch = owner.epoch

    def _join(self, instance_id: str, *, seed: int, every_step: bool) -> None:
        profile = self.profile
        info = InstanceInfo(
            instance_id=instance_id,
            incarnation=instance_id,
            role=Role.DECODE,
            address=instance_id,
            layout=profile.layout,
            max_sequence_tokens=profile.max_sequence_tokens,
            max_sequences=profile.max_sequences,
        )
        instance = self.instances[instance_id] = SimulatedInstance(
            self.loop,
            profile,
            info=info,
            seed=seed,
            stream=len(self.every),
            total_tokens=self._total_tokens,
            token_times=self._token_times,
            listener=self,
            every_step=every_step,
        )
        self.every.append(instance)
        self.network.add(instance_id, profile.link)

    def _begin(self, request_id: str, instance_id: str, *, output_tokens: int) -> None:
        request = self.requests[request_id]
        request.epoch += EPOCHS_PER_MIGRATION + 1
        request.instance_id = instance_id
        self.owners.assign(request_id, instance_id, request.epoch)
        spec = counted_spec(
            request_id,
            request.epoch,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
            sampling=SamplingParams(max_output_tokens=request.output_tokens + 7),
        )

        def added(result: object) -> None:
            assert result is None, result

        self.instances[instance_id].call(lambda core: core.add(spec), added)


def random_cluster(seed: int, *, every_step: bool | None = None) -> MovingCluster:
    """The cluster of a seed, with all that will happen to it asked for. Some make each step by itself."""
    draw = random.Random(seed)
    profile = dataclasses.replace(
        PROFILE,
        # The smallest pool holds the longest sequence and little more: then others are preempted.
        total_blocks=draw.choice((24, 48, 400)),
        link=Link(draw.choice((3e5, 3e6, 1e8)), draw.choice((1e-5, 1e-3, 0.02))),
        max_sequences=draw.choice((2, 4, 16)),
        step_noise=draw.choice((0.0, 0.1)),
    )
    single = draw.random() < 0.3
    cluster = MovingCluster(profile, seed=seed, every_step=single if every_step is None else every_step)
    names = [f"q{number}" for number in range(draw.randint(2, 8))]
    for name in names:
        prompt_tokens, output_tokens = draw.randint(1, 120), draw.randint(1, 230)
        instance_id = draw.choice(("d0", "d0", "d1", "d2"))
        at_s = draw.uniform(0.0, 0.5)
        cluster.loop.at(
            at_s, lambda name=name, p=prompt_tokens, o=output_tokens, i=instance_id: placed(cluster, name, p, o, i)
        )
    for _ in range(draw.randint(1, 60)):
        name, choice = draw.choice(names), draw.randrange(12)
        cluster.loop.at(draw.uniform(0.0, 4.0), lambda name=name, choice=choice: ordered(cluster, name, choice))
    for _ in range(draw.choice((0, 0, 1, 2))):
        instance_id = draw.choice(("d0", "d1", "d2"))
        cluster.loop.at(draw.uniform(0.0, 3.0), lambda i=instance_id: killed(cluster, i))
    if draw.random() < 0.2:
        cluster.loop.at(draw.uniform(0.0, 2.0), lambda: "d1" in cluster.instances and cluster.drain("d1"))
    return cluster


def placed(cluster: MovingCluster, name: str, prompt_tokens: int, output_tokens: int, instance_id: str) -> None:
    """Place a request at an instance, or another if that one is gone."""
    there = instance_id if instance_id in cluster.instances else next(iter(cluster.instances))
    cluster.place(name, prompt_tokens, output_tokens, there)


def ordered(cluster: MovingCluster, name: str, choice: int) -> None:
    """Order a migration of what is there to move, to an instance that may have died."""
    request = cluster.requests.get(name)
    if request is not None and not request.ended:
        targets = [each.info.instance_id for each in cluster.every if each.info.instance_id != request.instance_id]
        cluster.move(name, targets[choice % len(targets)])


def killed(cluster: MovingCluster, instance_id: str) -> None:
    """Kill an instance unless it is the last."""
    if instance_id in cluster.instances and len(cluster.instances) > 1:
        cluster.kill(instance_id)


def run_seed(seed: int) -> MovingCluster:
    """A whole run. Raises AssertionError, naming the command that replays it."""
    cluster = random_cluster(seed)
    try:
        cluster.run()
        cluster.check_at_rest()
    except Exception as error:
        raise AssertionError(f"{error!r}; replay it: python -m tests.sim.moving {seed}") from error
    return cluster


def main() -> None:
    """Tell one run."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.moving")
    parser.add_argument("seed", type=int)
    cluster = random_cluster(parser.parse_args().seed)
    try:
        cluster.run()
        cluster.check_at_rest()
    finally:
        print("\n".join(cluster.log))


if __name__ == "__main__":
    main()

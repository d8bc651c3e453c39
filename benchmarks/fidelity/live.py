"""Runs the same through a live cluster: real processes, gRPC, Redis and KV bytes; only the forward is emulated.

Owns the cluster's flags, which say what the simulation's configuration says, and the client. The client sends each
request when it is due, whatever the cluster makes of those before, over one GenerateMany stream, and stamps each token
as it gets it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil  # type: ignore[import-untyped]

from benchmarks.fidelity.served import MOVED, Move, Run, Served
from benchmarks.fidelity.spans import Span, SpanReceiver
from starmesh.cli.local_cluster import ClusterPlan, LocalCluster, start_cluster
from starmesh.cli.local_options import flags
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient, connect
from starmesh.emulation.requests import emulated_request
from starmesh.profiles import Profile
from starmesh.profiles.profile_file import write_profile
from starmesh.sim.config import SimulationConfig
from starmesh.sim.workload import SimulatedRequest
from starmesh.telemetry import names
from starmesh.v1 import cluster_pb2, inference_pb2, sequence_pb2

LOOK_S = 0.5
START_S = 1.0
"""Seconds from the connection to the beginning of a run: the router has seen all instances by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the machine was like meanwhile. ``step_drift`` is by how much the decode instances' steps took longer than
    emulated, in the mean over looks at their loads; ``cpu_s`` the CPU time of each service by its id, and of the
    client. ``sent_late_s`` is the latest that a request was sent."""

    load_average: tuple[float, float]
    duration_s: float
    step_drift: float
    cpu_s: dict[str, float]
    sent_late_s: float
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Answer:
    times_s: list[float] = field(default_factory=list)
    migrations: int = 0
    finish_reason: sequence_pb2.FinishReason.ValueType = sequence_pb2.FINISH_REASON_UNSPECIFIED
    failure: str = ""


def plan_of(config: SimulationConfig, directory: Path) -> ClusterPlan:
    """The cluster that ``config`` simulates; its profile is written into ``directory``."""
    profile_path = directory / f"{config.profile.name}-fidelity.toml"
    write_profile(config.profile, profile_path)
    own = flags({"--engine": "emulated", "--profile": str(profile_path)})
    moves = config.strategy.rescheduling != "none"
    admission = config.admission
    return ClusterPlan(
        model=None,
        run_directory=directory,
        prefill=config.prefill_instances,
        decode=config.decode_instances,
        predict=False,
        engine_flags=(*own, "--transfer", "stream"),
        # Without moves nobody relieves itself either.
        decode_flags=() if moves else flags({"--max-outgoing-migrations": 0}),
        router_flags=(
            *own,
            *flags(
                {
                    "--dispatch-policy": config.strategy.dispatch,
                    "--queue-length": config.queue_length,
                    "--queue-timeout-s": config.queue_timeout_s,
                    "--reserve-output-tokens": admission.headroom_tokens,
                    "--max-duration-s": 3600,
                }
            ),
        ),
        rescheduler_flags=(
            *own,
            *flags({"--policy": config.strategy.rescheduling, "--round-interval-s": config.round_interval_s}),
        ),
        shared_flags=flags({"--report-interval-s": config.report_interval_s}),
    )


async def serve(
    config: SimulationConfig, requests: Sequence[SimulatedRequest], directory: Path, note: Callable[[str], None]
) -> tuple[Run, Conditions, list[Span]]:
    """Start a cluster, have it answer ``requests``, and end it. The services' spans come with what became of all."""
    async with SpanReceiver() as receiver:
        with _environment(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OMP_NUM_THREADS="1"):
            async with (
                start_cluster(plan_of(config, directory), note) as cluster,
                connect(cluster.address) as router,
            ):
                client = _Client(router, requests)
                looks = _Looks(router, cluster, config.profile)
                before_load = os.getloadavg()[0]
                async with looks.running():
                    await client.run(note)
                preemptions = await looks.preemptions()
        # The cluster has ended, and with it all spans have come.
    conditions = Conditions(
        load_average=(round(before_load, 1), round(os.getloadavg()[0], 1)),
        duration_s=client.ended_s,
        step_drift=looks.step_drift,
        cpu_s=looks.cpu_s,
        sent_late_s=client.late_s,
        warnings=_warnings(directory),
    )
    moves = tuple(_move(span) for span in receiver.spans if span.name == names.SPAN_MIGRATION_SOURCE)
    spans = [span.since(client.began_at_s) for span in receiver.spans]
    return client.outcome(moves, preemptions), conditions, spans


class _Client:
    def __init__(self, router: RouterClient, requests: Sequence[SimulatedRequest]) -> None:
        self.late_s = self.ended_s = 0.0
        self.began_at_s = 0.0  # of the machine's wall clock, as spans have it
        self._router = router
        self._requests = requests
        self._messages = [
            emulated_request(
                request.prompt_tokens,
                request.output_tokens,
                request_id=request.request_id,
                max_output_tokens=request.max_output_tokens,
            )
            for request in requests
        ]
        self._answers = {request.request_id: _Answer() for request in requests}
        self._start_s = 0.0

    async def run(self, note: Callable[[str], None]) -> None:
        """Send all requests and take all answers."""
        call = self._router.inference.GenerateMany(timeout=3600)
        self._start_s = time.monotonic() + START_S
        self.began_at_s = time.time() + START_S
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(call))
            tasks.create_task(self._take(call, note))
        self.ended_s = time.monotonic() - self._start_s

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        for request, message in zip(self._requests, self._messages, strict=True):
            due_s = self._start_s + request.arrives_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self.late_s = max(self.late_s, time.monotonic() - due_s)
            await call.write(inference_pb2.GenerateManyRequest(generate=message))
        await call.done_writing()

    async def _take(self, call: grpc.aio.StreamStreamCall, note: Callable[[str], None]) -> None:  # type: ignore[type-arg]
        ended = 0
        async for message in call:
            now_s = time.monotonic() - self._start_s
            for piece in message.responses:
                answer = self._answers[piece.request_id]
                answer.times_s += [now_s] * len(piece.token_ids)
                if piece.finish_reason:
                    answer.finish_reason = piece.finish_reason
                    answer.migrations = piece.usage.migrations
                    ended += 1
                    if ended % 50 == 0:
                        note(f"{ended} of {len(self._requests)} requests have ended after {now_s:.0f} s")
            for failure in message.failures:
                self._answers[failure.request_id].failure = failure.status.message or "failed"

    def outcome(self, moves: tuple[Move, ...], preemptions: int) -> Run:
        """What became of all."""
        served, unserved = [], {}
        for request in self._requests:
            answer = self._answers[request.request_id]
            if answer.failure or len(answer.times_s) != request.output_tokens:
                unserved[request.request_id] = answer.failure or (
                    f"{len(answer.times_s)} of {request.output_tokens} tokens, "
                    f"{sequence_pb2.FinishReason.Name(answer.finish_reason)}"
                )
                continue
            gaps = (after - before for before, after in itertools.pairwise(answer.times_s))
            served.append(
                Served(
                    request_id=request.request_id,
                    prompt_tokens=request.prompt_tokens,
                    output_tokens=request.output_tokens,
                    asked_s=request.arrives_s,
                    first_token_s=answer.times_s[0],
                    finished_s=answer.times_s[-1],
                    longest_gap_s=max(gaps, default=0.0),
                    migrations=answer.migrations,
                )
            )
        return Run(served=tuple(served), moves=moves, preemptions=preemptions, unserved=unserved)


class _Looks:
    """Looks at the instances' loads and at the processes' CPU time."""

    def __init__(self, router: RouterClient, cluster: LocalCluster, profile: Profile) -> None:
        self.cpu_s: dict[str, float] = {}
        self._router = router
        self._profile = profile
        self._processes = {process.spec.instance_id: psutil.Process(process.pid) for process in cluster.processes}
        self._processes["client"] = psutil.Process()
        self._taken_s = self._due_s = 0.0

    @property
    def step_drift(self) -> float:
        """How much longer steps took than they should have, as a part of that."""
        return self._taken_s / self._due_s - 1 if self._due_s else 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks at it all while it is entered."""
        before_s = {name: _cpu_s(process) for name, process in self._processes.items()}
        looking = asyncio.create_task(self._look_on())
        try:
            yield
        finally:
            looking.cancel()
            self.cpu_s = {name: _cpu_s(process) - before_s[name] for name, process in self._processes.items()}

    async def preemptions(self) -> int:
        """Of all decode instances, as they last reported."""
        await asyncio.sleep(2 * LOOK_S)  # the last reports
        return sum(int(instance.load.preemptions) for instance in await self._decode_instances())

    async def _look_on(self) -> None:
        cost = self._profile.cost
        while True:
            await asyncio.sleep(LOOK_S)
            for instance in await self._decode_instances():
                load = instance.load
                step_s = load.step_duration.ToNanoseconds() / 1e9
                if load.running_sequences and step_s:
                    self._taken_s += step_s
                    self._due_s += cost.step_s(load.running_sequences, load.resident_tokens)

    async def _decode_instances(self) -> list[cluster_pb2.Instance]:
        response = await self._router.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=CALL_TIMEOUT_S)
        return [each for each in response.instances if each.role == cluster_pb2.ROLE_DECODE]


def _move(span: Span) -> Move:
    outcome = str(span.attributes.get(names.MIGRATION_OUTCOME, "unknown"))
    return Move(
        request_id=span.request_id,
        reason=str(span.attributes[names.MIGRATION_REASON]),
        outcome=MOVED if outcome == "moved" else str(span.attributes.get(names.MIGRATION_CAUSE, outcome)),
        duration_s=span.duration_s,
        stood_still_s=float(span.attributes.get(names.MIGRATION_FROZEN_S, 0.0)),
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _warnings(directory: Path) -> tuple[str, ...]:
    """Lines of the services' logs at WARNING and above, each once, without their times."""
    found: dict[str, None] = {}
    for log in sorted(directory.glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            _, level, rest = (*line.partition(" WARNING "),) if " WARNING " in line else (*line.partition(" ERROR "),)
            if level:
                found[f"{log.stem}: {rest}"] = None
    return tuple(found)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that processes which start meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

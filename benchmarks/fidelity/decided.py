"""Simulates a live run once more, with each request placed, and each moved, where and when it was live.

What is left of a difference is that of instances, handoffs and migrations: what a request meets once that is decided.
What goes away is that of decisions, where a few milliseconds or a report that is a little older send a request
elsewhere, and with it all that follow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.fidelity.served import Run
from benchmarks.fidelity.simulated import simulate
from benchmarks.fidelity.spans import Span
from starmesh.policy.dispatch import (
    POLICIES,
    Decision,
    DispatchConfig,
    DispatchMemory,
    DispatchPolicy,
    DispatchRequest,
)
from starmesh.policy.dispatch.decision import Choice
from starmesh.sim.cluster import Cluster
from starmesh.sim.config import SimulationConfig
from starmesh.sim.workload import SimulatedRequest
from starmesh.telemetry import names
from starmesh.types import ClusterView, KvLayout, Migration, MigrationReason


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the router put a request, and when."""

    at_s: float
    prefill_id: str
    decode_id: str


@dataclass(frozen=True, slots=True)
class Moved:
    """An order to move a request, and when its source took it."""

    at_s: float
    request_id: str
    source_id: str
    target_id: str
    reason: MigrationReason


def placements(spans: Iterable[Span]) -> dict[str, Placed]:
    """The first placement of each request."""
    found: dict[str, Placed] = {}
    for span in sorted(spans, key=lambda span: span.ended_s):
        if span.name == names.SPAN_DISPATCH:
            instances = (str(span.attributes[name]) for name in (names.PREFILL_INSTANCE, names.DECODE_INSTANCE))
            found.setdefault(span.request_id, Placed(span.ended_s, *instances))
    return found


def moves(spans: Iterable[Span]) -> list[Moved]:
    """All orders that were taken, whatever came of them."""
    return [
        Moved(
            at_s=span.began_s,
            request_id=span.request_id,
            source_id=str(span.attributes[names.INSTANCE_ID]),
            target_id=str(span.attributes[names.TARGET_INSTANCE]),
            reason=MigrationReason(span.attributes[names.MIGRATION_REASON]),
        )
        for span in spans
        if span.name == names.SPAN_MIGRATION_SOURCE
    ]


@dataclass(frozen=True, slots=True)
class AsDecided:
    """``run`` is what came of it. Of its ``decided`` requests, the simulator's own dispatch would have put ``agreed``
    on the same decode instance at that moment, and to ``full`` it would have found no room."""

    run: Run
    placed: int
    agreed: int
    full: int


def simulate_as_decided(
    config: SimulationConfig, requests: Iterable[SimulatedRequest], spans: Iterable[Span], directory: Path
) -> AsDecided:
    """``config`` with ``requests`` as the live run of ``spans`` placed and moved them; nobody else moves any."""
    placed = placements(spans)
    known = sorted(
        (request for request in requests if request.request_id in placed),
        key=lambda request: placed[request.request_id].at_s,
    )
    path = directory / "placed.jsonl"
    # The reader counts from the first one.
    first_s = placed[known[0].request_id].at_s
    with path.open("w") as file:
        for request in known:
            values = dataclasses.asdict(request) | {"arrives_s": placed[request.request_id].at_s - first_s}
            file.write(json.dumps(values) + "\n")
    # The simulator's ids have the place in the file before ours.
    ids = {f"r{number:07d}-{request.request_id}": request for number, request in enumerate(known)}
    names_there = {request.request_id: name for name, request in ids.items()}
    own: list[Decision] = []

    def prepare(cluster: Cluster) -> None:
        cluster.router.policy = _AsDecided(
            "as_decided",
            pick=lambda candidates, request, memory, config: None,
            by_id={name: placed[request.request_id] for name, request in ids.items()},
            policy=cluster.router.policy,
            decided=own,
        )
        for moved in moves(spans):
            cluster.loop.at(moved.at_s - first_s, partial(_move, cluster, moved, names_there[moved.request_id]))

    config = dataclasses.replace(
        config,
        strategy=dataclasses.replace(config.strategy, rescheduling="none"),
        workload=dataclasses.replace(config.workload, trace_path=str(path)),
    )
    run = simulate(config, prepare=prepare)
    served = tuple(
        dataclasses.replace(
            each,
            request_id=ids[each.request_id].request_id,
            asked_s=ids[each.request_id].arrives_s,
            first_token_s=each.first_token_s + first_s,
            finished_s=each.finished_s + first_s,
        )
        for each in run.served
    )
    chosen = [decision.decode and decision.decode.instance_id for decision in own]
    there = [placed[request.request_id].decode_id for request in known]
    return AsDecided(
        run=dataclasses.replace(run, served=served),
        placed=len(known),
        agreed=sum(ours == theirs for ours, theirs in zip(chosen, there, strict=False)),
        full=chosen.count(None),
    )


@dataclass(frozen=True, slots=True)
class _AsDecided(DispatchPolicy):
    """Goes by ``by_id`` and never asks whether there is room: there was. What ``policy`` would have decided instead is
    added to ``decided``, for each first placement."""

    by_id: Mapping[str, Placed] = field(default_factory=dict)
    policy: DispatchPolicy = POLICIES["least_tokens"]
    decided: list[Decision] = field(default_factory=list)

    def choose(
        self, view: ClusterView, request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
    ) -> tuple[Decision, DispatchMemory]:
        placed = self.by_id[request.request_id]
        if len(self.decided) < len(self.by_id):
            decision, memory = self.policy.choose(view, request, memory, config)
            self.decided.append(decision)
        decision = Decision(_choice(placed.decode_id, request), _choice(placed.prefill_id, request))
        return decision, dataclasses.replace(memory, last_decode_id=placed.decode_id)

    def choose_decode(
        self,
        view: ClusterView,
        request: DispatchRequest,
        memory: DispatchMemory,
        config: DispatchConfig,
        *,
        layout: KvLayout,
    ) -> tuple[Decision, DispatchMemory]:
        return Decision(_choice(self.by_id[request.request_id].decode_id, request)), memory


def _move(cluster: Cluster, moved: Moved, request_id: str) -> None:
    flight = cluster.router.flights.get(request_id)
    if flight is not None:
        migration = Migration(request_id, moved.source_id, moved.target_id, flight.epoch, moved.reason)
        cluster.begin_migration(migration)


def _choice(instance_id: str, request: DispatchRequest) -> Choice:
    tokens = request.need.tokens + 1
    return Choice(instance_id, tokens, tokens)

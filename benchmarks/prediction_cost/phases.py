"""The phases: what is done to the predictor while a decode instance steps, and what its steps take meanwhile.

Two instances have a full batch all the time; one is stopped while the other decodes, so that phases can take turns
without filling a batch anew.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.prediction_cost.client import Batch, read_prompts
from benchmarks.prediction_cost.predictors import sampled_layout
from benchmarks.prediction_cost.processes import PLAIN, PREDICTING, PREDICTOR, Processes
from starmesh.rpc.channels import open_channel
from starmesh.types import HiddenLayout
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, predictor_pb2, predictor_pb2_grpc

ANSWERING = ("starmesh", "mlp")
"""Phases in which the predictor of that kind answers."""
PEERS = ("slow", "garbage")
"""Phases in which a peer answers."""
PHASES = (*ANSWERING, "killed", "hanging", "flooded", *PEERS)
PLAIN_PHASE = "plain"
SETTLING_STEPS = 2
FLOOD_SAMPLES = 2000
_POLL_S = 0.05
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One block of steps: their times; for each, CPU seconds of the decode instance, seconds that its threads waited
    for a core, and CPU seconds of what answers as the predictor (NaN where it has gone); the samples (of a peer: the
    calls) answered meanwhile; and the tokens since the last estimate of each sequence at the end, -1 without one."""

    steps_s: list[float]
    decode_cpu_s: float
    decode_wait_s: float
    predictor_cpu_s: float
    answered: int
    ages: list[int]


class Phases:
    """Measures blocks of steps on two full batches, one of which is stopped while the other decodes; made by
    ``open_phases``."""

    def __init__(self, processes: Processes, layout: HiddenLayout, batches: dict[str, Batch]) -> None:
        self._processes = processes
        self._layout = layout
        self._batches = batches

    async def measure(self, phase: str, steps: int) -> Measured:
        """Time ``steps`` steps. Before and after, the real predictor serves."""
        name = PLAIN if phase == PLAIN_PHASE else PREDICTING
        async with self._disturbed(phase):
            self._processes.pause(name, paused=False)
            try:
                if phase in (*ANSWERING, "flooded"):
                    await self._until_more_answers()
                await self._batches[name].steps(SETTLING_STEPS)
                return await self._measure(phase, name, steps)
            finally:
                self._processes.pause(name, paused=True)

    async def _measure(self, phase: str, name: str, steps: int) -> Measured:
        batch = self._batches[name]
        before = batch.messages
        answered = await self._answered(phase)
        (cpu_s, wait_s), predictor_s = self._processes.cpu_s(name), self._predictor_cpu_s(phase)
        times = await batch.steps(steps)
        (cpu_end_s, wait_end_s), predictor_end_s = self._processes.cpu_s(name), self._predictor_cpu_s(phase)
        made = batch.messages - before
        return Measured(
            steps_s=times,
            decode_cpu_s=(cpu_end_s - cpu_s) / made,
            decode_wait_s=(wait_end_s - wait_s) / made,
            predictor_cpu_s=(predictor_end_s - predictor_s) / made,
            ages=await self._ages(name),
            answered=await self._answered(phase) - answered,
        )

    @asynccontextmanager
    async def _disturbed(self, phase: str) -> AsyncIterator[None]:
        processes = self._processes
        if phase in PEERS or phase == "killed":
            await processes.stop_predictor(kill=True)
            if phase in PEERS:
                await processes.start_peer(phase)
            try:
                yield
            finally:
                if phase in PEERS:
                    await processes.stop_predictor()
                await processes.start_predictor()
        elif phase == "hanging":
            processes.pause(PREDICTOR, paused=True)
            try:
                yield
            finally:
                processes.pause(PREDICTOR, paused=False)
        elif phase == "flooded":
            flood = await processes.start_flood(self._layout)
            try:
                await self._until_more_answers(FLOOD_SAMPLES)
                yield
            finally:
                flood.kill()
                await flood.wait()
        else:
            if phase in ANSWERING:
                await self._promote(phase)
            yield

    def _predictor_cpu_s(self, phase: str) -> float:
        return math.nan if phase == "killed" else self._processes.cpu_s(PREDICTOR)[0]

    async def _answered(self, phase: str) -> int:
        if phase in ("killed", "hanging"):
            return 0
        async with open_channel(self._processes.address(PREDICTOR)) as channel:
            stub = predictor_pb2_grpc.PredictorServiceStub(channel)
            found = await stub.GetPredictor(predictor_pb2.GetPredictorRequest(), timeout=_TIMEOUT_S)
        return int(found.status.predictions)

    async def _until_more_answers(self, more: int = 1) -> None:
        before = await self._answered("")
        async with asyncio.timeout(_TIMEOUT_S):
            for _ in itertools.count():
                if await self._answered("") >= before + more:
                    return
                await asyncio.sleep(_POLL_S)

    async def _promote(self, kind: str) -> None:
        async with open_channel(self._processes.address(PREDICTOR)) as channel:
            stub = predictor_pb2_grpc.PredictorServiceStub(channel)
            await stub.PromotePredictor(predictor_pb2.PromotePredictorRequest(version=kind), timeout=_TIMEOUT_S)

    async def _ages(self, name: str) -> list[int]:
        async with open_channel(self._processes.address(name)) as channel:
            stub = cluster_pb2_grpc.InstanceServiceStub(channel)
            found = await stub.GetInstance(cluster_pb2.GetInstanceRequest(), timeout=_TIMEOUT_S)
        loads = found.instance.load.sequences
        return [load.prediction_age_tokens if load.HasField("prediction_age_tokens") else -1 for load in loads]


@asynccontextmanager
async def open_phases(processes: Processes, model: Path, batch: int) -> AsyncIterator[Phases]:
    """New batches of ``batch`` sequences at both decode instances."""
    prompts = read_prompts(model, batch)
    async with AsyncExitStack() as stack:
        batches = {}
        try:
            for name in (PLAIN, PREDICTING):
                processes.pause(name, paused=False)
                opened = Batch(processes.address("prefill"), processes.address(name), prompts)
                batches[name] = await stack.enter_async_context(opened)
                await opened.full()
                processes.pause(name, paused=True)
            yield Phases(processes, sampled_layout(model), batches)
        finally:
            for name in (PLAIN, PREDICTING):
                processes.pause(name, paused=False)

"""Commands to move requests, as an operator gives them, again and again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc.aio

from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, decode_pb2
from tests.mesh.processes import Mesh, until

STAGE = decode_pb2.MigrationStage
RETRY_S = 0.05
"""Between two commands for a request that could not move: it is not there yet, or as many as may be are under way."""


@dataclass
class Moves:
    """Moves requests of ``mesh`` between decode instances. ``ends`` counts how migrations ended, by request."""

    mesh: Mesh
    draw: random.Random
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    """Commands that began no migration, or whose end nobody told, by status code."""
    _cluster: cluster_pb2_grpc.ClusterServiceAsyncStub | None = None

    @property
    def cluster(self) -> cluster_pb2_grpc.ClusterServiceAsyncStub:
        """The router's, over one connection."""
        if self._cluster is None:
            self._cluster = self.mesh.cluster()
        return self._cluster

    def count(self, end: str) -> int:
        """How many migrations ended so: "MOVED" and the like."""
        return sum(ends[end] for ends in self.ends.values())

    async def move(self, request_id: str, to: str, *, traceparent: str = "") -> str:
        """Give one command and wait for the end of the migration. Returns its last stage, or the status code."""
        asked = cluster_pb2.MigrateSequenceRequest(request_id=request_id, target_instance_id=to)
        metadata = (("traceparent", traceparent),) if traceparent else ()
        stage = STAGE.MIGRATION_STAGE_UNSPECIFIED
        try:
            async for told in self.cluster.MigrateSequence(asked, timeout=60, metadata=metadata):
                stage = told.progress.stage
        except grpc.aio.AioRpcError as error:
            self.refused[error.code().name] += 1
            return error.code().name
        end = STAGE.Name(stage).removeprefix("MIGRATION_STAGE_")
        self.ends.setdefault(request_id, Counter())[end] += 1
        return end

    async def until_moved(self, request_id: str, to: str) -> None:
        """Move a request there: again where it stays, for it may rightly outgrow the room that was made for it."""

        async def moved() -> bool:
            return await self.move(request_id, to) == "MOVED"

        await until(moved, f"{request_id} to move to {to}", describe=lambda: f"{self.ends} {self.refused}")

    async def wander(
        self,
        request_id: str,
        among: list[str],
        ended: asyncio.Event,
        *,
        pause_s: float = 0.0,
        may_move: Callable[[], bool] = lambda: True,
    ) -> None:
        """Move a request from instance to instance, after pauses of up to ``pause_s`` and whenever it ``may_move``,
        until it has ended."""
        here = ""
        while not ended.is_set():
            if not may_move():
                await asyncio.sleep(RETRY_S)
                continue
            to = self.draw.choice([name for name in among if name != here])
            end = await self.move(request_id, to)
            if end == "MOVED":
                here = to
            await asyncio.sleep(self.draw.random() * pause_s if end == "MOVED" else RETRY_S)

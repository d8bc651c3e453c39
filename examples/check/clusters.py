"""Live clusters for the trials: ``starmesh up`` with emulated instances, and what a trial asks the router itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio

from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, decode_pb2, inference_pb2, inference_pb2_grpc

# A busy machine takes several times as long as a quiet one.
START_TIMEOUT_S: Final = 180.0
GONE_TIMEOUT_S: Final = 60.0
MOVE_TIMEOUT_S: Final = 60.0
CALL_TIMEOUT_S: Final = 30.0
_END_TIMEOUT_S = 60.0
_READY = "the cluster is ready at "
_UP: Final = ("--engine", "emulated", "--profile", "h100-7b", "--predictor", "none", "--policy", "none", "--port", "0")


class NotStarted(Exception):
    """A cluster did not come up; the message has the end of what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What clients need at a router with TLS and keys."""

    ca: Path
    stranger_ca: Path
    """Of another mesh."""
    key: str
    busy_key: str
    """May have one request running."""


class Cluster:
    """A running cluster, as its operator sees it."""

    def __init__(self, address: str, channel: grpc.aio.Channel, security: Security | None = None) -> None:
        self.address = address
        self.security = security
        self.metadata = () if security is None else (("authorization", f"Bearer {security.key}"),)
        self.inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)

    async def instances(self) -> list[cluster_pb2.Instance]:
        """All instances."""
        request = cluster_pb2.ListInstancesRequest()
        return list(
            (await self.cluster.ListInstances(request, timeout=CALL_TIMEOUT_S, metadata=self.metadata)).instances
        )

    async def wait_until_known(self, key: str) -> None:
        """Return when the router, which follows its file of keys, admits calls with ``key``. Raises TimeoutError."""
        metadata = (("authorization", f"Bearer {key}"),)
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    await self.inference.GetModel(
                        inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S, metadata=metadata
                    )
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                        raise
                    await asyncio.sleep(0.1)
                else:
                    return

    async def cancel(self, request_id: str) -> None:
        """Cancel a request. Raises AioRpcError: NOT_FOUND when the router has none of that id."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        await self.inference.Cancel(request, timeout=CALL_TIMEOUT_S, metadata=self.metadata)

    async def move(self, request_id: str) -> None:
        """Move a running request to the other decode instance; again where it outgrows the room that was made for it.
        Raises TimeoutError."""
        async with asyncio.timeout(MOVE_TIMEOUT_S):
            moved = False
            while not moved:
                source = await self._source(request_id)
                decodes = [i.instance_id for i in await self.instances() if i.role == cluster_pb2.ROLE_DECODE]
                target = next(instance_id for instance_id in decodes if instance_id != source)
                request = cluster_pb2.MigrateSequenceRequest(request_id=request_id, target_instance_id=target)
                call = self.cluster.MigrateSequence(request, timeout=MOVE_TIMEOUT_S, metadata=self.metadata)
                async for told in call:
                    moved = told.progress.stage == decode_pb2.MIGRATION_STAGE_MOVED

    async def _source(self, request_id: str) -> str:
        """The decode instance that has a request, once one reports it."""
        watching = cluster_pb2.WatchClusterRequest()
        watching.interval.FromMilliseconds(100)
        call = self.cluster.WatchCluster(watching, timeout=MOVE_TIMEOUT_S, metadata=self.metadata)
        async for state in call:
            for instance in state.instances:
                ids = (sequence.request_id for sequence in instance.load.sequences)
                if instance.role == cluster_pb2.ROLE_DECODE and request_id in ids:
                    call.cancel()
                    return instance.instance_id
        raise AssertionError("the watch has no end")

    async def wait_until_gone(self, request_id: str) -> None:
        """Return when the router has no such request and no instance a sequence of it. Asks the instances themselves:
        what they reported may be from before they had it. Raises TimeoutError."""
        async with asyncio.timeout(GONE_TIMEOUT_S):
            while True:
                try:
                    await self.cancel(request_id)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    break
                await asyncio.sleep(0.05)
            for instance in await self.instances():
                if instance.role in (cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE):
                    await _wait_until_let_go(instance.address, request_id)


@asynccontextmanager
async def start_cluster(directory: Path) -> AsyncIterator[Cluster]:
    """A cluster of local processes with their logs in ``directory``, without TLS and keys. Raises NotStarted."""
    async with _up(directory) as address, grpc.aio.insecure_channel(address) as channel:
        yield Cluster(address, channel)


@asynccontextmanager
async def start_secured_cluster(directory: Path) -> AsyncIterator[Cluster]:
    """One with mutual TLS between its services and, at its router, TLS and API keys. Raises NotStarted."""
    async with _up(directory, "--tls") as address:
        files = directory / "tls"
        await _starmesh("certs", "init", "--out", str(directory / "stranger"))
        security = Security(
            ca=files / "ca.crt",
            stranger_ca=directory / "stranger" / "ca.crt",
            key=(files / "api-key").read_text().strip(),
            busy_key=await _starmesh("keys", "create", str(files / "api-keys"), "busy", "--max-requests", "1"),
        )
        credentials = grpc.ssl_channel_credentials(security.ca.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as channel:
            cluster = Cluster(address, channel, security)
            await cluster.wait_until_known(security.busy_key)
            yield cluster


@asynccontextmanager
async def _up(directory: Path, *flags: str) -> AsyncIterator[str]:
    """The address of the router of a cluster that ``starmesh up`` keeps up."""
    process = await _start("up", *_UP, "--run-dir", str(directory), *flags)
    try:
        yield await _ready_address(process)
    finally:
        await _end(process)


async def _start(*arguments: str) -> asyncio.subprocess.Process:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("STARMESH_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "starmesh.cli", *arguments),
        env=ours | {"STARMESH_LEDGER_TIMEOUT_S": "3"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def _starmesh(*arguments: str) -> str:
    """What a command of starmesh's prints. Raises NotStarted when it fails."""
    process = await _start(*arguments)
    said = (await process.communicate())[0].decode(errors="replace").strip()
    if process.returncode:
        raise NotStarted(f"starmesh {' '.join(arguments)} failed: {said}")
    return said


async def _ready_address(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    said: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            async for line in process.stdout:
                said.append(line.decode(errors="replace").rstrip())
                if said[-1].startswith(_READY):
                    return said[-1].removeprefix(_READY).split(";")[0]
    raise NotStarted("starmesh up did not start a cluster:\n" + "\n".join(said[-15:]))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _wait_until_let_go(address: str, request_id: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: cluster_pb2_grpc.InstanceServiceAsyncStub = cluster_pb2_grpc.InstanceServiceStub(channel)
        while True:
            response = await stub.GetInstance(cluster_pb2.GetInstanceRequest(), timeout=CALL_TIMEOUT_S)
            if all(sequence.request_id != request_id for sequence in response.instance.load.sequences):
                return
            await asyncio.sleep(0.05)

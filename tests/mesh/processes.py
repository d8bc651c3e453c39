"""A mesh of real processes for tests: a real Valkey, and services started as an operator would start them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import redis.asyncio

from starmesh.ledger.server import EmbeddedServer
from starmesh.rpc.channels import open_channel
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from tests.mesh.forked import ForkedProcess, start_forked

# Importing torch and transformers takes some ten seconds of CPU time, and several instances start at once.
START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 30.0
NOBODY_DIES = {"STARMESH_LEASE_TTL_S": "30"}
"""Environment for tests in which no instance may be taken for dead, however late its reports come."""


@dataclass
class Service:
    """One running process."""

    name: str
    role: str
    process: asyncio.subprocess.Process | ForkedProcess
    log: Path
    address: str = ""

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: drain within the grace period."""
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Mesh:
    """Starts services against one Valkey and stops them all. ``forked``: from a process that has imported what they
    need, for tests that start many. ``modules`` names what runs instead of ``services.ROLE``."""

    directory: Path
    model: Path
    environment: dict[str, str] = field(default_factory=dict)
    forked: bool = False
    modules: dict[str, str] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    server: EmbeddedServer | None = None
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    async def __aenter__(self) -> Mesh:
        self.server = await EmbeddedServer.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        for channel in self._channels:
            await channel.close()
        for service in self.services.values():
            if service.process.returncode is None:
                service.kill()
            await service.process.wait()
        assert self.server is not None
        await self.server.stop()

    async def start(self, role: str, name: str, *flags: str) -> Service:
        """Start a service and wait until it serves. Fails with the end of its log."""
        assert self.server is not None
        port_file = self.directory / f"{name}.port"
        port_file.unlink(missing_ok=True)
        log = self.directory / f"{name}.log"
        module = self.modules.get(role, f"services.{role}")
        arguments = ["--instance-id", name, "--port-file", str(port_file)]
        if role in ("router", "prefill", "decode"):
            arguments += ["--model", str(self.model)]
        arguments += flags
        patient = {"STARMESH_LEDGER_TIMEOUT_S": "3"}  # a busy machine may leave the server alone for a second
        environment = os.environ | {"OMP_NUM_THREADS": "1", "STARMESH_LEDGER": self.server.url} | patient
        environment |= self.environment
        process: asyncio.subprocess.Process | ForkedProcess
        if self.forked:
            process = await start_forked(module, arguments, environment, log)
        else:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", module, *arguments, stdout=output, stderr=output, env=environment
                )
        service = self.services[name] = Service(name, role, process, log)

        def is_up() -> bool:
            assert process.returncode is None, f"{name} ended with {process.returncode}:\n{tail(log)}"
            return port_file.exists()

        await until(is_up, f"{name} to serve", START_TIMEOUT_S, lambda: tail(log))
        service.address = port_file.read_text()
        return service

    async def start_all(
        self, *, prefill: int = 1, decode: int = 2, flags: tuple[str, ...] = (), router_flags: tuple[str, ...] = ()
    ) -> None:
        """A router, and prefill and decode instances named prefill-0, decode-0, ... that ``flags`` are for."""
        await asyncio.gather(
            *(self.start("prefill", f"prefill-{index}", *flags) for index in range(prefill)),
            *(self.start("decode", f"decode-{index}", *flags) for index in range(decode)),
        )
        await self.start("router", "router", *router_flags)
        await self.all_seen(prefill + decode + 1)

    async def start_predictor(self, *flags: str) -> Service:
        """predictor-0, that the router of a mesh that is up knows of."""
        others = len(await self.instances())
        predictor = await self.start("predictor", "predictor-0", *flags)
        await self.all_seen(others + 1)
        return predictor

    async def all_seen(self, count: int) -> None:
        """Wait until the router lists ``count`` instances."""

        async def seen() -> bool:
            return len(await self.instances()) == count

        await until(seen, f"the router to see {count} instances")

    async def kill_ledger(self) -> None:
        """kill -9 of the Valkey."""
        assert self.server is not None
        os.kill(self.server.pid, signal.SIGKILL)
        server = self.server
        await until(lambda: not server.running, "the ledger to be gone")

    async def restart_ledger(self) -> None:
        """Start it again, empty, at the same address."""
        assert self.server is not None
        await self.server.restart()

    def channel(self, name: str = "router") -> grpc.aio.Channel:
        """A channel to a service."""
        channel = open_channel(self.services[name].address)
        self._channels.append(channel)
        return channel

    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        """The router's public stub."""
        return inference_pb2_grpc.InferenceServiceStub(self.channel())  # type: ignore[return-value]

    def cluster(self) -> cluster_pb2_grpc.ClusterServiceAsyncStub:
        """The router's operator stub."""
        return cluster_pb2_grpc.ClusterServiceStub(self.channel())  # type: ignore[return-value]

    async def instances(self) -> list[cluster_pb2.Instance]:
        """What the router lists."""
        response = await self.cluster().ListInstances(cluster_pb2.ListInstancesRequest(), timeout=CALL_TIMEOUT_S)
        return list(response.instances)

    async def instance(self, name: str) -> cluster_pb2.GetInstanceResponse:
        """What an instance says of itself, its integrity checked."""
        stub = cluster_pb2_grpc.InstanceServiceStub(self.channel(name))
        return await stub.GetInstance(cluster_pb2.GetInstanceRequest(), timeout=CALL_TIMEOUT_S)

    async def owners(self) -> dict[str, str]:
        """The decode instance that owns each request in flight, as the ledger has it."""
        assert self.server is not None
        async with redis.asyncio.from_url(self.server.url, decode_responses=True) as client:
            keys = [key async for key in client.scan_iter("*:owner:*")]
            entries = await client.mget(keys) if keys else []
        found = zip(keys, entries, strict=True)
        return {key.rsplit(":owner:")[1]: entry.split()[1] for key, entry in found if entry is not None}

    async def settled(self) -> None:
        """Wait until no engine instance holds a block or a lease, none takes part in a migration, and neither a
        reservation nor an owner of a request is left in the ledger."""
        names = [
            s.name for s in self.services.values() if s.role in ("prefill", "decode") and s.process.returncode is None
        ]
        last: dict[str, object] = {}

        async def nothing_left() -> bool:
            for name in names:
                state = await self.instance(name)
                load = state.instance.load
                migrations = load.incoming_migrations + load.outgoing_migrations
                last[name] = (state.used_blocks, state.leases, migrations)
                if state.used_blocks or state.leases or load.sequences or migrations:
                    return False
            for instance in await self.instances():
                last[instance.instance_id + " reserved"] = instance.reserved_tokens
                if instance.reserved_tokens:
                    return False
            last["owners"] = await self.owners()
            return not last["owners"]

        await until(nothing_left, "all blocks, leases and reservations to be freed", 60, lambda: str(last))


async def until(
    condition: Callable[[], object], what: str, timeout_s: float = 60.0, describe: Callable[[], str] = str
) -> None:
    """Wait until ``condition`` holds; fail saying what was waited for and what was found."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        held = condition()
        if asyncio.iscoroutine(held):
            held = await held
        if held:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}: {describe()}")
        await asyncio.sleep(0.05)


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    with contextlib.suppress(FileNotFoundError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return "(no log)"

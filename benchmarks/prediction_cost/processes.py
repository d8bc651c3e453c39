"""The processes of ``benchmarks.prediction_cost``, and their cores.

A private Redis, a prefill instance, a decode instance that sends its hidden states to the predictor, one that keeps
none, and what answers as the predictor: the real one or a peer. The decode instances have half of the cores, of which
only one decodes at a time; all others share the other half, as if the predictor and its other callers were on another
machine. Owns starting, stopping and stopping for a while.
"""

from __future__ import annotations

import os
import signal
import sys
from asyncio import create_subprocess_exec
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starmesh.cli.service_process import ServiceProcess, ServiceSpec
from starmesh.ledger.server import EmbeddedServer
from starmesh.types import HiddenLayout

PREDICTING, PLAIN = "decode", "decode-plain"
PREDICTOR = "predictor"
KV_MEMORY_MIB = {"prefill": 256, "decode": 640}
"""A decode instance's holds 32 sequences of some 400 tokens of the default model."""


class Processes:
    """The running processes; made by ``start_processes``."""

    def __init__(self, ledger_url: str, directory: Path, model: Path, predictors: Path, batch: int) -> None:
        self._ledger_url = ledger_url
        self._directory = directory
        self._predictors = predictors
        common = ("--model", str(model), "--grace-s", "1", "--log-level", "info")
        decode = (*common, "--max-sequences", str(batch), "--kv-memory-mib", str(KV_MEMORY_MIB["decode"]))
        specs = [
            self._spec("prefill", "prefill", (*common, "--kv-memory-mib", str(KV_MEMORY_MIB["prefill"]))),
            self._spec("decode", PREDICTING, decode),
            self._spec("decode", PLAIN, (*decode, "--no-predict")),
        ]
        self._services = {spec.instance_id: ServiceProcess(spec, directory) for spec in specs}
        cores = sorted(os.sched_getaffinity(0))
        self._decode_cores, self._other_cores = cores[: len(cores) // 2] or cores, cores[len(cores) // 2 :]

    def address(self, name: str) -> str:
        """HOST:PORT of a service."""
        return self._services[name].address

    def cpu_s(self, name: str) -> tuple[float, float]:
        """Seconds that a service's threads have run, and that they waited for a core, by the scheduler's count: finer
        than that of clock ticks."""
        threads = Path(f"/proc/{self._pid(name)}/task").iterdir()
        counts = [(thread / "schedstat").read_text().split() for thread in threads]
        return sum(int(count[0]) for count in counts) / 1e9, sum(int(count[1]) for count in counts) / 1e9

    async def start(self) -> None:
        """Start all but the predictor. What this process starts later has its cores."""
        os.sched_setaffinity(0, self._other_cores)
        for service in self._services.values():
            await service.start()
        for service in self._services.values():
            await self._wait(service)
        for name in (PREDICTING, PLAIN):
            # Affinity is a thread's; threads that start later have that of the one that starts them.
            for thread in Path(f"/proc/{self._pid(name)}/task").iterdir():
                os.sched_setaffinity(int(thread.name), self._decode_cores)

    async def start_predictor(self) -> None:
        """The real one."""
        flags = ("--predictor-dir", str(self._predictors))
        await self._start_as_predictor(self._spec("predictor", PREDICTOR, flags))

    async def start_peer(self, says: str) -> None:
        """One that is no good, under the predictor's name."""
        spec = ServiceSpec(
            PREDICTOR, "predictor", self._ledger_url, ("--says", says), "benchmarks.prediction_cost.peer"
        )
        await self._start_as_predictor(spec)

    async def stop_predictor(self, *, kill: bool = False) -> None:
        """End whatever answers as the predictor."""
        service = self._services[PREDICTOR]
        if kill:
            service.kill()
        else:
            service.terminate()
        await service.wait()

    def pause(self, name: str, *, paused: bool) -> None:
        """SIGSTOP or SIGCONT."""
        os.kill(self._pid(name), signal.SIGSTOP if paused else signal.SIGCONT)

    async def start_flood(self, layout: HiddenLayout) -> Process:
        """Other callers of the predictor."""
        layers = ",".join(map(str, layout.layers))
        arguments = (self.address(PREDICTOR), layout.model_revision, layers, str(layout.width))
        return await create_subprocess_exec(sys.executable, "-m", "benchmarks.prediction_cost.flood", *arguments)

    async def stop(self) -> None:
        """End all."""
        for service in self._services.values():
            if service.running:
                self.pause(service.spec.instance_id, paused=False)
            service.terminate()
        for service in self._services.values():
            await service.wait()

    def _pid(self, name: str) -> int:
        pid = self._services[name].pid
        assert pid is not None
        return pid

    async def _start_as_predictor(self, spec: ServiceSpec) -> None:
        service = self._services[PREDICTOR] = ServiceProcess(spec, self._directory)
        await service.start()
        await self._wait(service)

    async def _wait(self, service: ServiceProcess) -> None:
        if not await service.wait_until_serving():
            raise RuntimeError(f"{service.spec.instance_id} ended while it started:\n{service.log_tail()}")

    def _spec(self, role: str, name: str, flags: tuple[str, ...]) -> ServiceSpec:
        return ServiceSpec(instance_id=name, role=role, ledger=self._ledger_url, flags=flags)


@asynccontextmanager
async def start_processes(
    model: Path, directory: Path, predictors: Path, batch: int, note: Callable[[str], None]
) -> AsyncIterator[Processes]:
    """All processes, serving; they have ended when the context has. Raises RuntimeError for one that dies."""
    async with await EmbeddedServer.start() as ledger:
        processes = Processes(ledger.url, directory, model, predictors, batch)
        try:
            await processes.start()
            await processes.start_predictor()
            note(f"all processes serve; their logs: {directory}")
            yield processes
        finally:
            await processes.stop()

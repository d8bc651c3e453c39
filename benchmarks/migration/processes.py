"""The processes of ``benchmarks.migration``: a private Redis, one prefill and four decode instances, and their cores.

Owns starting them, which cores each runs on, and their end. A sequence that goes round ``RING`` makes one move of each
kind: the source decides whether it copies while it decodes ("live") or freezes first ("stop"), the target pulls by the
backend that it prefers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starmesh.cli.service_process import ServiceProcess, ServiceSpec
from starmesh.ledger.server import EmbeddedServer
from starmesh.types import TransferBackend

KV_MEMORY_MIB = {"prefill": 448, "decode": 640}
"""Room for a sequence of the default model's whole context (360 MiB), in a decode instance beside the bystanders."""


@dataclass(frozen=True, slots=True)
class Member:
    """A decode instance. ``half`` says which half of the cores it runs on: neighbours in the ring run on different
    ones, as if each had its own machine."""

    name: str
    live: bool
    backend: TransferBackend
    half: int

    @property
    def flags(self) -> tuple[str, ...]:
        """What makes it so."""
        other = next(backend for backend in TransferBackend if backend is not self.backend)
        order = ("--transfer", f"{self.backend.value},{other.value}")
        return order if self.live else (*order, "--stop-and-copy")


LIVE_PAIR = (
    Member("live-nixl", live=True, backend=TransferBackend.NIXL, half=0),
    Member("live-stream", live=True, backend=TransferBackend.STREAM, half=1),
)
RING = (
    *LIVE_PAIR,
    Member("stop-nixl", live=False, backend=TransferBackend.NIXL, half=0),
    Member("stop-stream", live=False, backend=TransferBackend.STREAM, half=1),
)


class Processes:
    """The running processes by instance id; made by ``start_processes``."""

    def __init__(self, ledger_url: str, services: Iterable[ServiceProcess]) -> None:
        self.ledger_url = ledger_url
        self._services = {service.spec.instance_id: service for service in services}
        self._cores = sorted(os.sched_getaffinity(0))

    def address(self, name: str) -> str:
        """HOST:PORT of an instance."""
        return self._services[name].address

    def pin(self, member: Member) -> None:
        """Keep an instance on its half of the cores; with fewer than two there is nothing to halve."""
        middle = len(self._cores) // 2
        self._run_on(member, self._cores[middle:] if member.half else self._cores[:middle] or self._cores)

    def unpin(self, member: Member) -> None:
        """Let an instance run on all cores."""
        self._run_on(member, self._cores)

    def _run_on(self, member: Member, cores: list[int]) -> None:
        # Affinity is a thread's; threads that start later have that of the one that starts them.
        pid = self._services[member.name].pid
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


@asynccontextmanager
async def start_processes(model: Path, directory: Path, note: Callable[[str], None]) -> AsyncIterator[Processes]:
    """All processes, serving; they have ended when the context has. Raises RuntimeError for one that dies."""
    common = ("--model", str(model), "--grace-s", "1", "--log-level", "warning")
    async with await EmbeddedServer.start() as ledger:
        specs = [_spec("prefill", "prefill", ledger.url, (*common, "--no-prefix-caching"))]
        for member in RING:
            spec = _spec("decode", member.name, ledger.url, (*common, *member.flags))
            specs.append(dataclasses.replace(spec, module="benchmarks.migration.instance"))
        services = [ServiceProcess(spec, directory) for spec in specs]
        try:
            for service in services:
                await service.start()
            for service in services:
                if not await service.wait_until_serving():
                    raise RuntimeError(f"{service.spec.instance_id} ended while it started:\n{service.log_tail()}")
            note(f"{len(services)} instances serve; their logs: {directory}")
            yield Processes(ledger.url, services)
        finally:
            for service in services:
                service.terminate()
            for service in services:
                await service.wait()


def _spec(role: str, name: str, ledger_url: str, flags: tuple[str, ...]) -> ServiceSpec:
    memory = ("--kv-memory-mib", str(KV_MEMORY_MIB[role]))
    return ServiceSpec(instance_id=name, role=role, ledger=ledger_url, flags=(*memory, *flags))

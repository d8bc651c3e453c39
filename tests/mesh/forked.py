"""Services forked from a process that has imported what they import, for tests that kill many of them.

Importing torch and transformers takes most of an instance's start: seven seconds of CPU. Everything after that is the
child's own, as if it had been started from a shell: arguments, environment, log, threads, sockets, memory and pid. The
process that it is forked from has imported modules and nothing more.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PR_SET_PDEATHSIG = 1
IMPORTED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "starmesh.instance.loading",
    "services.decode.worker",
    "services.prefill.servicer",
    "services.router.servicer",
    "services.predictor.servicer",
    "nixl._api",
]

_context = multiprocessing.get_context("forkserver")


class ForkedProcess:
    """What ``asyncio.subprocess.Process`` is to a service that was started by a command."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As subprocess: the negative signal's number after a signal."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Wait for its end."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        # The exit status comes through another pipe of the same process, which has ended by now.
        await asyncio.to_thread(self._process.join)
        assert self.returncode is not None
        return self.returncode


async def start_forked(module: str, flags: list[str], environment: dict[str, str], log: Path) -> ForkedProcess:
    """As ``python -m MODULE FLAGS`` with its output in ``log``."""
    process = _context.Process(target=_serve, args=(module, flags, environment, str(log)), daemon=True)
    # The first one waits for the imports.
    await asyncio.to_thread(_start, process)
    return ForkedProcess(process)


def _start(process: ForkServerProcess) -> None:
    _context.set_forkserver_preload(IMPORTED)
    process.start()


def _serve(module: str, flags: list[str], environment: dict[str, str], log: str) -> None:
    # With the process that forked it, which ends with the tests.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__")

"""A process of a sweep: runs one configuration after another, and says how far it is.

Owns the messages: a byte that says which, then text.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, Protocol

from starmesh.sim.code_version import code_version
from starmesh.sim.config import SimulationConfig
from starmesh.sim.result import SimulationResult, config_from_json

if TYPE_CHECKING:
    from starmesh.sim.run import Progress

VERSION: Final = b"v"
"""Followed by the version of the code that it has imported: the first message."""

PROGRESS: Final = b"p"
"""Followed by the part of the requests that are over."""

DONE: Final = b"d"
"""Followed by the result as JSON."""

FAILED: Final = b"f"
"""Followed by why, in one line."""

_TELL_EVERY_S = 0.2


class Simulate(Protocol):
    """What ``run_simulation`` is."""

    def __call__(
        self, config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None
    ) -> SimulationResult:
        """Run ``config``."""
        ...


def serve(pipe: Connection, simulate: Simulate | None) -> None:
    """Run the configurations that come, until the other end of ``pipe`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if simulate is None:
        from starmesh.sim.run import run_simulation

        simulate = run_simulation
    # All that runs has been imported: a change of the source after this is none of what runs, one before it shows.
    try:
        pipe.send_bytes(VERSION + code_version().encode())
    except OSError:
        return
    while True:
        try:
            text = pipe.recv_bytes().decode()
            pipe.send_bytes(_answer(pipe, simulate, text))
        except (EOFError, OSError):
            return


def _answer(pipe: Connection, simulate: Simulate, text: str) -> bytes:
    told_s = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= _TELL_EVERY_S:
            told_s = time.monotonic()
            fraction = progress.ended_requests / max(1, progress.requests)
            try:
                pipe.send_bytes(PROGRESS + str(fraction).encode())
            except OSError:
                # Nobody wants the result any more.
                raise SystemExit from None

    try:
        return DONE + simulate(config_from_json(text), progress=tell).to_json().encode()
    except Exception as error:
        # Whatever it is, it is this run's: the next may do.
        why = " ".join(str(error).split())
        return FAILED + (f"{type(error).__name__}: {why}" if why else type(error).__name__).encode()

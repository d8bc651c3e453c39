"""``python -m tests.mesh.dying_decode``: a decode instance that sends kill -9 at one exact point of a migration, to
itself or to another process.

The point is a ``Trap``, in a file in the directory that STARMESH_TEST_TRAPS names; it may be set while the instance
runs. All else is services.decode.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starmesh.migration import source, target

VARIABLE: Final = "STARMESH_TEST_TRAPS"

End = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Trap:
    """An end of a migration has come to a state, ``at`` "source:COMMITTING" and the like, ``part`` of the transition's
    effects are carried out, 0 for none and 1 for all, and ``after_s`` later the process is no more; or, if set, the one
    that is called ``pid``."""

    at: str
    part: float = 0.0
    after_s: float = 0.0
    pid: int = 0

    def set(self, directory: Path, instance_id: str) -> None:
        """Set it for one kill by the instance."""
        _path(directory, instance_id).write_text(f"{self.at} {self.part} {self.after_s} {self.pid}")


def clear_trap(directory: Path, instance_id: str) -> bool:
    """Let the instance be. False where it has come to the point already, and kills or will."""
    return _taken(_path(directory, instance_id))


def main() -> None:
    """Run services.decode, deadly."""
    instance_id = sys.argv[sys.argv.index("--instance-id") + 1]
    path = _path(Path(os.environ[VARIABLE]), instance_id)
    for name, end in (("source", source), ("target", target)):
        for function in ("begin", "advance"):
            setattr(end, function, _deadly(getattr(end, function), name, path))
    runpy.run_module("services.decode", run_name="__main__")


def _taken(path: Path) -> bool:
    """Take a trap away. Whoever does so decides what becomes of it: the instance that kills, or the test that does not
    wait for it any more."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _path(directory: Path, instance_id: str) -> Path:
    return directory / f"{instance_id}.trap"


def _deadly(function: Callable[..., End], name: str, path: Path) -> Callable[..., End]:
    def come_to(*args: Any, **kwargs: Any) -> End:
        record, effects = function(*args, **kwargs)
        try:
            at, part, after_s, pid = path.read_text().split()
        except (FileNotFoundError, ValueError):
            return record, effects
        if at != f"{name}:{record.state.name}":
            return record, effects
        deadly = _Deadly(effects)
        deadly.path, deadly.trap = path, Trap(at, float(part), float(after_s), int(pid))
        return record, deadly

    return come_to


class _Deadly(tuple[Any, ...]):
    """Effects of which only some are carried out."""

    trap: Trap
    path: Path

    def __iter__(self) -> Iterator[Any]:
        last = round(self.trap.part * len(self))
        for number, effect in enumerate(super().__iter__()):
            if number == last:
                self._kill()
            yield effect
        if last == len(self):
            self._kill()

    def _kill(self) -> None:
        if not _taken(self.path):
            return
        pid = self.trap.pid or os.getpid()
        if self.trap.after_s:
            asyncio.get_running_loop().call_later(self.trap.after_s, os.kill, pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

"""Many simulations over several processes, each done once: results are kept, and an interrupted sweep goes on.

Owns the processes and the cache. A cached result answers only for the same configuration, the same trace file and the
same code (``code_version``), and all results of a sweep are of one code. Owns no choice of what to run and no words on
what came of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from starmesh.sim.code_version import code_version
from starmesh.sim.config import SimulationConfig
from starmesh.sim.result import InvalidResult, SimulationResult, config_to_json
from starmesh.sim.sweep_worker import DONE, FAILED, PROGRESS, VERSION, Simulate, serve

_JOIN_TIMEOUT_S: Final = 5.0


class SweepError(Exception):
    """A simulation failed, or the code has changed meanwhile; the message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """How far a sweep is. ``done`` of ``runs`` are over, ``cached`` of them before it began; ``fraction`` of all
    requests of the others are over. ``running`` describes each run that is under way."""

    runs: int
    done: int
    cached: int
    failed: int
    fraction: float
    running: tuple[str, ...]


def run_all(
    configs: Sequence[SimulationConfig],
    *,
    processes: int = 1,
    cache_dir: Path | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    simulate: Simulate | None = None,
) -> list[SimulationResult]:
    """The results of ``configs``, in their order; equal ones are run once.

    ``simulate`` is ``run_simulation`` unless another function of a module is named. Raises SweepError once all others
    are done if some failed, and at once when a process has imported other code than the sweep began with; OSError where
    the cache cannot be written; KeyboardInterrupt ends the processes first.
    """
    sweep = _Sweep(configs, cache_dir, progress)
    if sweep.waiting:
        sweep.run(max(1, min(processes, len(sweep.waiting))), simulate)
    if sweep.failures:
        raise SweepError(_explain(sweep.failures, cache_dir))
    return [sweep.results[key] for key in sweep.keys]


def describe(config: SimulationConfig) -> str:
    """A run in a few words."""
    rate = config.workload.rate
    load = "the trace as it is" if rate is None else f"{rate:g} requests/s"
    return f"{config.strategy.name}, {load}, {config.decode_instances} decode, seed {config.seed}"


def cache_key(config: SimulationConfig) -> str:
    """What a result of ``config`` by this code is kept under. Raises OSError for a trace file that cannot be read."""
    digest = hashlib.blake2b(f"{code_version()}\n{config_to_json(config)}\n".encode(), digest_size=16)
    if config.workload.trace_path is not None:
        digest.update(_file_digest(Path(config.workload.trace_path)))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Failure:
    key: str
    config: SimulationConfig
    why: str


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    key: str | None = None
    fraction: float = 0.0


class _Sweep:
    """One sweep's runs: done, waiting, under way."""

    def __init__(
        self,
        configs: Sequence[SimulationConfig],
        cache_dir: Path | None,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self.keys = [cache_key(config) for config in configs]
        self.results: dict[str, SimulationResult] = {}
        self.failures: list[_Failure] = []
        self._configs = dict(zip(self.keys, configs, strict=True))
        self._cache_dir = cache_dir
        self._progress = progress
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            for key, config in self._configs.items():
                found = _read(cache_dir / f"{key}.json", config)
                if found is not None:
                    self.results[key] = found
        self._cached = len(self.results)
        self.waiting = [key for key in self._configs if key not in self.results]
        self._requests = {key: self._configs[key].workload.requests for key in self.waiting}
        self._workers: list[_Worker] = []

    def run(self, processes: int, simulate: Simulate | None) -> None:
        """Run what waits."""
        self.waiting.reverse()
        self._workers = [_start(simulate) for _ in range(processes)]
        try:
            while True:
                for worker in self._workers:
                    if worker.key is None and self.waiting:
                        self._assign(worker)
                self._tell()
                busy = {worker.pipe: worker for worker in self._workers if worker.key is not None}
                if not busy:
                    break
                for pipe in connection.wait(list(busy)):
                    assert isinstance(pipe, connection.Connection)
                    self._hear(busy[pipe], simulate)
        finally:
            _stop(self._workers)

    def _assign(self, worker: _Worker) -> None:
        worker.key, worker.fraction = self.waiting.pop(), 0.0
        # A worker that has died is found out when nothing more is heard of it.
        with contextlib.suppress(OSError):
            worker.pipe.send_bytes(config_to_json(self._configs[worker.key]).encode())

    def _hear(self, worker: _Worker, simulate: Simulate | None) -> None:
        key = worker.key
        assert key is not None
        try:
            message = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            worker.process.join(_JOIN_TIMEOUT_S)
            self._failed(key, f"its process ended with exit code {worker.process.exitcode}; was memory short?")
            worker.pipe.close()
            self._workers[self._workers.index(worker)] = _start(simulate)
            return
        kind, text = message[:1], message[1:].decode()
        if kind == PROGRESS:
            worker.fraction = float(text)
            return
        if kind == VERSION:
            # Numbers of two versions of the code must not stand in one table.
            if text != code_version():
                raise SweepError(
                    "the code has changed since this sweep began: run it from a clean checkout that nobody edits, "
                    "such as one of `git worktree add`"
                )
            return
        worker.key = None
        if kind == DONE:
            self._done(key, text)
        elif kind == FAILED:
            self._failed(key, text)

    def _done(self, key: str, text: str) -> None:
        self.results[key] = SimulationResult.from_json(text)
        if self._cache_dir is not None:
            _write(self._cache_dir / f"{key}.json", text)

    def _failed(self, key: str, why: str) -> None:
        self.failures.append(_Failure(key, self._configs[key], why))

    def _tell(self) -> None:
        if self._progress is None:
            return
        running = [worker for worker in self._workers if worker.key is not None]
        over = sum(requests for key, requests in self._requests.items() if key in self.results)
        over += sum(self._requests[failure.key] for failure in self.failures)
        under_way = sum(self._requests[worker.key] * worker.fraction for worker in running if worker.key is not None)
        self._progress(
            SweepProgress(
                runs=len(self._configs),
                done=len(self.results) + len(self.failures),
                cached=self._cached,
                failed=len(self.failures),
                fraction=(over + under_way) / max(1, sum(self._requests.values())),
                running=tuple(
                    f"{describe(self._configs[worker.key])}: {worker.fraction:.0%}"
                    for worker in running
                    if worker.key is not None
                ),
            )
        )


def _start(simulate: Simulate | None) -> _Worker:
    """Start a process that Ctrl-C does not reach: whoever started it ends it."""
    context = multiprocessing.get_context("spawn")
    # Its own start would unblock the signal.
    resource_tracker.ensure_running()
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, simulate), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


def _stop(workers: Iterable[_Worker]) -> None:
    """End the processes, whatever they are at."""
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_JOIN_TIMEOUT_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _explain(failures: Sequence[_Failure], cache_dir: Path | None) -> str:
    """Which runs failed, and how to run the first alone: its configuration is written for that."""
    first = failures[0]
    directory = Path(tempfile.mkdtemp(prefix="starmesh-simulate-")) if cache_dir is None else cache_dir / "failed"
    directory.mkdir(exist_ok=True)
    path = directory / f"{first.key}.json"
    _write(path, config_to_json(first.config))
    more = len(failures) - 1
    others = f" (and {more} other{'s' if more > 1 else ''})" if more else ""
    return f"{describe(first.config)}{others} failed: {first.why}; to run it alone: starmesh simulate --replay {path}"


def _read(path: Path, config: SimulationConfig) -> SimulationResult | None:
    """A kept result of ``config``; None for one that cannot be read, which then is made again."""
    try:
        result = SimulationResult.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InvalidResult):
        return None
    return result if config_to_json(result.config) == config_to_json(config) else None


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()

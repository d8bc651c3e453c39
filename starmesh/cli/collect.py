"""``starmesh predictor collect``: answers prompts on a cluster whose predictor stores samples of all that it decodes.

Owns the course of it: the cluster or the router that is there, the progress shown, a clean end at any time, and what
goes on where. Owns no sample: the predictor labels and writes them, at the latest when it is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from starmesh.cli.collect_report import progress_line
from starmesh.cli.collection import CollectionRequest
from starmesh.cli.collection_run import Tally, ask_all
from starmesh.cli.local_cluster import ClusterPlan, start_cluster
from starmesh.cli.login import Login
from starmesh.cli.predictor_status import look_at_predictor
from starmesh.cli.router import RouterClient, connect
from starmesh.cli.run import CliError, cancel_on_signals, explain
from starmesh.cli.up import reporter
from starmesh.prediction.shards import ShardError, StoredSequence, read_stored

_REFRESH_S = 1.0
_LINE_INTERVAL_S = 60.0
_SETTLE_TIMEOUT_S = 10.0
_SETTLE_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How every request is asked."""

    max_output_tokens: int
    temperature: float
    concurrency: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CollectionRun:
    """What became of the requests. ``stopped`` says why before the end, empty if it was not. ``collected_samples`` is
    what the predictor has stored or is about to, None when there is none."""

    tally: Tally
    stopped: str
    collected_samples: int | None


def stored_in(directory: Path) -> list[StoredSequence]:
    """What is there already. Raises CliError for what can't be read."""
    try:
        return read_stored(directory)
    except ShardError as error:
        raise CliError(str(error)) from None


async def collect(
    where: ClusterPlan | str,
    planned: Sequence[CollectionRequest],
    conditions: Conditions,
    console: Console,
    *,
    login: Login | None = None,
) -> CollectionRun:
    """Ask for all of ``planned`` on a new cluster, or on the router at an address that ``where`` is, with ``login``.

    Ctrl-C stops it, and a second one raises CancelledError. Raises CliError when the cluster does not come up,
    AioRpcError when no router answers.
    """
    cancel_on_signals()
    task = asyncio.current_task()
    assert task is not None
    tally = Tally(len(planned), conditions.max_output_tokens)
    stopped = ""
    async with _cluster(where, console) as address, connect(address, login) as router:
        try:
            async with _showing(tally, console):
                await ask_all(
                    router,
                    planned,
                    tally,
                    temperature=conditions.temperature,
                    concurrency=conditions.concurrency,
                    timeout_s=conditions.timeout_s,
                )
        except asyncio.CancelledError:
            # What has ended is kept, so this is no failure: the rest of the way out must not be cancelled by it.
            task.uncancel()
            stopped = "interrupted"
            console.print("stopping: what has ended is being stored; Ctrl-C again leaves that out")
        except grpc.aio.AioRpcError as error:
            if not tally.done:
                raise
            stopped = explain(error, address=address)
        collected = await _settle(router)
    return CollectionRun(tally, stopped, collected)


@asynccontextmanager
async def _cluster(where: ClusterPlan | str, console: Console) -> AsyncIterator[str]:
    """The router's address; a cluster that was started for it is kept up meanwhile."""
    if isinstance(where, str):
        yield where
        return
    with console.status("starting the cluster") as spinner:
        async with start_cluster(where, reporter(console)) as cluster:
            spinner.stop()
            keeping = asyncio.create_task(cluster.supervise(restart=True))
            try:
                yield cluster.address
            finally:
                keeping.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await keeping


async def _settle(router: RouterClient) -> int | None:
    """Wait until the predictor hears nothing new any more: samples and ends follow their tokens by some moments.
    Returns how many samples it has collected by then, None without a predictor."""
    last: tuple[int, ...] = ()
    collected: int | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLE_TIMEOUT_S):
            while (state := await look_at_predictor(router)) is not None:
                told = state.status
                collected = told.collected_samples
                now = (told.predictions, told.dropped_samples, told.ended_sequences, collected)
                if now == last:
                    break
                last = now
                await asyncio.sleep(_SETTLE_POLL_S)
    return collected


@asynccontextmanager
async def _showing(tally: Tally, console: Console) -> AsyncIterator[None]:
    """A progress bar on a terminal, a line a minute elsewhere."""
    if not console.is_terminal:
        lines = asyncio.create_task(_tick(tally, _LINE_INTERVAL_S, lambda: reporter(console)(progress_line(tally))))
        try:
            yield
        finally:
            lines.cancel()
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        shown = progress.add_task("requests", total=tally.total)

        def show() -> None:
            progress.update(shown, completed=tally.done, description=progress_line(tally, counted=True))

        ticking = asyncio.create_task(_tick(tally, _REFRESH_S, show))
        try:
            yield
        finally:
            ticking.cancel()
            show()


async def _tick(tally: Tally, interval_s: float, show: Callable[[], None]) -> None:
    """Mark the tally each second, and show it at its interval."""
    next_s = time.monotonic() + interval_s
    while True:
        tally.mark(time.monotonic())
        if time.monotonic() >= next_s:
            show()
            next_s += interval_s
        await asyncio.sleep(_REFRESH_S)

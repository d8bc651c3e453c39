"""``starmesh predictor collect`` as a whole: what is stored already, the run, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from starmesh.cli.collect import Conditions, collect, stored_in
from starmesh.cli.collect_report import lengths_summary, run_summary, stored_summary
from starmesh.cli.collection import CollectionRequest, left_out
from starmesh.cli.local_cluster import ClusterPlan
from starmesh.cli.login import Login
from starmesh.cli.run import CliError
from starmesh.prediction.shards import shard_paths


async def collect_all(
    where: ClusterPlan | str,
    planned: Sequence[CollectionRequest],
    conditions: Conditions,
    directory: Path | None,
    console: Console,
    *,
    login: Login | None = None,
) -> None:
    """Ask for what ``directory`` lacks of ``planned``, and say what there is then. None: it is not here to be read.

    Raises CliError when it could not go on to the end, typer.Exit(130) after Ctrl-C.
    """
    before = {sequence.request_id for sequence in stored_in(directory)} if directory else set()
    wanted = left_out(planned, before)
    if len(wanted) < len(planned):
        console.print(f"{len(planned) - len(wanted)} of {len(planned)} requests are stored already", highlight=False)
    if not wanted:
        console.print(f"nothing is left to ask; next: starmesh predictor train {directory}", soft_wrap=True)
        return
    ran = await collect(where, wanted, conditions, console, login=login)
    tally, stopped = ran.tally, ran.stopped
    console.print(run_summary(tally))
    missing = 0
    if directory is None:
        console.print(lengths_summary(tally.lengths, tally.cut))
        if not ran.collected_samples:
            console.print(
                "no sample is stored so far: within a minute it is, if that cluster was started with --collect"
            )
    else:
        stored = stored_in(directory)
        size = sum(path.stat().st_size for path in shard_paths(directory))
        console.print(stored_summary(directory, stored, size))
        missing = len(set(tally.ended) - {sequence.request_id for sequence in stored})
    if stopped == "interrupted":
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(130)
    if stopped:
        raise CliError(f"{stopped}; the same command goes on from here")
    if not tally.ended:
        raise CliError("no request was answered")
    if missing == len(tally.ended) > 0:
        raise CliError("no request was stored: see the log of predictor-0; does --max-mib leave room?")
    if missing:
        console.print(
            f"{missing} that ended were not stored: samples were dropped, or the disk's bound (--max-mib) is reached"
        )
    if missing or tally.failed:
        console.print("the same command asks again for what is missing")
    if directory is not None:
        console.print(f"next: starmesh predictor train {directory}", soft_wrap=True)

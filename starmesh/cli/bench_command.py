"""``starmesh bench`` around the measurement: progress bar and file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from starmesh.cli.bench import Load, bench
from starmesh.cli.bench_report import Outcome, Report
from starmesh.cli.router import RouterClient
from starmesh.cli.run import CliError
from starmesh.v1 import inference_pb2


async def run_bench(
    router: RouterClient,
    requests: Iterator[inference_pb2.GenerateRequest],
    load: Load,
    *,
    slo_ttft_s: float,
    slo_tpot_s: float,
) -> Report:
    """Measure behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=load.requests)
        failed = 0

        def on_progress(outcome: Outcome) -> None:
            nonlocal failed
            failed += bool(outcome.error)
            progress.update(task, advance=1, description=f"requests, {failed} failed" if failed else "requests")

        return await bench(
            router, requests, load, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s, on_progress=on_progress
        )


def write_json(path: Path, load: Load, report: Report) -> None:
    """Write load and report to ``path``. Raises CliError when that cannot be written."""
    arrivals = {"rate": load.rate} if load.rate is not None else {"concurrency": load.concurrency}
    content = {**arrivals, "arrival_seed": load.seed, **report.to_json()}
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}; the table above is all there is") from error

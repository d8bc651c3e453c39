"""``starmesh simulate`` at work: runs the plan behind a progress bar, prints what it comes to, writes the page.

Owns what is printed and written. The configurations are ``simulate_plan``'s, the report ``sim.report``'s.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from starmesh.cli.run import CliError
from starmesh.cli.simulate_plan import SimulatePlan
from starmesh.sim.config import SimulationConfig
from starmesh.sim.report import Summary, conclusions, page, summarise, table
from starmesh.sim.result import InvalidResult, SimulationResult, config_from_json
from starmesh.sim.sweep import SweepError, SweepProgress, describe, run_all
from starmesh.sim.sweep_worker import Simulate

WIDE: Final = 118
"""Columns from which the table has room for intervals."""

RUNS: Final = "runs"
PAGE: Final = "report.html"


def simulate(
    plan: SimulatePlan, *, processes: int, out: Path | None, console: Console, simulate_one: Simulate | None = None
) -> Summary:
    """Run all of ``plan``, print the table and the conclusions, and write the page to ``out``.

    Results in ``out`` that are of this plan and this code are not run again. Raises CliError.
    """
    configs = plan.configs
    console.print(_intention(plan, processes), highlight=False)
    with _told(len(set(map(describe, configs)))) as progress:
        try:
            results = run_all(
                configs,
                processes=processes,
                cache_dir=out / RUNS if out is not None else None,
                progress=progress,
                simulate=simulate_one,
            )
        except SweepError as error:
            raise CliError(str(error)) from error
        except OSError as error:
            raise CliError(_unwritable(error)) from error
        except KeyboardInterrupt:
            kept = "the same command goes on" if out is not None else "with --out DIR, the same command would go on"
            print(f"starmesh: interrupted; {kept} where it was", file=sys.stderr)
            raise
    summary = summarise(results)
    show(summary, console)
    if out is not None:
        console.print(f"\npage: {write_page(summary, out)}", highlight=False, soft_wrap=True)
    return summary


def show(summary: Summary, console: Console) -> None:
    """The table and the conclusions."""
    console.print()
    console.print(table(summary, intervals=console.width >= WIDE))
    for sentence in conclusions(summary):
        console.print(f"- {sentence}", highlight=False)


def replay(path: Path, console: Console, run_one: Callable[[SimulationConfig], SimulationResult]) -> SimulationResult:
    """Run the configuration in ``path`` alone, in this process; of a result, its own, and say whether it comes out the
    same. Raises CliError for a file that is neither; what the simulation raises, as it is."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read {path}: {error}; name a configuration or a result as --out keeps them") from error
    before: SimulationResult | None = None
    try:
        before = SimulationResult.from_json(text)
        config = before.config
    except InvalidResult as no_result:
        try:
            config = config_from_json(text)
        except InvalidResult as no_config:
            is_result = "trace_digest" in text
            raise CliError(f"{path} is no simulation: {no_result if is_result else no_config}") from None
    console.print(describe(config), highlight=False)
    result = run_one(config)
    show(summarise([result]), console)
    console.print(f"trace digest {result.trace_digest}", highlight=False)
    if before is not None:
        same = result.digest == before.digest
        console.print("the same result as in the file" if same else "not the result that is in the file")
        if not same and result.code_version != before.code_version:
            console.print("(another version of the code made that one)")
    return result


def write_page(summary: Summary, out: Path) -> Path:
    """Write the page into ``out``, and return where. Raises CliError."""
    path = out / PAGE
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(page(summary, command=_command(sys.argv)), encoding="utf-8")
    except OSError as error:
        raise CliError(_unwritable(error)) from error
    return path


def write_json(path: Path, summary: Summary) -> None:
    """Write all results as one JSON array. Raises CliError."""
    try:
        path.write_text(json.dumps([json.loads(result.to_json()) for result in summary.results]), encoding="utf-8")
    except OSError as error:
        raise CliError(_unwritable(error)) from error


def _intention(plan: SimulatePlan, processes: int) -> str:
    """What is about to be simulated."""
    configs = plan.configs
    first = configs[0]
    rates = dict.fromkeys(config.workload.rate for config in configs)
    load = "as traced" if None in rates else f"at {', '.join(f'{rate:g}' for rate in rates if rate)} requests/s"
    lengths = first.workload.trace_path or f"{first.workload.lengths} lengths"
    most = float(f"{plan.saturation_rate:.2g}")
    return (
        f"{_count(first.decode_instances, 'decode')} and {_count(first.prefill_instances, 'prefill')} "
        f"instance{'s' if first.prefill_instances > 1 else ''} of {first.profile.name} "
        f"({first.profile.kv_tokens:,} tokens of KV memory each), {lengths} {load}: "
        f"{_count(len(configs), 'run')}{'s' if len(configs) > 1 else ''} on up to {processes} "
        f"process{'es' if processes > 1 else ''}. At best this cluster carries about {most:g} requests/s."
    )


@contextlib.contextmanager
def _told(runs: int) -> Iterator[Callable[[SweepProgress], None]]:
    """A progress bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"0 of {runs} runs", total=1.0)

        def tell(progress: SweepProgress) -> None:
            parts = [f"{progress.done} of {progress.runs} runs"]
            if progress.cached:
                parts.append(f"{progress.cached} kept")
            if progress.failed:
                parts.append(f"{progress.failed} failed")
            bar.update(task, completed=progress.fraction, description=", ".join(parts))

        yield tell


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}"


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["starmesh", *arguments[1:]])


def _unwritable(error: OSError) -> str:
    return f"cannot use {error.filename}: {error.strerror}; name another file or directory"

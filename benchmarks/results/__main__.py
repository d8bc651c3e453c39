"""`python -m benchmarks.results [--only NAME,...] [--processes N] [--quick]`: simulate, and put what comes of it into
docs/results.md.

Results are cached by configuration and code, so that an interrupted run goes on where it was. Run it from a checkout
that nobody edits: it stops when the code changes under it. ``--quick`` runs a sixth of the simulated time with two
seeds, and prints tables instead of touching the page.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import machine
from benchmarks.results.experiments import Effort, experiments
from benchmarks.results.page import markdown, plots, replace_between, summary_of
from starmesh.sim.sweep import SweepError, SweepProgress, run_all

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "starmesh" / "simulations"


def show(progress: SweepProgress) -> None:
    line = f"{progress.done}/{progress.runs} runs, {progress.fraction:.0%} of what was not cached"
    print(f"\r{line:60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="names of experiments, separated by commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    effort = Effort(seeds=2, seeds_large=1, time=1 / 6) if arguments.quick else Effort()
    wanted = set(filter(None, arguments.only.split(",")))
    known = experiments(effort)
    unknown = wanted - {experiment.name for experiment in known}
    if unknown:
        parser.error(f"no experiment is named {', '.join(sorted(unknown))}: {', '.join(each.name for each in known)}")
    # As the runs begin: who commits meanwhile does not change what they are of.
    commit = machine.commit("starmesh", "benchmarks/results")
    for experiment in known:
        if wanted and experiment.name not in wanted:
            continue
        print(f"\r{experiment.name}: {len(experiment.configs)} runs{'':40}", file=sys.stderr, flush=True)
        began_s = time.monotonic()
        try:
            results = run_all(experiment.configs, processes=arguments.processes, cache_dir=CACHE, progress=show)
        except SweepError as error:
            sys.exit(f"\n{error}")
        summary = summary_of(experiment, results)
        table = markdown(experiment, summary)
        cpu_s = sum(result.execution.wall_s for result in results)
        note = f"{len(results)} runs, {cpu_s:.0f} s of one core in all, {datetime.date.today()}, commit {commit}."
        print(f"\r{'':60}\r{table}\n{note} ({time.monotonic() - began_s:.0f} s)\n", flush=True)
        if not arguments.quick:
            PAGE.write_text(replace_between(PAGE.read_text(), experiment.name, f"{table}\n\n{note}"))
            plots(experiment, summary, PAGE.parent / "images")


if __name__ == "__main__":
    main()

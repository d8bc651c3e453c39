"""How fast the simulator is, and how much memory it takes: `python -m benchmarks.simulator [--quick]`.

The paper's reasoning mix on the h100-7b profile near saturation, each strategy of ``--strategies`` by itself in a fresh
process, so that its peak of memory is its own. ``--requests`` are 100,000 on 256 decode instances by default. The bound
beside it is the plain path on a small part of the same cluster: one step at a time, for the speed-up of leaps. Memory
is told once more for a quarter of the requests: it should hardly differ.

Prints one line of JSON for each run: ``simulated_tokens_per_s`` (output tokens over wall seconds), ``wall_s``,
``cpu_s``, ``peak_mb``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import machine
from starmesh.profiles import load_profile
from starmesh.sim.config import SimulationConfig
from starmesh.sim.run import Progress, run_simulation
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import WorkloadConfig

RATE_PER_INSTANCE = 0.22
"""Requests per second: about nine tenths of what an instance's memory holds in balance."""

PREFILL_SHARE = 16
"""Decode instances to one prefill instance: prompts of the mix are short."""


def config(strategy: str, *, instances: int, requests: int, every_step: bool) -> SimulationConfig:
    workload = WorkloadConfig(requests=requests, rate=RATE_PER_INSTANCE * instances)
    return SimulationConfig(
        profile=load_profile("h100-7b"),
        strategy=STRATEGIES[strategy],
        workload=workload,
        prefill_instances=max(1, instances // PREFILL_SHARE),
        decode_instances=instances,
        every_step=every_step,
    )


def measure(strategy: str, instances: int, requests: int, every_step: bool) -> dict[str, object]:
    """One run, in a process of its own."""
    began_s = time.process_time()

    def show(progress: Progress) -> None:
        done = progress.ended_requests / requests
        print(f"\r{strategy} {done:6.1%} {progress.now_s:8.0f} s", end="", file=sys.stderr, flush=True)

    result = run_simulation(
        config(strategy, instances=instances, requests=requests, every_step=every_step), progress=show
    )
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return {
        "strategy": strategy,
        "decode_instances": instances,
        "requests": requests,
        "path": "every step" if every_step else "leaps",
        "simulated_tokens_per_s": round(result.execution.simulated_tokens_per_s),
        "simulated_tokens": result.execution.simulated_tokens,
        "simulated_s": round(result.duration_s),
        "wall_s": round(result.execution.wall_s, 1),
        "cpu_s": round(time.process_time() - began_s, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "digest": result.digest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=256)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--strategies", default="least_tokens,star_plus")
    parser.add_argument("--quick", action="store_true", help="16 instances, 2,000 requests")
    arguments = parser.parse_args()
    instances, requests = (16, 2_000) if arguments.quick else (arguments.instances, arguments.requests)
    print(f"# {machine.describe()}, commit {machine.commit('starmesh', 'benchmarks')}", flush=True)
    runs: list[tuple[str, int, int, bool]] = []
    for strategy in arguments.strategies.split(","):
        runs.append((strategy, instances, requests, False))
        runs.append((strategy, instances, requests // 4, False))
    # The plain path and leaps on the same small cluster: equal digests, and how much faster.
    runs += [(arguments.strategies.split(",")[-1], 4, 40, every_step) for every_step in (False, True)]
    for run in runs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(json.dumps(pool.apply(measure, run)), flush=True)


if __name__ == "__main__":
    main()

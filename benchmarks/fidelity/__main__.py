"""How well the simulator foretells a live cluster: `python -m benchmarks.fidelity [--quick]`.

The same requests, at the same times, of the same lengths, on the same profile, through a live cluster of emulated
instances (router, prefill, three decode instances, rescheduler and Redis are processes; calls, reports, handoffs and
migrations are real, only the forward is a wait) and through the simulator. Requests are drawn once and replayed by
both. Nobody predicts lengths.

A simulation is run with several seeds of the steps' noise, a live run with one: see ``compare``. Others place and move
each request where and when that was done live: see ``decided``. For each setup a table goes to stderr, and the last
line is all of it as JSON. ``--keep DIR`` writes all that is known of the live runs, logs included; ``--again DIR``
takes them from there, to compare them with a simulator that has changed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import machine
from benchmarks.fidelity.compare import Compared, compare, differences, stages
from benchmarks.fidelity.decided import simulate_as_decided
from benchmarks.fidelity.kept import REQUESTS, keep_all, read_kept
from benchmarks.fidelity.live import Conditions, serve
from benchmarks.fidelity.served import Run
from benchmarks.fidelity.setups import SEED, SETUPS, Setup
from benchmarks.fidelity.simulated import simulate
from starmesh.sim.workload import draw_requests

GOAL = 0.05
_HIGHEST_PRIORITY = -10


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it."""

    requests: int
    simulations: int


FULL = Plan(requests=300, simulations=5)
QUICK = Plan(requests=40, simulations=2)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(setup: Setup, plan: Plan, *, keep: Path | None, again: Path | None) -> dict[str, Any]:
    """Both, and how they compare; the live run is an earlier one if ``again`` says where that was kept."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        trace = directory / REQUESTS
        with trace.open("w") as file:
            for drawn in draw_requests(setup.drawn(plan.requests), seed=SEED):
                fields = ("arrives_s", "prompt_tokens", "output_tokens", "max_output_tokens")
                file.write(json.dumps({field: getattr(drawn, field) for field in fields}) + "\n")
        configs = [setup.replayed(plan.requests, str(trace), seed=seed) for seed in range(plan.simulations)]
        requests = list(draw_requests(configs[0].workload, seed=SEED))
        if again is None:
            live, conditions, spans = asyncio.run(serve(configs[0], requests, directory, note))
        else:
            live, conditions, spans = read_kept(again / setup.directory, trace)
        if keep is not None:
            keep_all(keep / setup.directory, live, conditions, spans, directory)
        as_decided = [simulate_as_decided(config, requests, spans, directory) for config in configs]
        simulated = [simulate(config) for config in configs]
    compared = compare(live, [each.run for each in as_decided], simulated)
    first = as_decided[0]
    show(setup, live, compared, conditions)
    note(
        f"of {first.placed} requests simulated dispatch would have put {first.agreed} there too, and found no room for "
        f"{first.full}"
    )
    return {
        "strategy": setup.strategy,
        "kv_tokens": setup.kv_tokens,
        "rate": setup.rate,
        "requests": len(requests),
        "output_tokens": sum(request.output_tokens for request in requests),
        "metrics": {name: _rounded(asdict(found)) for name, found in compared.items()},
        "live_less_as_decided_ms": {
            "ttft": differences(live, first.run, lambda each: each.ttft_s),
            "tpot": differences(live, first.run, lambda each: each.tpot_s),
            "end_to_end": differences(live, first.run, lambda each: each.end_to_end_s),
        },
        "dispatch": {"placed": first.placed, "agreed": first.agreed, "full": first.full},
        "live_stages_ms": stages(live, spans),
        "live_ends_of_others": live.other_ends(),
        "unserved": {"live": dict(live.unserved), "simulated": [dict(run.unserved) for run in simulated]},
        "conditions": _rounded(asdict(conditions)),
    }


def show(setup: Setup, live: Run, compared: dict[str, Compared], conditions: Conditions) -> None:
    """The table of a setup."""
    note(f"\n{setup.name}: {setup.strategy}, memory for {setup.kv_tokens} tokens, {len(live.served)} requests served")
    heads = ("live", "as decided", "least", "most", "difference", "simulated", "least", "most", "difference")
    note(f"{'':28}" + "".join(f"{head:>11}" for head in heads))
    for name, found in compared.items():
        cells = [f"{found.live:.2f}"]
        for values in (found.as_decided, found.simulated):
            cells += (f"{value:.2f}" for value in (statistics.fmean(values), min(values), max(values)))
            cells.append(_percent(found.difference(values)))
        note(f"{name:28}" + "".join(f"{cell:>11}" for cell in cells))
    note(
        f"steps {conditions.step_drift:+.1%}; load average {conditions.load_average[0]} to "
        f"{conditions.load_average[1]}; CPU: "
        + ", ".join(f"{name} {seconds / conditions.duration_s:.0%}" for name, seconds in conditions.cpu_s.items())
    )
    for line in conditions.warnings:
        note(line)
    for request_id, why in live.unserved.items():
        note(f"{request_id}: {why}")


def _percent(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"{difference:+.1%}{' ' if abs(difference) <= GOAL else '*'}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two setups, with few requests")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this setup; may be repeated")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="write what is known of the live runs there")
    parser.add_argument("--again", metavar="DIR", type=Path, help="take the live runs from there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if unknown := set(arguments.only or ()) - {setup.name for setup in SETUPS}:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(setup.name for setup in SETUPS)}")
    with contextlib.suppress(PermissionError):
        # Others' work on this machine must not stand for the network's and the accelerators' time.
        os.setpriority(os.PRIO_PROCESS, 0, _HIGHEST_PRIORITY)
    plan = QUICK if arguments.quick else FULL
    setups = [setup for setup in SETUPS if setup.name in arguments.only] if arguments.only else SETUPS
    if arguments.quick and not arguments.only:
        setups = [SETUPS[0], SETUPS[-1]]
    result = {setup.name: measure(setup, plan, keep=arguments.keep, again=arguments.again) for setup in setups}
    described = {"machine": machine.describe(), "commit": machine.commit("starmesh", "services", "protos")}
    print(json.dumps({"benchmark": "fidelity", "setups": result, **described}))


if __name__ == "__main__":
    main()

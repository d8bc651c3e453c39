"""How well the simulator foretells a live cluster: `python -m benchmarks.fidelity [--quick]`.

The same requests, at the same times, of the same lengths, on the same profile, through a live cluster of emulated
instances (router, prefill, three decode instances, rescheduler and Redis are processes; calls, reports, handoffs and
migrations are real, only the forward is a wait) and through the simulator. Requests are drawn once and replayed by
both. There is no predictor: emulated instances have no hidden states.

A simulation is run with several seeds of the steps' noise, a live run with one: see ``compare``. For each setup a table
goes to stderr, and the last line is all of it as JSON. ``--keep DIR`` writes every request and migration of every run,
for looking into differences.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import machine
from benchmarks.fidelity.compare import Compared, compare, differences, stages
from benchmarks.fidelity.live import Conditions, serve
from benchmarks.fidelity.served import Run
from benchmarks.fidelity.setups import SEED, SETUPS, Setup
from benchmarks.fidelity.simulated import simulate
from benchmarks.fidelity.spans import Span
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


def measure(setup: Setup, plan: Plan, keep: Path | None) -> dict[str, Any]:
    """Both, and how they compare."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        trace = directory / "requests.jsonl"
        with trace.open("w") as file:
            for drawn in draw_requests(setup.drawn(plan.requests), seed=SEED):
                fields = ("arrives_s", "prompt_tokens", "output_tokens", "max_output_tokens")
                file.write(json.dumps({field: getattr(drawn, field) for field in fields}) + "\n")
        configs = [setup.replayed(plan.requests, str(trace), seed=seed) for seed in range(plan.simulations)]
        simulated = [simulate(config) for config in configs]
        requests = list(draw_requests(configs[0].workload, seed=SEED))
        live, conditions, spans = asyncio.run(serve(configs[0], requests, directory, note))
        if keep is not None:
            _keep(keep / setup.name.replace(" ", "-").replace(",", ""), live, simulated, spans, directory)
    compared = compare(live, simulated)
    show(setup, live, compared, conditions)
    return {
        "strategy": setup.strategy,
        "kv_tokens": setup.kv_tokens,
        "rate": setup.rate,
        "requests": len(requests),
        "output_tokens": sum(request.output_tokens for request in requests),
        "metrics": {
            name: {
                "live": round(found.live, 4),
                "simulated": [round(value, 4) for value in found.simulated],
                "difference": None if found.difference is None else round(found.difference, 4),
            }
            for name, found in compared.items()
        },
        "ttft_live_less_simulated_ms": differences(live, simulated, lambda each: each.ttft_s),
        "tpot_live_less_simulated_ms": differences(live, simulated, lambda each: each.tpot_s),
        "live_stages_ms": stages(live, spans),
        "unserved": {"live": dict(live.unserved), "simulated": [dict(run.unserved) for run in simulated]},
        "conditions": {key: _rounded(value) for key, value in asdict(conditions).items()},
    }


def show(setup: Setup, live: Run, compared: dict[str, Compared], conditions: Conditions) -> None:
    """The table of a setup."""
    note(f"\n{setup.name}: {setup.strategy}, memory for {setup.kv_tokens} tokens, {len(live.served)} requests served")
    note(f"{'':34}{'live':>12}{'simulated':>12}{'least':>12}{'most':>12}{'difference':>12}")
    for name, found in compared.items():
        difference = "" if found.difference is None else f"{found.difference:+.1%}"
        mark = " " if found.difference is None or abs(found.difference) <= GOAL else "*"
        note(
            f"{name:34}{found.live:12.2f}{found.mean:12.2f}{min(found.simulated):12.2f}{max(found.simulated):12.2f}"
            f"{difference:>12}{mark}"
        )
    note(
        f"steps {conditions.step_drift:+.1%}; load average {conditions.load_average[0]} to "
        f"{conditions.load_average[1]}; CPU: "
        + ", ".join(f"{name} {seconds / conditions.duration_s:.0%}" for name, seconds in conditions.cpu_s.items())
    )
    for line in conditions.warnings:
        note(line)
    for request_id, why in live.unserved.items():
        note(f"{request_id}: {why}")


def _keep(directory: Path, live: Run, simulated: Sequence[Run], spans: Sequence[Span], logs: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spans.json").write_text(json.dumps([asdict(span) for span in spans]))
    for name, run in (("live", live), *((f"simulated-{number}", run) for number, run in enumerate(simulated))):
        (directory / f"{name}.json").write_text(json.dumps(asdict(run)))
    for log in (*logs.glob("*.log"), *logs.glob("*.jsonl")):
        (directory / log.name).write_bytes(log.read_bytes())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two setups, with few requests")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this setup; may be repeated")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="write all requests, migrations and logs there")
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
    result = {setup.name: measure(setup, plan, arguments.keep) for setup in setups}
    described = {"machine": machine.describe(), "commit": machine.commit("starmesh", "services", "protos")}
    print(json.dumps({"benchmark": "fidelity", "setups": result, **described}))


if __name__ == "__main__":
    main()

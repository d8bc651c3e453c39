"""What predictions cost a decode instance: `python -m benchmarks.prediction_cost [--quick]`.

Real processes (Redis, a prefill instance, two decode instances of which one predicts nothing, the predictor) and the
default model. A direct client keeps a batch of 32 sequences at each decode instance and times steps by the spaces
between the instance's messages. Blocks of 20 steps, in which each sequence is sampled once, alternate: one without
predictions (``plain``, no hidden states kept), then one of

- ``starmesh``, ``mlp``: a predictor of that kind answers;
- ``killed``, ``hanging``: after kill -9 and SIGSTOP of the predictor;
- ``slow``: a peer answers after 5 s; ``garbage``: one answers nonsense at once;
- ``flooded``: eight other callers push 32 samples a call at the predictor, as fast as it takes them.

``step_over_plain`` has each step's time over the median of the plain block just before, that of ``plain`` itself over
the plain block before it: the noise. ``predictor_cpu`` is the CPU time of the predictor's process for each step of the
one instance that it serves, heartbeats included; ``idle_ms_per_s`` what it uses without samples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.prediction_cost.phases import ANSWERING, PHASES, PLAIN_PHASE, open_phases
from benchmarks.prediction_cost.predictors import provide
from benchmarks.prediction_cost.processes import start_processes
from benchmarks.prediction_cost.report import Report
from starmesh.model_files import fetch_model

STEPS = 20
"""Each sequence is sampled once in so many."""


@dataclass(frozen=True, slots=True)
class Plan:
    """In each round every phase once, on new batches."""

    rounds: int
    steps: int = STEPS
    batch: int = 32


FULL = Plan(rounds=5)
QUICK = Plan(rounds=1)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def measure(model: Path, plan: Plan) -> dict[str, Any]:
    report = Report()
    with tempfile.TemporaryDirectory() as directory:
        predictors = Path(directory) / "predictors"
        predictors.mkdir()
        weights = {kind: provide(kind, model, predictors) for kind in ANSWERING}
        async with start_processes(model, Path(directory), predictors, plan.batch, note) as processes:
            order = random.Random(0)
            for number in range(plan.rounds):
                report.new_batches()
                async with open_phases(processes, model, plan.batch) as phases:
                    for phase in order.sample(PHASES, len(PHASES)):
                        for each in (PLAIN_PHASE, phase):
                            line = report.add(each, await phases.measure(each, plan.steps))
                            note(f"round {number + 1} of {plan.rounds}: {line}")
    return {
        "benchmark": "prediction_cost",
        **report.describe(),
        "weights": weights,
        "plan": asdict(plan),
        "machine": machine.describe(),
        "commit": machine.commit("starmesh", "services", "protos"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round: about two minutes")
    parser.add_argument("--rounds", type=int, help=f"default {FULL.rounds}, {QUICK.rounds} with --quick")
    parser.add_argument("--model", type=Path, help="model directory; the default model otherwise")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds:
        plan = Plan(arguments.rounds)
    model = arguments.model or fetch_model(progress=note)
    print(json.dumps(asyncio.run(measure(model, plan))))


if __name__ == "__main__":
    main()

"""What a live migration costs: `python -m benchmarks.migration [--quick]`.

Real processes (Redis, a prefill instance, four decode instances) and the default model. Two measurements:

- **Gap.** One sequence at a time, of some length, moves round the four instances while it decodes; a round has one live
  move and one stop-and-copy by each backend, so that all four share whatever else the machine does. The gap is the time
  between the last token from the source and the first from the target, at the client; ``gap_over_itl_ms`` is that less
  the sequence's ordinary time between tokens around the move. Recompute is the wait for a prefill of all its tokens:
  after a cancel, or at its first start, which is the same work. No prefix cache helps.
- **Bystanders.** One sequence goes back and forth between two instances while others decode there. The slowdown of a
  move is the mean time of those of their steps that overlap its copy rounds, over the mean of those just before;
  ``bystander_noise`` compares two halves of the latter in the same way.

Rates: ``copy_rounds`` from the first round's begin to the freeze, waits between steps included; ``stop_and_copy`` from
the freeze to the target's answer, the claim included; ``raw`` as `benchmarks.transfer` measures it, afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, transfer
from benchmarks.migration.bystanders import BystanderPlan, Bystanders
from benchmarks.migration.client import Client
from benchmarks.migration.gaps import BACKENDS, GapPlan, measure_gaps
from benchmarks.migration.processes import RING, start_processes
from benchmarks.migration.spread import NAMES, spread
from starmesh.model_files import fetch_model


@dataclass(frozen=True, slots=True)
class Plan:
    """How much. ``raw_rounds`` of plain pulls by each backend."""

    gaps: GapPlan
    bystanders: BystanderPlan
    raw_rounds: int


FULL = Plan(
    gaps=GapPlan(
        # The longest leaves room to grow in a context of 8,192 tokens; the shortest comes again, to show a drift.
        lengths=(128, 512, 1024, 2048, 4096, 7424, 128),
        moves=10,
        rounds=3,
        recomputes={128: 3, 512: 3, 1024: 2, 2048: 1},
    ),
    bystanders=BystanderPlan(sequences=8, tokens=256, mover_tokens=2048, moves=8, quiet_steps=6),
    raw_rounds=10,
)
QUICK = Plan(
    gaps=GapPlan(lengths=(128, 1024), moves=3, rounds=1, recomputes={128: 1}),
    bystanders=BystanderPlan(sequences=2, tokens=64, mover_tokens=1024, moves=2, quiet_steps=4),
    raw_rounds=4,
)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def measure(model: Path, plan: Plan) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        async with start_processes(model, Path(directory), note) as processes:
            for member in RING:
                processes.pin(member)
            client = Client(processes)
            try:
                gaps = await measure_gaps(client, plan.gaps, note)
                bystanders = Bystanders(client, processes, plan.bystanders, note)
                await bystanders.measure()
            finally:
                await client.close()
    raw = await transfer.measure(plan.raw_rounds)
    rates = {
        backend: {
            "copy_rounds": spread(gaps.rate(backend, live=True)),
            "stop_and_copy": spread(gaps.rate(backend, live=False)),
            "raw": raw["mb_per_s"][backend],
        }
        for backend in BACKENDS
    }
    return {
        "benchmark": "migration",
        "spread": NAMES,
        **gaps.describe(),
        **bystanders.describe(),
        "transfer_mb_per_s": rates,
        "plan": asdict(plan),
        "machine": machine.describe(),
        "commit": machine.commit("starmesh", "services", "protos"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths and few moves: about two minutes")
    parser.add_argument("--model", type=Path, help="model directory; the default model otherwise")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = arguments.model or fetch_model(progress=note)
    print(json.dumps(asyncio.run(measure(model, QUICK if arguments.quick else FULL))))


if __name__ == "__main__":
    main()

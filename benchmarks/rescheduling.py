"""How long one round of rescheduling takes: `python -m benchmarks.rescheduling [--quick]`.

Clusters of 16 to 4,096 decode instances with 64 sequences each, nine in ten with a prediction, lengths log-normal, and
a quarter of the instances with half or half as much again of the load: there is always something to move. Each round
gets a view that nobody has looked at before: every instance's report is new and freshly read from the ledger's
document, which is what the live loop hands to ``plan`` (``document_ms`` is what that reading takes, before the round).
Nothing is kept between rounds, and garbage of the preparation is collected before.

Times are CPU seconds of the one thread that plans, garbage collection within the round included. ``read_ms`` is the
bound that each round is compared with: only to join the reports into an array for each count and one list of request
ids.
``from_rows_ms`` is a round of star_plus on tuples of SequenceLoad, as a simulator has them, instead of columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks import machine
from starmesh.ledger import codec
from starmesh.policy.cost import CostModel
from starmesh.policy.rescheduling import POLICIES, PlanMemory, ReschedulingConfig, plan
from starmesh.sequence_loads import COUNTS, SequenceLoads
from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceView,
    KvLayout,
    Role,
    SequenceLoad,
)

ROUNDS = {16: 15, 256: 15, 1024: 5, 4096: 3}
QUICK_ROUNDS = {16: 5, 256: 5}
SEQUENCES = 64
NOW_S = 1000.0
BLOCKS = 28_000

# The KV of DeepSeek-R1-Distill-Qwen-7B, and a GPU's order of magnitude: they decide what is worth moving, not the time.
LAYOUT = KvLayout("r", "bfloat16", layers=28, kv_heads=4, head_dim=128, block_tokens=16)
COST = CostModel(
    step_base_s=0.008, step_sequence_s=2e-5, step_token_s=3e-8, transfer_setup_s=0.005, transfer_bytes_per_s=2.5e10
)


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def documents(instances: int, seed: int) -> list[bytes]:
    """What each instance has written into the ledger."""
    draw = random.Random(seed)
    written = []
    for _ in range(instances):
        skew = draw.choice([0.5, 1.0, 1.0, 1.5])
        sequences = tuple(_sequence(draw, skew) for _ in range(SEQUENCES))
        used = sum(-(-known.resident_tokens // LAYOUT.block_tokens) for known in sequences)
        load = InstanceLoad(
            total_blocks=BLOCKS,
            free_blocks=max(0, BLOCKS - used),
            running_sequences=SEQUENCES,
            resident_tokens=sum(known.resident_tokens for known in sequences),
            sequences=sequences,
        )
        written.append(codec.encode_load(load).encode())
    return written


def _sequence(draw: random.Random, skew: float) -> SequenceLoad:
    total = min(32_000, int(draw.lognormvariate(7.5, 1.2) * skew) + 2)
    output, prompt = draw.randint(1, total), draw.randint(20, 1000)
    known = SequenceLoad(f"{draw.getrandbits(128):032x}", 1, prompt, output, prompt + output - 1, 32_768)
    if draw.random() < 0.1:
        return known
    median = max(1, int((total - output) * draw.uniform(0.6, 1.5)))
    return dataclasses.replace(
        known, remaining_tokens=median, remaining_tokens_upper=int(1.6 * median) + 50, prediction_age_tokens=5
    )


def view_of(written: list[bytes]) -> ClusterView:
    """The documents read anew."""
    codec.decode_load.cache_clear()
    return ClusterView(
        NOW_S,
        tuple(
            InstanceView(
                InstanceInfo(
                    f"decode-{number:04d}",
                    "one",
                    Role.DECODE,
                    "host:1",
                    layout=dataclasses.replace(LAYOUT),
                    max_sequence_tokens=65_536,
                ),
                codec.decode_load(document),
                NOW_S,
            )
            for number, document in enumerate(written)
        ),
    )


def in_rows(view: ClusterView) -> ClusterView:
    """The same view with tuples of SequenceLoad."""
    return ClusterView(
        view.now_s,
        tuple(
            dataclasses.replace(found, load=dataclasses.replace(found.load, sequences=tuple(found.load.sequences)))
            for found in view.instances
            if found.load is not None
        ),
    )


def read(view: ClusterView) -> tuple[list[Any], list[str]]:
    """Only what any policy must do: the counts as arrays, the request ids as a list."""
    reports = [SequenceLoads.of(found.load.sequences) for found in view.instances if found.load is not None]
    columns = [b"".join([known.columns[at] for known in reports]) for at in range(len(COUNTS))]
    names = [name for known in reports for name in known.request_ids]
    return [np.frombuffer(column, dtype=np.int64) for column in columns], names


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """CPU milliseconds of this thread, and the result."""
    gc.collect()
    started = time.thread_time()
    result = work()
    return 1e3 * (time.thread_time() - started), result


def measure(rounds: dict[int, int]) -> dict[str, Any]:
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    moves: dict[str, dict[int, int]] = defaultdict(dict)
    for instances, count in rounds.items():
        # The first round warms the process up and is not counted.
        for number in range(-1, count):
            written = documents(instances, seed=max(number, 0))
            spent: dict[str, float] = {}
            spent["document"], _ = timed(lambda written=written: view_of(written))  # type: ignore[misc]
            view = view_of(written)
            spent["read"], _ = timed(lambda view=view: read(view))  # type: ignore[misc]
            for policy in POLICIES:
                view = view_of(written)
                config = ReschedulingConfig(policy=policy, cost=COST)
                spent[policy], decided = timed(lambda view=view, config=config: plan(view, PlanMemory(), config))  # type: ignore[misc]
                moves[policy][instances] = len(decided.migrations)  # type: ignore[attr-defined]
            view = in_rows(view_of(written))
            config = ReschedulingConfig(policy="star_plus", cost=COST)
            spent["from_rows"], _ = timed(lambda view=view, config=config: plan(view, PlanMemory(), config))  # type: ignore[misc]
            if number >= 0:
                for name, milliseconds in spent.items():
                    times[name][instances].append(milliseconds)
                    ratios[name][instances].append(milliseconds / spent["read"])
        known = {name: statistics.median(times[name][instances]) for name in times}
        report(f"{instances} instances: " + ", ".join(f"{name} {known[name]:.2f} ms" for name in known))
    return {
        "benchmark": "rescheduling",
        "round_ms": {policy: _medians(times[policy]) for policy in POLICIES},
        "round_over_read": {policy: _medians(ratios[policy]) for policy in POLICIES},
        "read_ms": _medians(times["read"]),
        "from_rows_ms": _medians(times["from_rows"]),
        "document_ms": _medians(times["document"]),
        "moves": {policy: {str(size): count for size, count in moves[policy].items()} for policy in POLICIES},
        "spread": {name: {str(size): _spread(values) for size, values in times[name].items()} for name in times},
        "sequences_per_instance": SEQUENCES,
        "rounds": {str(size): count for size, count in rounds.items()},
        "numpy": np.__version__,
        "machine": machine.describe(),
        "commit": machine.commit("starmesh/policy", "starmesh/sequence_loads.py", "benchmarks"),
    }


def _medians(values: dict[int, list[float]]) -> dict[str, float]:
    return {str(size): round(statistics.median(samples), 2) for size, samples in values.items()}


def _spread(samples: list[float]) -> list[float]:
    return [round(value, 2) for value in (min(samples), statistics.median(samples), max(samples))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 256 instances, fewer rounds: some 20 s")
    arguments = parser.parse_args()
    print(json.dumps(measure(QUICK_ROUNDS if arguments.quick else ROUNDS)))


if __name__ == "__main__":
    main()

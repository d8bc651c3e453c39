"""What metrics cost where work is done for each token or step: `python -m benchmarks.metrics [--quick]`.

In this process, in CPU time of the thread, which what else the machine does disturbs least: a token's way through a
router's flight, and a step of 64 sequences of the engine core over an executor that does nothing, each with and
without a page; rounds take turns. Beside it a record of OpenTelemetry's histogram, which is what a token would cost
without ``BucketCounts``, and one scrape of a router's page, in CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from collections.abc import Callable
from typing import Final

from opentelemetry.metrics import Histogram

from benchmarks import machine
from services.router.flight import Flight
from services.router.metrics import RouterMetrics
from starmesh.clock import WallClock
from starmesh.engine.emulated import EmulatedExecutor, StepNoise
from starmesh.engine.engine import EngineConfig, EngineCore, StopChecker
from starmesh.instance.metrics import StepMetrics
from starmesh.policy.cost import CostModel
from starmesh.telemetry import instruments, names
from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.metrics import Metrics, open_metrics
from starmesh.telemetry.registry import router
from starmesh.types import KvLayout, SamplingParams, SequenceSpec
from starmesh.v1 import sequence_pb2

SEQUENCES: Final = 64
LAYOUT: Final = KvLayout(model_revision="any", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=16)
NOTHING: Final = CostModel(0.0, 0.0, 1e-12, 0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args().quick else 25
    page = open_metrics("router", "router-0", listen="127.0.0.1:0")
    # What a page shows of a router and of an instance, each made once.
    requests, steps = RouterMetrics(page, model="any"), StepMetrics(page)
    histogram = instruments.histogram(page.meter, router.TIME_TO_FIRST_TOKEN)
    found: dict[str, list[float]] = {}
    measured: dict[str, Callable[[], float]] = {
        "token_without_us": lambda: _token_us(None),
        "token_with_us": lambda: _token_us(requests.gaps),
        "step_without_us": lambda: _step_us(None),
        "step_with_us": lambda: _step_us(steps),
        "otel_record_us": lambda: _record_us(histogram),
        "scrape_ms": lambda: _scrape_ms(page),
    }
    for _ in range(rounds):
        for name, measure in measured.items():
            found.setdefault(name, []).append(measure())
    page.close()
    print("| | median | min |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} |")
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    commit = machine.commit("benchmarks", "starmesh", "services")
    print(json.dumps({"benchmark": "metrics", **medians, "machine": machine.describe(), "commit": commit}))


def _token_us(gaps: BucketCounts | None, tokens: int = 5000) -> float:
    """A token's way from the decode link into its flight, up to the word that there is one."""
    flight = Flight("r", deadline_s=0.0, coalesce_window_s=0.0, on_ready=lambda _: None)
    flight.stream.max_output_tokens = tokens + 1
    flight.gaps = gaps
    outputs = [sequence_pb2.SequenceOutput(request_id="r", epoch=1, offset=at, token_ids=[7]) for at in range(tokens)]
    began_s = time.thread_time()
    for output in outputs:
        flight.deliver(output)
    return (time.thread_time() - began_s) / tokens * 1e6


def _step_us(on_step: StepMetrics | None, steps: int = 200) -> float:
    """A step of the core, the forward excepted."""
    executor = EmulatedExecutor(
        layout=LAYOUT,
        total_blocks=SEQUENCES * 32,
        cost=NOTHING,
        noise=StepNoise(0.0, seed=1, stream=1),
        ends_at=lambda item: 1 << 30,
        wait=lambda seconds: None,
    )
    config = EngineConfig(eos_token_ids=frozenset(), max_sequence_tokens=1 << 20, max_sequences=SEQUENCES)
    core = EngineCore(executor, config, stop_checker=_none, clock=WallClock())
    core.on_step = on_step
    for number in range(SEQUENCES):
        core.add(SequenceSpec(f"r{number}", 1, (1, 2), (), SamplingParams(max_output_tokens=10_000)))
    core.step()
    began_s = time.thread_time()
    for _ in range(steps):
        core.step()
    return (time.thread_time() - began_s) / steps * 1e6


def _none(spec: SequenceSpec) -> StopChecker:
    raise AssertionError("no sequence here has stop strings")


def _record_us(histogram: Histogram, records: int = 5000) -> float:
    attributes = {names.MODEL: "any", names.OPERATION: "chat"}
    began_s = time.thread_time()
    for _ in range(records):
        histogram.record(0.02, attributes)
    return (time.thread_time() - began_s) / records * 1e6


def _scrape_ms(metrics: Metrics) -> float:
    began_s = time.process_time()
    with urllib.request.urlopen(f"http://{metrics.address}/metrics") as page:
        page.read()
    return (time.process_time() - began_s) * 1e3


if __name__ == "__main__":
    main()

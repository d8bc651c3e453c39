"""What the mesh costs a request: `python -m benchmarks.mesh [--quick]`.

The same requests go to a local cluster (router, one prefill and one decode instance, all over gRPC, KV handed over) and
to one engine called directly in a process of its own, in turn: one at a time ("single", the bare overhead), and as a
Poisson process ("loaded"; there the mesh has two engine processes and the direct engine one, as the mesh is meant).
Greedy, all outputs of the same length. TTFT counts from arrival to first token, TPOT is (end - first) / (tokens - 1).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine
from starmesh.cli.bench import poisson_arrivals
from starmesh.cli.local_cluster import ClusterPlan, start_cluster
from starmesh.engine.engine import SequenceOutput
from starmesh.engine.thread import EngineThread
from starmesh.instance.loading import load_engine
from starmesh.instance.settings import EngineSettings
from starmesh.model_files import fetch_model
from starmesh.rpc.channels import open_channel
from starmesh.tokenizer import ModelTokenizer
from starmesh.types import SamplingParams, SequenceSpec
from starmesh.v1 import inference_pb2, inference_pb2_grpc, sequence_pb2

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue, and why sunsets are red.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and two examples.",
    "Name the planets of the solar system in order of their distance from the sun.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take? Think step by step.",
)
KV_MEMORY_MIB = 256


@dataclass(frozen=True)
class Timing:
    """One request, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Plan:
    """How much load. ``rate`` is requests per second in the loaded phase."""

    rounds: int
    single: int
    loaded: int
    rate: float
    output_tokens: int


Ask = Callable[[str, list[int]], Awaitable[list[float]]]
"""Runs a request by id and prompt tokens; returns when each token came, on ``time.monotonic``."""


async def time_request(ask: Ask, request_id: str, prompt: list[int]) -> Timing:
    start_s = time.monotonic()
    times = await ask(request_id, prompt)
    return Timing(times[0] - start_s, (times[-1] - times[0]) / (len(times) - 1))


async def phase(ask: Ask, name: str, prompts: list[list[int]], plan: Plan, seed: int) -> list[Timing]:
    """All requests of a phase."""
    turns = itertools.cycle(prompts)
    if name == "single":
        return [await time_request(ask, f"{name}-{seed}-{number}", next(turns)) for number in range(plan.single)]
    start_s = time.monotonic()
    tasks = []
    for number, arrival_s in enumerate(itertools.islice(poisson_arrivals(plan.rate, seed), plan.loaded)):
        await asyncio.sleep(max(0.0, start_s + arrival_s - time.monotonic()))
        tasks.append(asyncio.create_task(time_request(ask, f"{name}-{seed}-{number}", next(turns))))
    return list(await asyncio.gather(*tasks))


async def serve_direct(model: Path, plan: Plan) -> None:
    """The direct engine: for each "phase seed" line on stdin runs the phase and prints its timings."""
    settings = EngineSettings(model=str(model), kv_memory_mib=KV_MEMORY_MIB, _cli_parse_args=[])
    loaded = load_engine(settings, model, prefix_caching=True)
    running: dict[str, tuple[list[float], asyncio.Future[None]]] = {}

    def deliver(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            times, done = running[output.request_id]
            times += [time.monotonic()] * len(output.token_ids)
            if output.finish_reason is not None:
                done.set_result(None)

    engine = EngineThread(lambda: loaded.core, deliver)
    await engine.start()

    async def ask(request_id: str, prompt: list[int]) -> list[float]:
        sampling = SamplingParams(max_output_tokens=plan.output_tokens, temperature=0.0, ignore_eos=True)
        times, done = running[request_id] = ([], asyncio.get_running_loop().create_future())
        await engine.call(lambda core: core.add(SequenceSpec(request_id, 1, tuple(prompt), (), sampling)))
        await done
        return times

    prompts = encode(model)
    await ask("warm-up", prompts[0])
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, seed = line.split()
        print(json.dumps([asdict(timing) for timing in await phase(ask, name, prompts, plan, int(seed))]), flush=True)
    await engine.stop()


def encode(model: Path) -> list[list[int]]:
    tokenizer = ModelTokenizer.load(model)
    return [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


async def measure(model: Path, plan: Plan, arguments: list[str]) -> dict[tuple[str, str], list[Timing]]:
    """Timings by (phase, who), rounds of mesh and direct in turn."""
    found: dict[tuple[str, str], list[Timing]] = {}
    direct = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.mesh", "--direct", "--model", str(model), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    assert direct.stdin is not None and direct.stdout is not None
    prompts = encode(model)
    try:
        with tempfile.TemporaryDirectory() as directory:
            cluster_plan = ClusterPlan(
                model=model,
                run_directory=Path(directory),
                prefill=1,
                decode=1,
                engine_flags=("--kv-memory-mib", str(KV_MEMORY_MIB)),
            )
            async with start_cluster(cluster_plan, note) as cluster, open_channel(cluster.address) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)

                async def ask(request_id: str, prompt: list[int]) -> list[float]:
                    request = inference_pb2.GenerateRequest(
                        request_id=request_id,
                        token_ids=inference_pb2.TokenIds(token_ids=prompt),
                        sampling=sequence_pb2.SamplingParams(
                            max_output_tokens=plan.output_tokens, temperature=0.0, ignore_eos=True
                        ),
                    )
                    times: list[float] = []
                    async for response in stub.Generate(request, timeout=300):
                        times += [time.monotonic()] * len(response.token_ids)
                    return times

                await direct.stdout.readline()
                await ask("warm-up", prompts[0])
                for seed, name in itertools.product(range(plan.rounds), ("single", "loaded")):
                    direct.stdin.write(f"{name} {seed}\n".encode())
                    timings = [Timing(**timing) for timing in json.loads(await direct.stdout.readline())]
                    found.setdefault((name, "direct"), []).extend(timings)
                    found.setdefault((name, "mesh"), []).extend(await phase(ask, name, prompts, plan, seed))
                    note(f"round {seed + 1} of {plan.rounds}, {name}")
    finally:
        direct.stdin.close()
        await direct.wait()
    return found


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def summary(timings: list[Timing], field: str) -> dict[str, float]:
    values = sorted(1000 * float(getattr(timing, field)) for timing in timings)
    return {
        "p10": round(values[len(values) // 10], 1),
        "p50": round(statistics.median(values), 1),
        "p90": round(values[min(len(values) - 1, len(values) * 9 // 10)], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", type=Path, help="model directory; the default model otherwise")
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = arguments.model or fetch_model()
    quick = Plan(rounds=1, single=3, loaded=6, rate=1.5, output_tokens=12)
    plan = quick if arguments.quick else Plan(rounds=3, single=5, loaded=16, rate=0.8, output_tokens=48)
    if arguments.direct:
        asyncio.run(serve_direct(model, plan))
        return
    found = asyncio.run(measure(model, plan, ["--quick"] if arguments.quick else []))
    result: dict[str, object] = {"benchmark": "mesh", "plan": asdict(plan)}
    for key, field in (("ttft_ms", "ttft_s"), ("tpot_ms", "tpot_s")):
        by_phase = {}
        for name in ("single", "loaded"):
            mesh, direct = summary(found[name, "mesh"], field), summary(found[name, "direct"], field)
            by_phase[name] = {"mesh": mesh, "direct": direct, "ratio_p50": round(mesh["p50"] / direct["p50"], 3)}
        result[key] = by_phase
    result |= {"machine": machine.describe(), "commit": machine.commit("starmesh", "services", "protos")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

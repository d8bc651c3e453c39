"""What a streamed token costs the router: `python -m benchmarks.router [--quick]`.

Three processes: a scripted prefill and decode instance (no model, no KV: it makes up token ids), the real router, and
this one, which is the client and starts a private Redis as the ledger. 64 streams run at once, paced at 25 tokens a
second each or as fast as all three manage, through Generate (a stream and a message per token for each) and through
GenerateMany (one stream for all). The cost is the router's CPU time, idle work included, by the tokens that the client
received meanwhile. The settings take turns, so that all share whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks import machine
from starmesh.ledger.membership import Membership
from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer
from starmesh.model_files import fetch_model
from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.rpc.server import RpcServer
from starmesh.types import InstanceInfo, InstanceLoad, KvLayout, KvTicket, Role
from starmesh.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    sequence_pb2,
)

STREAMS = 64
TOKENS_PER_S = 25
MAX_OUTPUT_TOKENS = 8000
CONTEXT_TOKENS = 8192
VOCABULARY = range(300, 40_000)  # ordinary words of the default model
CLUSTER = "benchmark"
LAYOUT = KvLayout(model_revision="any", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=16)
PACES = ("paced", "flat_out")


class Worker(prefill_pb2_grpc.PrefillServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Both instances in one process. A request's priority says how: 0 paced, 1 flat out."""

    def __init__(self, vocabulary: Sequence[int] = VOCABULARY) -> None:
        self.address = ""
        self._vocabulary = vocabulary
        self._tokens = random.Random(0)

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> prefill_pb2.PrefillResponse:
        ticket = KvTicket("lease", "prefill", self.address, LAYOUT, (0,), 1, 60.0)
        return prefill_pb2.PrefillResponse(token_id=self._vocabulary[0], ticket=convert.ticket_pb(ticket))

    async def Decode(  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        running: dict[str, list[int]] = {}
        flat_out = False
        some = asyncio.Event()

        async def read() -> None:
            nonlocal flat_out
            async for request in request_iterator:
                if request.HasField("start"):
                    spec = request.start.sequence
                    running[spec.request_id] = [spec.epoch, len(spec.output_token_ids)]
                    flat_out = spec.priority == 1
                    some.set()
                else:
                    running.pop(request.cancel.request_id, None)

        reader = asyncio.create_task(read())
        due_s = time.monotonic()
        try:
            while True:
                if not running:
                    some.clear()
                    await some.wait()
                due_s = max(due_s + 1 / TOKENS_PER_S, time.monotonic() - 1.0) if not flat_out else time.monotonic()
                # Each turn of the loop also lets the reader hear of cancels.
                await asyncio.sleep(0 if flat_out else max(0.0, due_s - time.monotonic()))
                outputs = []
                for request_id, state in list(running.items()):
                    outputs.append(
                        sequence_pb2.SequenceOutput(
                            request_id=request_id,
                            epoch=state[0],
                            offset=state[1],
                            token_ids=[self._tokens.choice(self._vocabulary)],
                        )
                    )
                    state[1] += 1
                    if state[1] >= MAX_OUTPUT_TOKENS:
                        outputs[-1].finish_reason = sequence_pb2.FINISH_REASON_LENGTH
                        del running[request_id]
                yield decode_pb2.DecodeResponse(outputs=outputs)
        finally:
            reader.cancel()


async def run_worker(ledger_url: str, vocabulary: Sequence[int] = VOCABULARY) -> None:
    """Serve until the parent closes our stdin."""
    worker = Worker(vocabulary)
    server = RpcServer(listen="127.0.0.1:0")
    server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, worker, "starmesh.v1.PrefillService")
    server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, worker, "starmesh.v1.DecodeService")
    worker.address = await server.start()
    ledger = RedisLedger.connect(ledger_url, cluster=CLUSTER)

    async def load() -> InstanceLoad:
        return InstanceLoad(total_blocks=10**6, free_blocks=10**6)

    members = []
    for role in (Role.PREFILL, Role.DECODE):
        info = InstanceInfo(role.value, "1", role, worker.address, layout=LAYOUT, max_sequence_tokens=CONTEXT_TOKENS)
        members.append(Membership(ledger, info, load=load, ttl_s=5.0, interval_s=0.25))
        await members[-1].start()
    await asyncio.to_thread(sys.stdin.read)
    for member in members:
        await member.stop()
    await server.stop(0)
    await ledger.close()


class Load:
    """64 streams of one kind and pace; counts what arrives."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, *, flat_out: bool) -> None:
        self.tokens = 0
        self.messages = 0
        self._stub = stub
        self._flat_out = flat_out

    def request(self, number: int) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            request_id=f"{number}-{random.getrandbits(64):x}",
            text="Once upon a time",
            priority=int(self._flat_out),
            sampling=sequence_pb2.SamplingParams(max_output_tokens=MAX_OUTPUT_TOKENS, ignore_eos=True),
        )

    async def generate(self) -> None:
        """Keep a Generate call open for each stream, until cancelled."""

        async def one(number: int) -> None:
            while True:
                call = self._stub.Generate(self.request(number), timeout=600)
                async for message in call:
                    self.tokens += len(message.token_ids)
                    self.messages += 1

        async with asyncio.TaskGroup() as streams:
            for number in range(STREAMS):
                streams.create_task(one(number))

    async def generate_many(self) -> None:
        """The same over one GenerateMany call."""
        call = self._stub.GenerateMany(timeout=600)
        for number in range(STREAMS):
            await call.write(inference_pb2.GenerateManyRequest(generate=self.request(number)))
        while isinstance(message := await call.read(), inference_pb2.GenerateManyResponse):
            if message.failures:
                raise RuntimeError(message.failures[0].status.message)
            self.messages += 1
            for response in message.responses:
                self.tokens += len(response.token_ids)
                if response.finish_reason:
                    await call.write(inference_pb2.GenerateManyRequest(generate=self.request(0)))


async def measure_one(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, router: psutil.Process, method: str, pace: str, seconds: float
) -> dict[str, float]:
    """Run one load, and measure once all streams are under way."""
    load = Load(stub, flat_out=pace == "flat_out")
    streams = asyncio.create_task(load.generate() if method == "generate" else load.generate_many())
    try:
        async with asyncio.timeout(30):
            while load.tokens < STREAMS * 10:
                await asyncio.sleep(0.05)
                if streams.done():
                    streams.result()
        before, tokens, messages, started_s = router.cpu_times(), load.tokens, load.messages, time.monotonic()
        await asyncio.sleep(seconds)
        after, elapsed_s = router.cpu_times(), time.monotonic() - started_s
    finally:
        streams.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await streams
    tokens, messages = load.tokens - tokens, load.messages - messages
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "us_per_token": 1e6 * cpu_s / tokens,
        "tokens_per_s": tokens / elapsed_s,
        "tokens_per_message": tokens / messages,
        "cpu_fraction": cpu_s / elapsed_s,
    }


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Start the processes, run every setting in each round, and end them."""
    await asyncio.to_thread(fetch_model)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(await EmbeddedServer.start())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.router", "--worker", redis.url, stdin=asyncio.subprocess.PIPE
        )
        port_file = directory / "router"
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.router", "--ledger", redis.url, "--cluster", CLUSTER,
            "--port-file", str(port_file), "--log-level", "warning",
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                while not port_file.exists():
                    await asyncio.sleep(0.1)
            channel = await stack.enter_async_context(open_channel(port_file.read_text()))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            sampling = sequence_pb2.SamplingParams(max_output_tokens=10)
            async for _ in stub.Generate(inference_pb2.GenerateRequest(text="warm up", sampling=sampling), timeout=30):
                pass
            process = psutil.Process(router.pid)
            await asyncio.sleep(1.0)
            before = process.cpu_times()
            await asyncio.sleep(2.0)
            after = process.cpu_times()
            idle_fraction = (after.user + after.system - before.user - before.system) / 2.0
            results: dict[tuple[str, str], list[dict[str, float]]] = {}
            for _ in range(rounds):
                for method in ("generate", "generate_many"):
                    for pace in PACES:
                        result = await measure_one(stub, process, method, pace, seconds)
                        results.setdefault((method, pace), []).append(result)
        finally:
            router.terminate()
            assert worker.stdin is not None
            worker.stdin.close()
            await asyncio.gather(router.wait(), worker.wait())
    return summary(results, rounds, seconds, idle_fraction)


def summary(
    results: dict[tuple[str, str], list[dict[str, float]]], rounds: int, seconds: float, idle_fraction: float
) -> dict[str, Any]:
    """Medians over the rounds, with the smallest and the largest of each cost."""

    def describe(runs: list[dict[str, float]]) -> dict[str, float]:
        costs = [run["us_per_token"] for run in runs]
        others = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
        spread = {"median": statistics.median(costs), "min": min(costs), "max": max(costs)}
        return {name: round(value, 2) for name, value in spread.items()} | {
            name: value for name, value in others.items() if name != "us_per_token"
        }

    return {
        "benchmark": "router",
        "streams": STREAMS,
        "paced_tokens_per_s": STREAMS * TOKENS_PER_S,
        "rounds": rounds,
        "seconds": seconds,
        "idle_cpu_fraction": round(idle_fraction, 3),
        **{
            f"{method}_us_per_token": {pace: describe(results[method, pace]) for pace in PACES}
            for method in ("generate", "generate_many")
        },
        "machine": machine.describe(),
        "commit": machine.commit("services/router", "starmesh", "benchmarks/router.py"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 2 s instead of 7 of 5 s")
    parser.add_argument("--worker", metavar="LEDGER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(run_worker(arguments.worker))
        return
    result = asyncio.run(measure(3, 2.0) if arguments.quick else measure(7, 5.0))
    print("| | pace | us of router CPU per token (min to max) | tokens/s | tokens per message |\n|---|---|---|---|---|")
    for method in ("generate", "generate_many"):
        for pace, cost in result[f"{method}_us_per_token"].items():
            print(
                f"| {method} | {pace} | {cost['median']} ({cost['min']} to {cost['max']}) "
                f"| {cost['tokens_per_s']:.0f} | {cost['tokens_per_message']:.1f} |"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What a streamed token and a request cost the router over HTTP and over gRPC: `python -m benchmarks.http [--quick]`.

As `benchmarks.router`: a scripted prefill and decode instance, the real router, and this process, which is the client.
64 streams run at once, paced at 25 tokens a second each or as fast as all three manage, through gRPC's Generate and
through POST /v1/completions with `stream`; and 16 callers ask for an answer of one token again and again, through
both. The cost is the router's CPU time, idle work included, by the tokens or requests that the client has had
meanwhile. The settings take turns, so that all share whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import psutil  # type: ignore[import-untyped]

from benchmarks import machine
from benchmarks.router import CLUSTER, MAX_OUTPUT_TOKENS, STREAMS, TOKENS_PER_S, run_worker
from starmesh.ledger.server import EmbeddedServer
from starmesh.model_files import fetch_model
from starmesh.rpc.channels import open_channel
from starmesh.tokenizer import ModelTokenizer
from starmesh.v1 import inference_pb2, inference_pb2_grpc, sequence_pb2

CALLERS = 16
SETTINGS = tuple((way, pace) for pace in ("paced", "flat_out", "requests") for way in ("grpc", "http"))
PROMPT = "Once upon a time"


def words(tokenizer: ModelTokenizer) -> list[int]:
    """Tokens that are a space and a word: so the client can count them in a text."""
    found = [
        token_id
        for token_id in range(300, 40_000)
        if (token := tokenizer.backend.id_to_token(token_id) or "").startswith("Ġ")
        and token[1:].isascii()
        and token[1:].isalpha()
    ]
    assert len(found) > 1000
    return found


class Load:
    """The client's side of one setting; ``done`` counts tokens, or requests."""

    def __init__(self, channel: grpc.aio.Channel, http: tuple[str, int], *, way: str, pace: str) -> None:
        self.done = 0
        self.under_way = CALLERS if pace == "requests" else STREAMS * 5
        """What is done when it has begun everywhere."""
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._http = http
        self._way = way
        self._pace = pace

    async def run(self) -> None:
        """Until cancelled."""
        short = self._pace == "requests"
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS if short else STREAMS):
                if self._way == "grpc":
                    tasks.create_task(self._ask_grpc(short))
                else:
                    tasks.create_task(self._ask_http() if short else self._stream_http())

    async def _ask_grpc(self, short: bool) -> None:
        sampling = sequence_pb2.SamplingParams(max_output_tokens=1 if short else MAX_OUTPUT_TOKENS, ignore_eos=True)
        while True:
            request = inference_pb2.GenerateRequest(
                text=PROMPT, priority=int(self._pace == "flat_out"), sampling=sampling
            )
            async for message in self._stub.Generate(request, timeout=600):
                self.done += 1 if short else len(message.token_ids)

    async def _stream_http(self) -> None:
        while True:
            reader, writer = await self._post(stream=True, max_tokens=MAX_OUTPUT_TOKENS)
            try:
                data = b" "
                while data and not data.endswith(b"0\r\n\r\n"):
                    data = await reader.read(65536)
                    # Each token is a space and a word, and JSON is written without spaces.
                    self.done += data.count(b" ") - data.count(b"data: ")
            finally:
                writer.close()

    async def _ask_http(self) -> None:
        reader, writer = await self._post(stream=False, max_tokens=1)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                answer = await reader.readexactly(length)
                assert head.startswith(b"HTTP/1.1 200 "), answer
                self.done += 1
                self._write(writer, stream=False, max_tokens=1)
        finally:
            writer.close()

    async def _post(self, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self._http)
        self._write(writer, **fields)
        return reader, writer

    def _write(self, writer: asyncio.StreamWriter, **fields: Any) -> None:
        body = {"prompt": PROMPT, "ignore_eos": True, "priority": int(self._pace == "flat_out")} | fields
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)


async def measure_one(load: Load, router: psutil.Process, seconds: float) -> dict[str, float]:
    """Run one load, and measure once it is under way."""
    running = asyncio.create_task(load.run())
    try:
        async with asyncio.timeout(60):
            while load.done < load.under_way:
                await asyncio.sleep(0.05)
                if running.done():
                    running.result()
        before, done, started_s = router.cpu_times(), load.done, time.monotonic()
        await asyncio.sleep(seconds)
        after, elapsed_s = router.cpu_times(), time.monotonic() - started_s
        done = load.done - done
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    cpu_s = after.user + after.system - before.user - before.system
    return {"us": 1e6 * cpu_s / done, "per_s": done / elapsed_s, "per_core_s": done / cpu_s}


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Start the processes, run every setting in each round, and end them."""
    await asyncio.to_thread(fetch_model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        http = ("127.0.0.1", int(free.getsockname()[1]))
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(await EmbeddedServer.start())
        port_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "router"
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.http", "--worker", redis.url, stdin=asyncio.subprocess.PIPE
        )
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.router", "--ledger", redis.url, "--cluster", CLUSTER,
            "--port-file", str(port_file), "--http-listen", f"{http[0]}:{http[1]}", "--log-level", "warning",
        )  # fmt: skip
        try:
            async with asyncio.timeout(120):
                while not port_file.exists():
                    await asyncio.sleep(0.1)
            channel = await stack.enter_async_context(open_channel(port_file.read_text()))
            process = psutil.Process(router.pid)
            results: dict[tuple[str, str], list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
            for _ in range(rounds):
                for way, pace in SETTINGS:
                    load = Load(channel, http, way=way, pace=pace)
                    results[way, pace].append(await measure_one(load, process, seconds))
        finally:
            router.terminate()
            assert worker.stdin is not None
            worker.stdin.close()
            await asyncio.gather(router.wait(), worker.wait())
    return {
        "benchmark": "http",
        "streams": STREAMS,
        "paced_tokens_per_s": STREAMS * TOKENS_PER_S,
        "callers": CALLERS,
        "rounds": rounds,
        "seconds": seconds,
        "results": {f"{way} {pace}": describe(runs) for (way, pace), runs in results.items()},
        "machine": machine.describe(),
        "commit": machine.commit("services/router", "starmesh", "benchmarks/http.py", "benchmarks/router.py"),
    }


def describe(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds, with the smallest and the largest cost."""
    costs = [run["us"] for run in runs]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {name: round(value, 1) for name, value in (medians | {"us_min": min(costs), "us_max": max(costs)}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 2 s instead of 7 of 5 s")
    parser.add_argument("--worker", metavar="LEDGER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(run_worker(arguments.worker, words(ModelTokenizer.load(fetch_model()))))
        return
    result = asyncio.run(measure(3, 2.0) if arguments.quick else measure(7, 5.0))
    print("| | | us of router CPU (min to max) | per second | per second of router CPU |\n|---|---|---|---|---|")
    for name, cost in result["results"].items():
        way, pace = name.split()
        what = "a request of one token" if pace == "requests" else f"a token, {pace}"
        spread = f"{cost['us']} ({cost['us_min']} to {cost['us_max']})"
        print(f"| {what} | {way} | {spread} | {cost['per_s']:.0f} | {cost['per_core_s']:.0f} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

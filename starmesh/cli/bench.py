"""``starmesh bench``: puts load on a cluster and measures what its clients see.

With a rate it is an open loop: requests arrive as a Poisson process, whatever the cluster makes of them. Without one
it is a closed loop of ``concurrency`` clients. Owns the load; ``bench_report`` owns the numbers.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from starmesh.cli.bench_report import Outcome, Report
from starmesh.cli.options import Asking
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.cli.run import CliError
from starmesh.emulation.requests import emulated_prompt
from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import inference_pb2, sequence_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests arrive. ``rate`` is requests per second, None for a closed loop; ``seed`` fixes the arrivals."""

    requests: int
    rate: float | None = None
    concurrency: int = 16
    seed: int = 0
    timeout_s: float = 600.0


def read_prompts(source: str) -> list[str]:
    """The prompts of a JSON Lines file (``-``: stdin; ``.gz``: packed), each line an object with "prompt" or, for an
    emulated cluster, with "prompt_tokens" and "output_tokens".

    Raises CliError naming the line that is not one.
    """
    try:
        if source == "-":
            lines = sys.stdin.read().splitlines()
        elif source.endswith(".gz"):
            with gzip.open(source, "rt", encoding="utf-8") as file:
                lines = file.read().splitlines()
        else:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read {source}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt_of(line, number)
        if not prompt:
            raise CliError(
                f'{source}, line {number}: each line must be an object like {{"prompt": "..."}} or, for an emulated '
                'cluster, {"prompt_tokens": 500, "output_tokens": 2000}'
            )
        prompts.append(prompt)
    if not prompts:
        raise CliError(f'{source} has no prompts; give it lines like {{"prompt": "..."}}')
    return prompts


def _prompt_of(line: str, number: int) -> str | None:
    """The prompt that a line holds or describes; None for a line that does neither."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    match entry:
        case {"prompt": str(prompt)}:
            return prompt
        case {"prompt_tokens": int(prompt_tokens), "output_tokens": int(output_tokens)}:
            return emulated_prompt(prompt_tokens, output_tokens, note=f"line={number}")
        case _:
            return None


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds, the first at 0, with exponential gaps of mean 1 / ``rate``."""
    draw = random.Random(seed)  # noqa: S311 - load, not a secret
    now_s = 0.0
    while True:
        yield now_s
        now_s += draw.expovariate(rate)


async def requests_of(
    router: RouterClient, prompts: Sequence[str], asking: Asking
) -> Iterator[inference_pb2.GenerateRequest]:
    """Requests for the prompts in turn and over again. Raises AioRpcError when the router does not answer."""
    model = await router.inference.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S)
    return (asking.request(prompt, chat=model.has_chat_template) for prompt in itertools.cycle(prompts))


async def bench(
    router: RouterClient,
    requests: Iterator[inference_pb2.GenerateRequest],
    load: Load,
    *,
    slo_ttft_s: float,
    slo_tpot_s: float,
    on_progress: Callable[[Outcome], None],
) -> Report:
    """Run the test with the next ``load.requests`` requests and report on every one. ``on_progress`` gets each as it
    ends. A failure is an outcome."""
    start_s = time.monotonic()
    outcomes: list[Outcome] = []

    async def ask(arrival_s: float) -> None:
        outcome = await _ask(router, next(requests), arrival_s=arrival_s, start_s=start_s, timeout_s=load.timeout_s)
        outcomes.append(outcome)
        on_progress(outcome)

    async with asyncio.TaskGroup() as tasks:
        if load.rate is not None:
            for arrival_s in itertools.islice(poisson_arrivals(load.rate, load.seed), load.requests):
                await asyncio.sleep(max(0.0, start_s + arrival_s - time.monotonic()))
                tasks.create_task(ask(arrival_s))
        else:
            turns = iter(range(load.requests))

            async def client() -> None:
                for _ in turns:
                    await ask(time.monotonic() - start_s)

            for _ in range(min(load.concurrency, load.requests)):
                tasks.create_task(client())
    outcomes.sort(key=lambda outcome: outcome.arrival_s)
    return Report(tuple(outcomes), slo_ttft_s, slo_tpot_s)


async def _ask(
    router: RouterClient,
    request: inference_pb2.GenerateRequest,
    *,
    arrival_s: float,
    start_s: float,
    timeout_s: float,
) -> Outcome:
    """One request to its end, however it ends."""
    times: list[float] = []
    last = inference_pb2.GenerateResponse()
    error = detail = ""
    call = router.inference.Generate(request, timeout=timeout_s)
    try:
        async for last in call:
            times += [time.monotonic() - start_s] * len(last.token_ids)
        if last.finish_reason == sequence_pb2.FINISH_REASON_UNSPECIFIED:
            error = "UNFINISHED"
    except grpc.aio.AioRpcError as failure:
        error, detail = failure.code().name, from_rpc_error(failure).message
    finally:
        call.cancel()
    return Outcome(
        arrival_s=arrival_s,
        end_s=time.monotonic() - start_s,
        token_times_s=tuple(times),
        prompt_tokens=last.usage.prompt_tokens,
        recoveries=last.usage.recoveries,
        finish_reason=sequence_pb2.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower(),
        error=error,
        detail=detail,
    )

"""``starmesh compare``: the same load under one rescheduling policy after another, each on a fresh local cluster.

Owns the runs and what is observed of the instances meanwhile; ``compare_report`` owns the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from starmesh.cli.bench import Load, requests_of
from starmesh.cli.bench_command import run_bench
from starmesh.cli.bench_report import Report
from starmesh.cli.local_cluster import ClusterPlan, start_cluster
from starmesh.cli.options import Asking
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient, connect
from starmesh.cli.run import CliError
from starmesh.cli.skewed_load import SkewedLoad
from starmesh.v1 import cluster_pb2, inference_pb2

OBSERVE_INTERVAL_S = 0.25
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Moment:
    """The decode instances at one time, in seconds since the load began: their resident tokens by id, and how many
    sequences had moved and were preempted in all."""

    at_s: float
    resident_tokens: tuple[int, ...]
    migrated_sequences: int
    preemptions: int


@dataclass(slots=True)
class PolicyRun:
    """What one policy made of the load."""

    policy: str
    report: Report
    moments: list[Moment] = field(default_factory=list)


async def compare(
    plan: ClusterPlan,
    policies: Sequence[str],
    work: SkewedLoad | tuple[list[str], Asking],
    load: Load,
    *,
    slo_ttft_s: float,
    slo_tpot_s: float,
    say: Callable[[str], None],
) -> list[PolicyRun]:
    """Run ``load`` once per policy: a skewed load, or prompts with how to ask them.

    Raises CliError when a cluster does not come up or a request fails: a load that was not done cannot be compared.
    """
    runs = []
    for policy in policies:
        say(f"{policy}: starting {plan.decode} decode instances")
        directory = plan.run_directory / policy
        flags = (*plan.rescheduler_flags, "--policy", policy)
        own = dataclasses.replace(plan, run_directory=directory, rescheduler_flags=flags)
        async with start_cluster(own, lambda line: None) as cluster, connect(cluster.address) as router:
            await _warm_up(router, plan.decode)
            say(f"{policy}: {load.requests} requests")
            run = PolicyRun(policy, Report((), slo_ttft_s, slo_tpot_s))
            async with _observing(router, run.moments):
                run.report = await run_bench(
                    router, await _requests(router, work), load, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s
                )
        _check(run, directory)
        runs.append(run)
    return runs


async def _requests(
    router: RouterClient, work: SkewedLoad | tuple[list[str], Asking]
) -> Iterator[inference_pb2.GenerateRequest]:
    if isinstance(work, SkewedLoad):
        model = await router.inference.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S)
        return work.requests(chat=model.has_chat_template)
    return await requests_of(router, *work)


async def _warm_up(router: RouterClient, decode: int) -> None:
    """One short request for each decode instance: round robin ends where it began."""
    asking = Asking(max_output_tokens=_WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
    requests = await requests_of(router, ["Hello."], asking)
    for _ in range(decode):
        async for _response in router.inference.Generate(next(requests), timeout=CALL_TIMEOUT_S * 6):
            pass


@asynccontextmanager
async def _observing(router: RouterClient, moments: list[Moment]) -> AsyncIterator[None]:
    """Add to ``moments`` while the context lasts. Raises CliError at its end if the router has told nothing any more
    before: what moved since then would be missing."""
    task = asyncio.create_task(_observe(router, moments))
    try:
        yield
        if task.done():
            raise CliError("the router stopped telling of its instances during the load; compare again")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await task


async def _observe(router: RouterClient, moments: list[Moment]) -> None:
    request = cluster_pb2.WatchClusterRequest()
    request.interval.FromNanoseconds(int(OBSERVE_INTERVAL_S * 1e9))
    start_s = asyncio.get_running_loop().time()
    # No deadline: it lasts as long as the load, and ends by cancellation.
    async for response in router.cluster.WatchCluster(request):
        loads = [instance.load for instance in response.instances if instance.role == cluster_pb2.ROLE_DECODE]
        moments.append(
            Moment(
                at_s=asyncio.get_running_loop().time() - start_s,
                resident_tokens=tuple(load.resident_tokens for load in loads),
                migrated_sequences=sum(load.migrated_sequences for load in loads),
                preemptions=sum(load.preemptions for load in loads),
            )
        )


def write_json(path: Path, contents: Sequence[dict[str, Any]]) -> None:
    """Write what ``run_json`` made of each policy. Raises CliError when that cannot be written."""
    try:
        path.write_text(json.dumps(list(contents), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}; the table above is all there is") from error


def _check(run: PolicyRun, directory: Path) -> None:
    failed = [outcome for outcome in run.report.outcomes if outcome.error]
    if failed:
        first = failed[0]
        raise CliError(
            f"{run.policy}: {len(failed)} of {len(run.report.outcomes)} requests failed, the first with {first.error}: "
            f"{first.detail or 'no details'}; logs: {directory}"
        )

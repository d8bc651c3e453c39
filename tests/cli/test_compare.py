"""What ``starmesh compare`` asks for and what it says of it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from rich.console import Console, RenderableType

from starmesh.cli.bench_report import Outcome, Report
from starmesh.cli.compare import Moment, PolicyRun, _observing
from starmesh.cli.compare_report import comparison, run_json
from starmesh.cli.run import CliError
from starmesh.cli.skewed_load import SkewedLoad
from starmesh.cli.status import spread
from starmesh.v1 import cluster_pb2

pytestmark = pytest.mark.fast


def text_of(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(what)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def run(policy: str, *moments: Moment) -> PolicyRun:
    outcome = Outcome(arrival_s=0.0, end_s=2.0, token_times_s=(1.0, 1.5, 2.0), finish_reason="length")
    return PolicyRun(policy, Report((outcome,), 2.0, 1.0), list(moments))


def test_round_robin_puts_all_long_requests_on_one_instance() -> None:
    load = SkewedLoad(count=10, period=3, long_tokens=100, short_tokens=7)
    limits = [request.sampling.max_output_tokens for request in load.requests(chat=True)]
    assert [number for number, limit in enumerate(limits) if limit == 100] == [0, 3, 6, 9]
    assert sum(limits) == load.output_tokens
    assert all(request.sampling.ignore_eos for request in load.requests(chat=False))


def test_spread_is_the_distance_from_the_mean() -> None:
    assert spread([]) == spread([7]) == spread([5, 5, 5]) == 0.0
    assert spread([0, 10]) == 5.0
    assert spread([30, 0, 0]) == pytest.approx(14.142, abs=1e-3)


def test_only_what_the_load_itself_did_counts() -> None:
    before, after = Moment(0.0, (0, 0), 4, 1), Moment(9.0, (0, 0), 7, 1)
    busy = [Moment(1.0, (100, 0), 4, 1), Moment(2.0, (50, 50), 6, 1)]
    content = run_json(run("star", before, *busy, after))
    assert content["spread_tokens"] == {"mean": 25.0, "p90": 45.0}
    assert (content["migrated_sequences"], content["preemptions"]) == (3, 0)
    assert [moment["at_s"] for moment in content["moments"]] == [1.0, 2.0]
    assert run_json(run("none"))["spread_tokens"] == {"mean": None, "p90": None}


def test_the_policies_stand_side_by_side_and_on_one_scale() -> None:
    high, low = Moment(1.0, (100, 0), 0, 0), Moment(1.0, (50, 48), 5, 0)
    shown = text_of(comparison([run("none", high), run("star_plus", low)]))
    assert "none" in shown and "star_plus" in shown
    lines = {line.split("|")[0].strip(): line.split("|")[1] for line in shown.splitlines() if "|" in line}
    assert "█" in lines["none"] and "█" not in lines["star_plus"]
    (within,) = (line for line in shown.splitlines() if line.startswith("within TTFT 2 s and TPOT 1 s"))
    assert within.split()[-2:] == ["100%", "100%"]
    (moved,) = (line for line in shown.splitlines() if line.startswith("sequences moved"))
    assert moved.split()[-2:] == ["0", "0"]  # moves are counted from the first moment on


async def test_a_run_that_was_not_seen_to_its_end_does_not_count() -> None:
    told = asyncio.Event()

    async def watch(_: cluster_pb2.WatchClusterRequest) -> AsyncIterator[cluster_pb2.WatchClusterResponse]:
        yield cluster_pb2.WatchClusterResponse()
        told.set()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())

    router = SimpleNamespace(cluster=SimpleNamespace(WatchCluster=watch))
    moments: list[Moment] = []
    with pytest.raises(CliError, match="compare again"):
        async with _observing(router, moments):  # type: ignore[arg-type]
            await told.wait()
            await asyncio.sleep(0)
    assert len(moments) == 1

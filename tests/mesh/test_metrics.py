"""Every metric of the registry, as real processes show it under real traffic: nothing is missing, nothing is shown that
is not registered, and what happened is what they say. Where a Prometheus is installed it scrapes them meanwhile, and
answers every query of the dashboards and alerts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import httpx2
import pytest
import yaml

from starmesh.emulation.requests import emulated_prompt, emulated_request
from starmesh.telemetry.registry import METRICS, tls
from starmesh.types import Role
from starmesh.v1 import cluster_pb2, inference_pb2
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import Answer, generate, generate_all
from tests.mesh.test_http import HTTP, url_of
from tests.telemetry.pages import Seen, page_url, scrape
from tests.telemetry.prometheus import Prometheus, running_prometheus

DEPLOY = Path(__file__).parents[2] / "deploy"
PAGE = ("--metrics-listen", "127.0.0.1:0")
# Steps of some 3 ms.
EMULATED = ("--engine", "emulated", "--profile", "h100-7b", "--speed", "2", *PAGE)
ENGINE = (*EMULATED, "--transfer", "stream", "--kv-tokens")
# Room for two of the long sequences, so that six are preempted, and for any.
SMALL, LARGE = "3200", "130000"
# A machine that is busy with other tests reports late; that is no reason here to leave an instance alone.
ROUNDS = ("--round-interval-s", "0.2", "--stale-after-s", "30")
WAIT_S = 120.0
LONG_TOKENS = 1200
OF_FAILURES = {"error_type", "starmesh_migration_cause"}
"""Labels of what need not fail here."""
OF_TLS = tls.CERTIFICATE_EXPIRES
"""Not shown by this mesh, which speaks plaintext: test_secured sees it."""
MAY_BE_EMPTY = ("starmesh_migration_outcome!=", OF_TLS.prometheus_name)
"""Parts of queries for what need not happen here."""
ENDLESS_TOKENS = 20_000
"""More than any wait of this test takes: these are cancelled."""


class Pages:
    """The pages of a mesh's services, gathered now and then: a process that is killed takes its page along."""

    def __init__(self, mesh: Mesh, prometheus: Prometheus | None) -> None:
        self._mesh = mesh
        self._prometheus = prometheus
        self.seen: dict[Role, Seen] = defaultdict(Seen)

    async def gather(self) -> None:
        """Read the pages of all services that live, and let Prometheus do so from now on."""
        living = [service for service in self._mesh.services.values() if service.process.returncode is None]
        urls = [(service.role, page_url(service.log.read_text())) for service in living]
        for role, url in urls:
            self.seen[Role(role)].add(await asyncio.to_thread(scrape, url))
        if self._prometheus is not None:
            self._prometheus.scrape(urls)


def requests(prefix: str, tokens: int) -> list[inference_pb2.GenerateRequest]:
    """Six."""
    return [emulated_request(100, tokens, request_id=f"{prefix}-{number}") for number in range(6)]


@asynccontextmanager
async def endless(mesh: Mesh, prefix: str) -> AsyncIterator[None]:
    """Six requests that run within the context, and are cancelled."""
    begun = asyncio.Event()
    running = asyncio.create_task(
        generate_all(
            mesh.inference(),
            requests(prefix, ENDLESS_TOKENS),
            on_token=lambda tokens: begun.set() if tokens > 20 else None,
        )
    )
    await asyncio.wait_for(begun.wait(), WAIT_S)
    yield
    assert not running.done()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def moved_sequences(mesh: Mesh) -> int:
    return sum(instance.load.migrated_sequences for instance in await mesh.instances())


async def test_every_metric_is_shown_and_no_other(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path) as mesh, running_prometheus(tmp_path) as prometheus:
        pages = Pages(mesh, prometheus)
        # No answer may be longer than what the prefill instance can hold.
        await asyncio.gather(
            mesh.start("prefill", "prefill-0", *ENGINE, LARGE), mesh.start("decode", "decode-0", *ENGINE, SMALL)
        )
        await mesh.start("router", "router", *EMULATED, *HTTP)
        await mesh.all_seen(3)
        await mesh.start_predictor(*EMULATED, "--predictor", "oracle", "--queue", "2")
        await mesh.start("rescheduler", "rescheduler", *EMULATED, *ROUNDS)
        await pages.gather()
        pages.seen.clear()
        answers = await sequences_are_preempted(mesh)
        await pages.gather()
        requests_and_preemptions_are_shown(pages, answers)
        await another_instance_takes_its_place(mesh)
        await sequences_are_rescheduled(mesh)
        await pages.gather()
        await a_request_is_refused(mesh)
        await an_instance_dies(mesh)
        await an_instance_is_drained(mesh)
        await pages.gather()
        await the_ledger_is_away(mesh)
        await pages.gather()
        the_rest_is_shown(pages)
        check_registry(pages.seen)
        if prometheus is not None:
            await every_query_is_answered(prometheus)


def check_registry(seen: dict[Role, Seen]) -> None:
    """All that is registered for a role is on its pages, as it is registered, and nothing else."""
    missing: list[str] = []
    for row in METRICS:
        for role in row.roles if row is not OF_TLS else ():
            if not seen[role].values.get(row.series[0]):
                missing.append(f"{row.name} of {role.value}")
                continue
            assert seen[role].types[row.prometheus_name] == row.prometheus_type, row.name
            assert seen[role].labels[row.prometheus_name] <= set(row.labels), row.name
    assert not missing
    for role, found in seen.items():
        registered = {row.prometheus_name for row in METRICS if role in row.roles} | {"target_info"}
        assert found.types.keys() <= registered, role
        assert OF_TLS.prometheus_name not in found.types, role
    for row in METRICS:
        shown = set[str]().union(*(seen[role].labels[row.prometheus_name] for role in row.roles))
        assert shown | OF_FAILURES == set(row.labels) | OF_FAILURES, row.name


async def sequences_are_preempted(mesh: Mesh) -> list[Answer]:
    """Six long sequences at an instance that holds two."""
    stub = mesh.inference()
    text = generate(stub, inference_pb2.GenerateRequest(text=emulated_prompt(40, 30)))
    short, answers = await asyncio.gather(text, generate_all(stub, requests("long", LONG_TOKENS)))
    assert [len(answer.token_ids) for answer in answers] == [LONG_TOKENS] * 6
    await mesh.settled()
    return [short, *answers]


async def another_instance_takes_its_place(mesh: Mesh) -> None:
    await mesh.start("decode", "decode-1", *ENGINE, LARGE)
    small = mesh.services["decode-0"]
    small.terminate()
    assert await asyncio.wait_for(small.process.wait(), WAIT_S) == 0
    await mesh.all_seen(5)


async def sequences_are_rescheduled(mesh: Mesh) -> None:
    """To an instance that comes when the only other one has them all."""
    async with endless(mesh, "moved"):
        await mesh.start("decode", "decode-2", *ENGINE, LARGE)
        log = mesh.services["rescheduler"].log
        await until(lambda: moved_sequences(mesh), "a sequence to move", WAIT_S, describe=log.read_text)


def requests_and_preemptions_are_shown(pages: Pages, answers: list[Answer]) -> None:
    router, decode = pages.seen[Role.ROUTER], pages.seen[Role.DECODE]
    assert router.total("starmesh_requests_total", starmesh_outcome="stop") == 7
    assert router.total("starmesh_requests_active") == 0
    assert router.total("gen_ai_server_time_to_first_token_seconds_count") == 7
    assert router.total("gen_ai_server_time_per_output_token_seconds_count") == 7
    # A gap for each token but the first of each request, less those that came with another to the router. On the way to
    # the client it may join more of them.
    gaps = router.total("starmesh_inter_token_latency_seconds_count")
    assert 0 < sum(answer.arrivals - 1 for answer in answers) <= gaps
    assert gaps <= sum(len(answer.token_ids) - 1 for answer in answers)
    assert router.total("starmesh_request_tokens_sum", gen_ai_token_type="output") == 6 * LONG_TOKENS + 30
    assert decode.total("starmesh_preemptions_total") >= 1
    assert decode.total("starmesh_transfer_bytes_total", starmesh_transfer_backend="stream") > 0
    assert decode.total("starmesh_kv_used_blocks") == 0
    assert decode.total("starmesh_step_duration_seconds_count") > LONG_TOKENS


async def a_request_is_refused(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generate(mesh.inference(), inference_pb2.GenerateRequest(request_id="empty"))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with httpx2.AsyncClient(timeout=30) as http:
        assert (await http.get(f"{url_of(mesh)}/nothing")).status_code == 404


async def an_instance_dies(mesh: Mesh) -> None:
    """kill -9 of the one with most of the sequences in mid-stream: the router recovers them."""
    begun = asyncio.Event()
    running = asyncio.create_task(
        generate_all(
            mesh.inference(),
            requests("killed", LONG_TOKENS),
            on_token=lambda tokens: begun.set() if tokens >= 100 else None,
        )
    )
    await asyncio.wait_for(begun.wait(), WAIT_S)
    ((owner, _),) = Counter((await mesh.owners()).values()).most_common(1)
    mesh.services[owner].kill()
    answers: list[Answer] = await running
    await mesh.services[owner].process.wait()
    assert any(answer.usage is not None and answer.usage.recoveries for answer in answers)


async def an_instance_is_drained(mesh: Mesh) -> None:
    """The only one that is left, which has all: they go to another, that comes now."""
    (last,) = (
        name
        for name, service in mesh.services.items()
        if service.role == "decode" and service.process.returncode is None
    )
    async with endless(mesh, "drained"):
        await mesh.start("decode", "decode-3", *ENGINE, LARGE)
        await mesh.cluster().Drain(cluster_pb2.DrainRequest(instance_id=last), timeout=20)

        async def drained() -> bool:
            states = {instance.instance_id: instance.state for instance in await mesh.instances()}
            return states[last] == cluster_pb2.INSTANCE_STATE_DRAINED

        await until(drained, f"{last} to be drained", WAIT_S)


async def the_ledger_is_away(mesh: Mesh) -> None:
    """Long enough for every service to have asked it once."""
    await mesh.kill_ledger()

    async def all_know() -> bool:
        return all(
            "the ledger does not answer" in service.log.read_text()
            for service in mesh.services.values()
            if service.process.returncode is None
        )

    await until(all_know, "everybody to miss the ledger", WAIT_S)
    await mesh.restart_ledger()


def the_rest_is_shown(pages: Pages) -> None:
    router, decode = pages.seen[Role.ROUTER], pages.seen[Role.DECODE]
    rescheduler, predictor = pages.seen[Role.RESCHEDULER], pages.seen[Role.PREDICTOR]
    assert router.total("starmesh_requests_total", starmesh_outcome="INVALID_ARGUMENT") >= 1
    assert router.total("starmesh_requests_total", starmesh_outcome="cancelled") >= 6
    assert router.total("starmesh_refused_calls_total", error_type="404") >= 1
    assert router.total("starmesh_recoveries_total") >= 1
    moved = decode.total("starmesh_migrations_total", starmesh_migration_outcome="moved")
    assert decode.total("starmesh_migration_gap_seconds_count", starmesh_migration_outcome="moved") == moved
    assert decode.total("starmesh_migrations_total", starmesh_migration_reason="drain") >= 1
    assert decode.total("starmesh_migration_bytes_total") > 0
    assert rescheduler.total("starmesh_rescheduler_leader") >= 1
    assert rescheduler.total("starmesh_rescheduler_planned_migrations_total") >= 1
    assert rescheduler.total("starmesh_rescheduler_ended_migrations_total", starmesh_outcome="moved") >= 1
    assert predictor.total("starmesh_predictor_predictions_total") > 0
    for role in Role:
        assert pages.seen[role].total("starmesh_ledger_errors_total") >= 1, role


async def every_query_is_answered(prometheus: Prometheus) -> None:
    """Dashboards have something to show of all that has happened; alerts are understood."""

    async def scraped() -> bool:
        samples = await prometheus.query("count_over_time(up[1m])")
        return bool(samples) and all(int(sample["value"][1]) >= 3 for sample in samples)

    await until(scraped, "three scrapes of each page", WAIT_S)
    empty: list[str] = []

    async def answered() -> bool:
        """A rate needs two scrapes since its series began, and the ledger's errors came last."""
        found = [expr for expr in dashboard_queries() if not await prometheus.query(expr)]
        empty[:] = [expr for expr in found if not any(part in expr for part in MAY_BE_EMPTY)]
        return not empty

    await until(answered, "an answer to each query of the dashboards", WAIT_S, lambda: str(empty))
    for expr in alert_queries():
        await prometheus.query(expr)


def dashboard_queries() -> list[str]:
    """As Grafana sends them."""
    boards = [json.loads(path.read_text()) for path in (DEPLOY / "grafana" / "dashboards").iterdir()]
    exprs = [target["expr"] for board in boards for panel in board["panels"] for target in panel.get("targets", ())]
    # Over all that has been: some of it happened in the first seconds only.
    return [expr.replace("$__rate_interval", "30m").replace("$instance", ".*") for expr in exprs]


def alert_queries() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]

"""``starmesh up --tls`` with emulated engines: all services and the router's API key as an operator gets them.

Under one running stream the CA and every certificate are replaced, the request moves to an instance that it can only
reach with the new ones, and then every RPC of every service is tried with credentials that are none.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
from cryptography.x509 import load_pem_x509_certificate

from starmesh.cli.emulating import Emulating
from starmesh.cli.local_cluster import ClusterPlan, LocalCluster, start_cluster
from starmesh.cli.router import RouterClient, connect
from starmesh.cli.service_process import ServiceProcess
from starmesh.emulation.requests import emulated_request
from starmesh.rpc.channels import CHANNEL_OPTIONS
from starmesh.rpc.credentials import MESH_NAME, TlsFiles
from starmesh.telemetry.registry import tls
from starmesh.v1 import cluster_pb2, decode_pb2, inference_pb2
from tests.mesh.processes import until
from tests.mesh.streams import generate
from tests.mesh.test_emulated import expected_token_ids
from tests.rpc.every_rpc import HEALTH, REFLECTION, SERVICES, Rpc, attempt, served_by
from tests.rpc.pki import Pki, channel_credentials
from tests.telemetry.pages import Seen, page_url, scrape

PROMPT_TOKENS, LONG_TOKENS, TIMEOUT_S = 40, 20_000, 240.0
OK, REFUSED, NO_CONNECTION = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE
HEALTH_CHECK = next(rpc for rpc in SERVICES[HEALTH] if rpc.method == "Check")


class Running:
    """A stream that goes on until it is cancelled."""

    def __init__(self, router: RouterClient) -> None:
        self.token_ids: list[int] = []
        self._router = router
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        request = emulated_request(PROMPT_TOKENS, LONG_TOKENS, request_id="long")
        async for response in self._router.inference.Generate(request, timeout=TIMEOUT_S):
            self.token_ids += response.token_ids

    async def come(self, tokens: int) -> None:
        """Wait for so many more tokens."""
        wanted = len(self.token_ids) + tokens
        await until(lambda: len(self.token_ids) >= wanted or self._task.done(), f"{wanted} tokens", 60)
        assert not self._task.done(), self._task.exception()

    async def end(self) -> None:
        """Cancel it; every token was the right one."""
        await self._router.inference.Cancel(inference_pb2.CancelRequest(request_id="long"))
        await asyncio.wait_for(self._task, TIMEOUT_S)
        assert self.token_ids == expected_token_ids(PROMPT_TOKENS, LONG_TOKENS)[: len(self.token_ids)]


async def test_a_mesh_of_mutual_tls(tmp_path: Path) -> None:
    emulating = Emulating(engine="emulated", profile="h100-7b")
    plan = ClusterPlan(
        model=None,
        run_directory=tmp_path / "run",
        tls=True,
        rescheduler_flags=("--policy", "none"),
        shared_flags=("--metrics-listen", "127.0.0.1:0", "--ledger-timeout-s", "3"),
    )
    (tmp_path / "pki").mkdir()
    pki = Pki(tmp_path / "pki")
    async with (
        start_cluster(emulating.apply(plan), print) as cluster,
        connect(cluster.address, cluster.login) as router,
    ):
        running = Running(router)
        await running.come(20)
        await all_show_the_end_of_their_certificate(cluster)
        await certificates_are_replaced(cluster, pki)
        await all_show_the_end_of_their_certificate(cluster)
        await running.come(1)
        await the_request_moves(router)
        await running.come(20)
        await running.end()
        answer = await generate(router.inference, emulated_request(30, 50, request_id="short"))
        assert answer.token_ids == expected_token_ids(30, 50)
        await predictions_come(router)
        await strangers_are_refused(cluster, pki)
    for process in cluster.processes:
        log = process.log_path.read_text()
        assert "Traceback" not in log, process.spec.instance_id
        if process.spec.role in ("prefill", "decode"):
            assert "KV is moved over TLS only" in log


async def the_request_moves(router: RouterClient) -> None:
    """To an instance that its source has not spoken to before; again if one of them was too busy to be in time."""
    ends: list[str] = []

    async def moved() -> bool:
        instances = (await router.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=60)).instances
        here = {instance.instance_id for instance in instances for load in instance.load.sequences}
        target = min({"decode-0", "decode-1"} - here)
        asked = cluster_pb2.MigrateSequenceRequest(request_id="long", target_instance_id=target)
        try:
            told = [told.progress async for told in router.cluster.MigrateSequence(asked, timeout=60)]
        except grpc.aio.AioRpcError as error:
            ends.append(f"{error.code().name}: {error.details()}")
            return False
        ends.append(f"{decode_pb2.MigrationStage.Name(told[-1].stage)} {told[-1].cause} {told[-1].refusal}")
        return told[-1].stage == decode_pb2.MIGRATION_STAGE_MOVED

    await until(moved, "a move", 120, lambda: str(ends))
    print(ends)


async def predictions_come(router: RouterClient) -> None:
    """Also over what the predictor's clients have connected anew."""
    asked = cluster_pb2.GetClusterPredictorRequest()
    before = (await router.cluster.GetClusterPredictor(asked, timeout=10)).status.predictions
    await generate(router.inference, emulated_request(30, 100, request_id="predicted"))

    async def more() -> bool:
        answer = await router.cluster.GetClusterPredictor(asked, timeout=10)
        return bool(answer.status.predictions > before)

    await until(more, "predictions")


# --- certificates ----------------------------------------------------------------------------------------------------


async def certificates_are_replaced(cluster: LocalCluster, pki: Pki) -> None:
    """The CA's three steps, each when all services have taken the one before."""
    assert cluster.security is not None
    files = cluster.security.tls
    old = TlsFiles(cert=pki.directory / "old.crt", key=pki.directory / "old.key", ca=pki.directory / "both.crt")
    for path, content in ((old.cert, files.cert), (old.key, files.key)):
        path.write_bytes(content.read_bytes())
    old.ca.write_bytes(files.ca.read_bytes() + pki.ca.read_bytes())
    new = pki.issue("service", names=(MESH_NAME, "127.0.0.1"))

    replace(files.ca, old.ca.read_bytes())
    # Believed with a new certificate by those that show their old ones.
    await all_come_to(cluster, TlsFiles(cert=new.cert, key=new.key, ca=old.ca), OK, inner_only=True)
    replace(files.key, new.key.read_bytes())
    replace(files.cert, new.cert.read_bytes())
    await all_come_to(cluster, new, OK)
    replace(files.ca, new.ca.read_bytes())
    await all_come_to(cluster, TlsFiles(cert=old.cert, key=old.key, ca=new.ca), NO_CONNECTION, inner_only=True)


async def all_show_the_end_of_their_certificate(cluster: LocalCluster) -> None:
    """On their pages, as an alert reads them."""
    assert cluster.security is not None
    files = cluster.security.tls
    until_s = {
        load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp() for path in (files.cert, files.ca)
    }
    for process in cluster.processes:
        url = page_url(process.log_path.read_text())

        async def shown(url: str = url) -> bool:
            """A process looks at its files once a second."""
            seen = Seen()
            seen.add(await asyncio.to_thread(scrape, url))
            ((_, shown_s),) = seen.values[tls.CERTIFICATE_EXPIRES.prometheus_name]
            return shown_s == min(until_s)

        await until(shown, f"the end of its certificate on the page of {process.spec.instance_id}")


def replace(path: Path, content: bytes) -> None:
    """In one step, as whoever issues certificates should."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


async def all_come_to(
    cluster: LocalCluster, files: TlsFiles, wanted: grpc.StatusCode, *, inner_only: bool = False
) -> None:
    """Wait until a new connection with a certificate, trusting its CA, is answered so by every process."""
    for process in cluster.processes:
        if inner_only and process.spec.role == "router":
            continue  # which asks nobody for a certificate

        async def holds(process: ServiceProcess = process) -> bool:
            async with secure(process, channel_credentials(files, files.ca)) as channel:
                return await attempt(channel, HEALTH_CHECK) is wanted

        await until(holds, f"{wanted} of {process.spec.instance_id}", 60, process.log_tail)


def secure(process: ServiceProcess, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", MESH_NAME)]
    return grpc.aio.secure_channel(process.address, credentials, options=options)


# --- strangers -------------------------------------------------------------------------------------------------------


async def strangers_are_refused(cluster: LocalCluster, pki: Pki) -> None:
    """By every RPC of every service that any process serves, and every service of the protos is served by one."""
    (pki.directory / "other").mkdir()
    other, member = Pki(pki.directory / "other"), pki.issue("member")
    named_otherwise = pki.issue("otherwise", names=("other.example",))
    certificates: dict[str, TlsFiles | None] = {
        "none": None,
        "of another CA": other.issue(),
        "expired": pki.expired(),
        "of the former CA": TlsFiles(cert=pki.directory / "old.crt", key=pki.directory / "old.key", ca=pki.ca),
    }
    key = (("authorization", f"Bearer {cluster.login.api_key}"),)
    seen: set[str] = set()
    for process in cluster.processes:
        router = process.spec.role == "router"

        async def codes(channel: grpc.aio.Channel, rpcs: list[Rpc]) -> set[grpc.StatusCode]:
            async with channel:
                return {await attempt(channel, rpc) for rpc in rpcs}

        async with secure(process, channel_credentials(member, pki.ca)) as channel:
            served = await served_by(channel, metadata=key if router else None)
        seen |= served
        rpcs = [rpc for service in sorted(served) for rpc in SERVICES[service]]
        where = process.spec.instance_id
        assert await codes(grpc.aio.insecure_channel(process.address), rpcs) == {NO_CONNECTION}, (where, "plaintext")
        assert await codes(secure(process, channel_credentials(None, other.ca)), rpcs) == {NO_CONNECTION}
        if router:
            closed = [rpc for rpc in rpcs if rpc.service != HEALTH]
            unknown = await codes(secure(process, channel_credentials(None, pki.ca)), closed)
            assert unknown == {grpc.StatusCode.UNAUTHENTICATED}
            continue
        for kind, files in certificates.items():
            found = await codes(secure(process, channel_credentials(files, pki.ca)), rpcs)
            assert found == {NO_CONNECTION}, (where, kind, found)
        found = await codes(secure(process, channel_credentials(named_otherwise, pki.ca)), rpcs)
        assert found == {REFUSED}, (where, "named otherwise", found)
    assert seen == SERVICES.keys() | {HEALTH, REFLECTION}

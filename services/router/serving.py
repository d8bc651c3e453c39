"""A running router: its parts, in the order that they start and stop.

Health is SERVING from the first view of the ledger with a prefill and a decode instance that take work, until the
process is told to stop. It stays SERVING when instances vanish later: requests wait for them, or are told to retry,
and another router would see no more of them than this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from services.router.access import KeyInterceptor
from services.router.activity import Activity
from services.router.cluster_frames import ClusterFrames
from services.router.cluster_servicer import ClusterServicer
from services.router.config import RouterSettings
from services.router.decode_link import DecodeLinks
from services.router.dispatcher import Dispatcher
from services.router.ledger_watch import LedgerWatch
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel
from services.router.owners import Owners
from services.router.parts import Parts
from services.router.predictions import Predictions
from services.router.prefill_calls import PrefillCalls
from services.router.router import Router
from services.router.seen_moves import SeenMoves
from services.router.servicer import InferenceServicer
from starmesh.ledger import Ledger
from starmesh.ledger.membership import Membership
from starmesh.loopback import is_loopback
from starmesh.process import write_port_file
from starmesh.rpc.api_keys import ApiKeys
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.server import RpcServer
from starmesh.telemetry.metrics import NO_METRICS, Metrics
from starmesh.types import InstanceInfo, InstanceLoad, InstanceState, Role
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from services.router.http.server import HttpServer

log = logging.getLogger(__name__)

# Handlers end by themselves once their requests have; this is for messages still on their way.
_SERVER_GRACE_S = 1.0


class RouterProcess:
    """Use as an async context manager: serves inside, drains on the way out."""

    def __init__(
        self, settings: RouterSettings, ledger: Ledger, model: ServedModel, metrics: Metrics = NO_METRICS
    ) -> None:
        self.watch = LedgerWatch(ledger, interval_s=settings.view_interval_s)
        instruments = RouterMetrics(metrics, model=model.name)
        self.dispatcher = Dispatcher(ledger, self.watch, settings, on_placed=instruments.placed)
        instruments.watch(
            queued=lambda: self.dispatcher.queued_requests,
            running_away=lambda: self.router.away.running,
            kept=lambda: self.router.away.kept,
            view=lambda: self.watch.view,
        )
        credentials = settings.load_credentials(metrics)
        self.keys = ApiKeys.load(settings.api_keys) if settings.api_keys is not None else None
        """Whom clients are known by; None: all are let in."""
        self.links = DecodeLinks(self.watch.find, credentials)
        self.address = ""
        self._settings = settings
        self._ledger = ledger
        self._model = model
        self._metrics = instruments
        self._prefills = PrefillCalls(credentials)
        self._predictions = Predictions(
            self.watch.find_predictor,
            credentials,
            instance_id=settings.name_instance(Role.ROUTER.value),
            timeout_s=settings.predictor_timeout_s,
        )
        self._owners = Owners(ledger, ttl_s=settings.owner_ttl_s, available=lambda: self.watch.available)
        self._activity = Activity(time.monotonic)
        moves = SeenMoves(time.monotonic)
        self.router = Router(
            Parts(
                settings=settings,
                model=model,
                watch=self.watch,
                dispatcher=self.dispatcher,
                owners=self._owners,
                links=self.links,
                prefills=self._prefills,
                predictions=self._predictions,
                activity=self._activity,
                moves=moves,
                metrics=instruments,
            )
        )
        self.frames = ClusterFrames(
            ledger,
            self.watch,
            self.router,
            self._activity,
            moves,
            router_id=settings.name_instance(Role.ROUTER.value),
            credentials=credentials,
        )
        """What people see who watch the cluster."""
        self._server = RpcServer(
            listen=settings.listen,
            allow_plaintext=settings.allow_plaintext,
            credentials=credentials,
            members_only=False,
            interceptors=[] if self.keys is None else [KeyInterceptor(self.keys, instruments)],
        )
        inference = InferenceServicer(
            self.router,
            model,
            facts=lambda: model.facts(self.watch.view),
            metrics=instruments,
            max_stream_requests=settings.max_stream_requests,
            keys=self.keys,
        )
        service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
        self._server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference, service)
        service = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
        cluster = ClusterServicer(
            self.router,
            self.watch,
            self._owners,
            self.frames,
            moves,
            credentials=credentials,
            dispatch_policy=settings.dispatch_policy,
        )
        self._server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, cluster, service)
        self._http = self._front_door(credentials) if settings.http_listen else None
        self._membership: Membership | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._readiness: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises OSError when the port is taken and LedgerError when the ledger does not answer."""
        settings = self._settings
        self.address = await self._server.start()
        info = InstanceInfo(
            instance_id=settings.name_instance(Role.ROUTER.value),
            incarnation=secrets.token_hex(8),
            role=Role.ROUTER,
            address=settings.advertise or self.address,
        )
        self._membership = Membership(
            self._ledger, info, load=_no_load, ttl_s=settings.lease_ttl_s, interval_s=settings.report_interval_s
        )
        try:
            if self._http is not None:
                await self._http.start()
            await self._membership.start()
        except BaseException:
            await self._stop_servers(0)
            raise
        self._tasks = [
            asyncio.create_task(self.watch.run(self._on_view), name="ledger views"),
            asyncio.create_task(self._owners.keep(), name="ownership"),
        ]
        if self.keys is not None:
            self._tasks.append(asyncio.create_task(self.keys.follow(), name="API keys"))
        elif not is_loopback(self.address):
            log.warning("whoever reaches %s may use and steer this cluster: give --api-keys", self.address)
        self._readiness = asyncio.create_task(self._serve_when_ready(), name="health")
        write_port_file(settings.port_file, self.address)
        log.info("listening on %s", self.address)
        if self._http is not None:
            log.info("HTTP on %s", self.http_url)
        return self

    @property
    def http_url(self) -> str:
        """Where HTTP is served, without a path; empty where it is not."""
        if self._http is None:
            return ""
        return f"{'https' if self._settings.tls_cert else 'http'}://{self._http.address}"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # New requests are refused with a status that says to retry, not with a closed port, while old ones end.
        if self._readiness is not None:
            self._readiness.cancel()
        await self._server.set_serving(False)
        self.router.stopping.set()
        if self._membership is not None:
            await self._membership.set_state(InstanceState.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.grace_s):
                await self.router.idle.wait()
        await self.router.stop()
        await self._stop_servers(_SERVER_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.frames.close()
        await self.links.close()
        await self._prefills.close()
        await self._predictions.close()
        if self._membership is not None:
            await self._membership.stop()
        log.info("stopped")

    def _front_door(self, credentials: Credentials | None) -> HttpServer:
        # Only where it is asked for: FastAPI takes half a second to import.
        from services.router.http.front_door import front_door
        from services.router.http.parts import HttpParts

        parts = HttpParts(
            settings=self._settings,
            router=self.router,
            model=self._model,
            watch=self.watch,
            frames=self.frames,
            metrics=self._metrics,
            keys=self.keys,
        )
        return front_door(parts, credentials)

    async def _stop_servers(self, grace_s: float) -> None:
        if self._http is not None:
            await self._http.stop(grace_s)
        await self._server.stop(grace_s)

    async def _serve_when_ready(self) -> None:
        await self.watch.ready.wait()
        await self._server.set_serving(True)
        log.info("serving on %s", self.address)

    async def _on_view(self, missing: set[str]) -> None:
        """Give up what hangs on instances whose lease has ended, and let those try that wait for room."""
        self.links.prune(missing, silent_s=self._settings.lease_ttl_s)
        self._prefills.lose(missing)
        instances = [view.info for view in self.watch.view.instances]
        await self._prefills.retain(instances)
        await self._predictions.retain(instances)
        self.dispatcher.wake()
        self._activity.sample()


async def _no_load() -> InstanceLoad:
    """A router holds no KV."""
    return InstanceLoad(total_blocks=0, free_blocks=0)

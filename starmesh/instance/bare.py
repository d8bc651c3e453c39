"""A process without an engine that takes part in the cluster: health, reflection and a place in the ledger."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starmesh.ledger import Ledger
from starmesh.ledger.membership import Membership
from starmesh.process import ServiceSettings, write_port_file
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.server import RpcServer
from starmesh.telemetry.ledger_metrics import LedgerMetrics
from starmesh.telemetry.metrics import NO_METRICS, Metrics
from starmesh.types import InstanceInfo, InstanceLoad, Role

log = logging.getLogger(__name__)

_NO_BLOCKS = InstanceLoad(total_blocks=0, free_blocks=0)


@dataclass(frozen=True, slots=True)
class BareInstance:
    """A process that is registered and serves health."""

    info: InstanceInfo
    ledger: Ledger
    credentials: Credentials | None = None
    """What its channels to other services are opened with."""


def _health_only(server: RpcServer) -> None:
    """Add no service."""


@asynccontextmanager
async def open_bare(
    settings: ServiceSettings,
    role: Role,
    *,
    add_services: Callable[[RpcServer], None] = _health_only,
    metrics: Metrics = NO_METRICS,
) -> AsyncIterator[BareInstance]:
    """Serve and be registered within the context; ``add_services`` adds to the server what it serves beside health.
    Raises OSError when the port is taken and LedgerError when the ledger does not answer."""

    async def load() -> InstanceLoad:
        return _NO_BLOCKS

    credentials = settings.load_credentials(metrics)
    server = RpcServer(listen=settings.listen, allow_plaintext=settings.allow_plaintext, credentials=credentials)
    add_services(server)
    ledger = settings.open_ledger()
    ledger.on_operation = LedgerMetrics(metrics.meter)
    address = await server.start()
    info = InstanceInfo(
        instance_id=settings.instance_id,
        incarnation=secrets.token_hex(8),
        role=role,
        address=settings.advertise or address,
    )
    membership = Membership(ledger, info, load=load, ttl_s=settings.lease_ttl_s, interval_s=settings.report_interval_s)
    try:
        await membership.start()
        await server.set_serving(True)
        write_port_file(settings.port_file, address)
        log.info("serving on %s", address)
        yield BareInstance(info, ledger, credentials)
    finally:
        await server.stop(0.0)
        await membership.stop()
        await ledger.close()


async def serve_bare(settings: ServiceSettings, role: Role, stop: asyncio.Event) -> None:
    """Do nothing more until ``stop``. Raises as ``open_bare``."""
    async with open_bare(settings, role):
        await stop.wait()

"""What every service process has: settings from flags and environment, an event loop, signals, a clean end.

Owns no service's work: that is ``services.*``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import uvloop
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from starmesh.ledger.limits import check_cluster, check_ids
from starmesh.ledger.redis import RedisLedger, is_encrypted
from starmesh.rpc.credentials import MESH_NAME, Credentials
from starmesh.telemetry import instruments
from starmesh.telemetry.metrics import NO_METRICS, Metrics, check_listen, open_metrics
from starmesh.telemetry.registry import tls
from starmesh.telemetry.setup import TelemetryConfigError, setup_logging, setup_tracing

log = logging.getLogger(__name__)


class ServiceSettings(BaseSettings):
    """Settings of every service. A flag beats ``STARMESH_<NAME>`` in the environment, which beats the default."""

    model_config = SettingsConfigDict(
        env_prefix="STARMESH_",
        cli_parse_args=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="ignore",
    )

    listen: str = Field("127.0.0.1:0", description="HOST:PORT to serve on; port 0 takes any free one")
    advertise: str = Field(
        "", validate_default=True, description="HOST:PORT that others reach this process at; empty: as it listens"
    )
    allow_plaintext: bool = Field(False, description="serve, and reach the ledger, unencrypted beyond loopback")
    tls_cert: Path | None = Field(
        None, description="PEM file of this process's certificate; with --tls-key and --tls-ca all services speak TLS"
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key")
    tls_ca: Path | None = Field(
        None, validate_default=True, description="PEM file of the CAs that sign the certificates of services"
    )
    tls_server_name: str = Field(MESH_NAME, min_length=1, description="DNS name that all those certificates are for")
    ledger: str = Field("redis://127.0.0.1:6379", description="URL of the Redis ledger; unix:// and rediss:// too")
    ledger_password_file: Path | None = Field(
        None, description="file with the password of the ledger's user, instead of one in the URL"
    )
    ledger_timeout_s: float = Field(1.0, gt=0, le=30, description="seconds that an operation of the ledger may take")
    ledger_ca: Path | None = Field(
        None, description="PEM file of the CAs that sign the certificate of a rediss:// ledger; empty: the system's"
    )
    cluster: str = Field("default", description="name of the cluster; several may share a Redis")
    instance_id: str = Field("", description="name of this instance; empty: role and a random suffix")
    port_file: Path | None = Field(None, description="file to write the chosen HOST:PORT to")
    lease_ttl_s: float = Field(6.0, gt=0.2, description="seconds without a report until others take it for dead")
    report_interval_s: float = Field(0.25, gt=0.01, description="seconds between load reports")
    grace_s: float = Field(10.0, ge=0, description="seconds that work in flight has to end after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged, and up")
    metrics_listen: str = Field("", description="HOST:PORT of a page with metrics for Prometheus; empty: none")

    @field_validator("instance_id", "cluster")
    @classmethod
    def _known_to_the_ledger(cls, value: str, info: ValidationInfo) -> str:
        """Demanded here and not at the first registration: loading a model comes before that."""
        if info.field_name == "cluster":
            check_cluster(value)
        elif value:
            check_ids(value)
        return value

    @field_validator("tls_cert", "tls_key", "tls_ca", "ledger_password_file", "ledger_ca", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        """As the environment of a container has it for what is not set."""
        return value or None

    @field_validator("tls_ca")
    @classmethod
    def _all_of_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        given = [path is not None for path in (info.data.get("tls_cert"), info.data.get("tls_key"), value)]
        if any(given) and not all(given):
            raise ValueError("give --tls-cert, --tls-key and --tls-ca, or none of them")
        return value

    @field_validator("ledger")
    @classmethod
    def _ledger_encrypted(cls, value: str, info: ValidationInfo) -> str:
        if not info.data.get("allow_plaintext") and not is_encrypted(value):
            raise ValueError(
                "is beyond loopback and not encrypted; use rediss://, or pass --allow-plaintext (or set "
                "STARMESH_ALLOW_PLAINTEXT=true) on a network that you trust"
            )
        return value

    @field_validator("advertise")
    @classmethod
    def _reachable(cls, value: str, info: ValidationInfo) -> str:
        listen = str(info.data.get("listen", ""))
        if not value and listen.startswith(("0.0.0.0:", "[::]:")):
            raise ValueError(f"needed with --listen {listen}: HOST:PORT that others reach this process at")
        return value

    def load_credentials(self, metrics: Metrics = NO_METRICS) -> Credentials | None:
        """What it proves with who it is, and knows other services by; None for plaintext. ``metrics`` shows until when.
        Raises TlsError."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        loaded = Credentials.load(self.tls_cert, self.tls_key, self.tls_ca, server_name=self.tls_server_name)
        instruments.gauge(metrics.meter, tls.CERTIFICATE_EXPIRES, lambda: [(loaded.expires_s, {})])
        return loaded

    def open_ledger(self) -> RedisLedger:
        """The ledger, not connected yet. Raises LedgerError for what cannot be understood or read."""
        return RedisLedger.connect(
            self.ledger,
            cluster=self.cluster,
            password_file=self.ledger_password_file,
            ca=self.ledger_ca,
            timeout_s=self.ledger_timeout_s,
        )

    @field_validator("metrics_listen")
    @classmethod
    def _metrics_closed_to_the_network(cls, value: str, info: ValidationInfo) -> str:
        if value:
            check_listen(value, allow_plaintext=bool(info.data.get("allow_plaintext")))
        return value

    @asynccontextmanager
    async def open_metrics(self, role: str) -> AsyncIterator[Metrics]:
        """The page with metrics within the context, or instruments that do nothing. Raises OSError when its port is
        taken."""
        metrics = open_metrics(
            role,
            self.name_instance(role),
            listen=self.metrics_listen,
            allow_plaintext=self.allow_plaintext,
        )
        if metrics.address:
            log.info("metrics at http://%s/metrics", metrics.address)
        try:
            yield metrics
        finally:
            await asyncio.to_thread(metrics.close)

    def name_instance(self, role: str) -> str:
        """The instance id: as set, or ``role`` with a random suffix."""
        if not self.instance_id:
            self.instance_id = f"{role}-{secrets.token_hex(3)}"
        return self.instance_id


def write_port_file(path: Path | None, address: str) -> None:
    """Write ``address`` in one step, so that a reader never sees half of it."""
    if path is not None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(address)
        temporary.rename(path)


Settings = TypeVar("Settings", bound=ServiceSettings)


def run_service(
    role: str, settings_type: type[Settings], serve: Callable[[Settings, asyncio.Event], Awaitable[None]]
) -> None:
    """Run ``serve(settings, stop)`` until it returns; ``stop`` is set by SIGTERM or SIGINT, and a second signal ends
    the process at once. Exits with 2 on bad settings and 1 with one readable line on a failure."""
    try:
        settings = settings_type()
    except ValidationError as error:
        for problem in error.errors():
            name = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            said = problem["msg"].removeprefix("Value error, ")  # pydantic's word for what our validators say
            print(f"starmesh {role}: --{name}: {said}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    instance_id = settings.name_instance(role)
    setup_logging(instance_id, settings.log_level)
    try:
        end_tracing = setup_tracing(role, instance_id)
    except TelemetryConfigError as error:
        print(f"starmesh {role}: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(name: str) -> None:
            if stop.is_set():
                log.warning("second %s: ending now", name)
                os._exit(1)
            log.info("%s: stopping", name)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number.name)
        await serve(settings, stop)

    try:
        uvloop.run(main())
    except Exception as error:
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG) or not str(error))
        raise SystemExit(1) from None
    finally:
        end_tracing()

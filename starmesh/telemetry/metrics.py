"""Metrics of a process, as a page that Prometheus scrapes.

Owns the meter provider and the page. Owns neither instruments (each service's ``metrics``) nor what they are called
(``registry``). Without an address there is no page, and every instrument is a no-op. The page is served by threads of
its own: instruments that are read when it is asked for (gauges) are read there.

All series carry ``service_instance_id``, so that they can be told apart by the names that operators give, whatever
address a container has today.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import Meter, NoOpMeterProvider
from opentelemetry.sdk.resources import Resource

from starmesh.loopback import is_loopback_host
from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.registry.metric import Metric

_SCOPE: Final = "starmesh"
_INSTANCE: Final = "service.instance.id"


def _show_nowhere(row: Metric, counts: BucketCounts) -> None:
    """There is no page."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """``meter`` makes the process's instruments, and ``show`` adds a histogram that its owner counts, which
    OpenTelemetry has no instrument for. ``address`` is the page's HOST:PORT, empty without one. ``close`` ends the
    page; call it in a thread, it waits for a scrape in progress."""

    meter: Meter
    address: str
    close: Callable[[], None]
    show: Callable[[Metric, BucketCounts], None] = _show_nowhere


NO_METRICS: Final = Metrics(NoOpMeterProvider().get_meter(_SCOPE), "", lambda: None)
"""Without a page: instruments that do nothing."""


def check_listen(listen: str, *, allow_plaintext: bool) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ValueError for anything else, and for a host that is not loopback unless
    ``allow_plaintext``."""
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 0xFFFF:
        raise ValueError(f"{listen!r} is not HOST:PORT")
    if not allow_plaintext and not is_loopback_host(host):
        raise ValueError(
            f"{listen} is not a loopback address and the page is not encrypted; "
            "use 127.0.0.1, or --allow-plaintext on a network that you trust (HTTP of a router with TLS is encrypted)"
        )
    return host.strip("[]"), int(port)


def open_metrics(service: str, instance_id: str, *, listen: str, allow_plaintext: bool = False) -> Metrics:
    """Serve the page at ``listen``, HOST:PORT, port 0 for any; empty: no page. Raises ValueError as ``check_listen``,
    and OSError when the port is taken."""
    if not listen:
        return NO_METRICS
    host, port = check_listen(listen, allow_plaintext=allow_plaintext)
    # Only where there is a page: importing these takes a tenth of a second.
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import CollectorRegistry, start_http_server

    from starmesh.telemetry.bucket_collector import BucketCollector

    registry = CollectorRegistry()
    reader = PrometheusMetricReader(
        scope_info_enabled=False, registry=registry, resource_attribute_filter=lambda key: key == _INSTANCE
    )
    collector = BucketCollector(labels={_INSTANCE.replace(".", "_"): instance_id})
    registry.register(collector)
    resource = Resource.create({"service.name": f"starmesh-{service}", _INSTANCE: instance_id})
    provider = MeterProvider([reader], resource)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        provider.shutdown()
        raise OSError(f"cannot listen on {listen} for metrics: {error.strerror or error}") from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()
        provider.shutdown()

    return Metrics(provider.get_meter(_SCOPE), f"{host}:{server.server_port}", close, collector.add)

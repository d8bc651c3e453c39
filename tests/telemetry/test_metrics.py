"""The page with metrics: what it shows, where it may be, and that it is gone afterwards."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from opentelemetry.metrics import Observation

from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.metrics import check_listen, open_metrics
from starmesh.telemetry.registry import router


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
        return str(page.read().decode())


def test_the_page_shows_what_was_counted() -> None:
    metrics = open_metrics("router", "r0", listen="127.0.0.1:0")
    metrics.meter.create_counter("starmesh.things", "{thing}", "Things.").add(3, {"starmesh.kind": "good"})
    metrics.meter.create_observable_gauge("starmesh.level", [lambda options: [Observation(7)]])
    page = scrape(metrics.address)
    assert 'starmesh_things_total{service_instance_id="r0",starmesh_kind="good"} 3.0' in page
    assert 'starmesh_level{service_instance_id="r0"} 7.0' in page
    assert 'service_instance_id="r0",service_name="starmesh-router"' in page
    gaps = BucketCounts(router.INTER_TOKEN_LATENCY.buckets)
    metrics.show(router.INTER_TOKEN_LATENCY, gaps)
    gaps.add(0.02)
    gaps.add(0.5)
    page, mine = scrape(metrics.address), 'service_instance_id="r0"'
    assert f'starmesh_inter_token_latency_seconds_bucket{{le="0.02",{mine}}} 1.0' in page
    assert f'starmesh_inter_token_latency_seconds_bucket{{le="+Inf",{mine}}} 2.0' in page
    assert f"starmesh_inter_token_latency_seconds_sum{{{mine}}} 0.52" in page
    # A second one in the process has instruments of its own.
    other = open_metrics("router", "r1", listen="127.0.0.1:0")
    assert "starmesh_things" not in scrape(other.address)
    other.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics.address)


def test_without_an_address_there_is_none() -> None:
    metrics = open_metrics("router", "r0", listen="")
    metrics.meter.create_counter("starmesh.things").add(1)
    assert metrics.address == ""
    metrics.close()


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen on 127"):
        open_metrics("router", "r0", listen=f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("listen", ["9464", ":9464", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"])
def test_an_address_is_host_and_port(listen: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        check_listen(listen, allow_plaintext=False)


@pytest.mark.parametrize("listen", ["0.0.0.0:9464", "10.1.2.3:9464", "metrics.example:9464", "[::]:9464"])
def test_the_network_must_be_asked_for(listen: str) -> None:
    with pytest.raises(ValueError, match="--allow-plaintext"):
        check_listen(listen, allow_plaintext=False)
    assert check_listen(listen, allow_plaintext=True)[1] == 9464


@pytest.mark.parametrize(
    ("listen", "host"), [("127.0.0.1:1", "127.0.0.1"), ("localhost:1", "localhost"), ("[::1]:1", "::1")]
)
def test_loopback_is_free(listen: str, host: str) -> None:
    assert check_listen(listen, allow_plaintext=False) == (host, 1)

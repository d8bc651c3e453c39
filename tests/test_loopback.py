"""What counts as reachable from this machine only."""

from __future__ import annotations

import pytest

from starmesh.loopback import is_loopback, is_loopback_host

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_this_machine_only(host: str) -> None:
    assert is_loopback_host(host)
    assert is_loopback(f"{host}:50050")


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "[::]", "10.0.0.1", "router", "localhost.example.org", "127.0.0.1.evil"]
)
def test_from_elsewhere_too(host: str) -> None:
    assert not is_loopback_host(host)
    assert not is_loopback(f"{host}:50050")

"""Where ``starmesh up`` serves HTTP."""

from __future__ import annotations

import socket

import pytest
import typer

from starmesh.cli import http_option
from starmesh.cli.http_option import http_address, http_lines


def test_the_default_gives_way_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(http_option, "DEFAULT_HTTP", f"127.0.0.1:{port}")
        host, _, free = http_address(None, encrypted=False).rpartition(":")
        assert host == "127.0.0.1"
        assert int(free) not in (0, port)
        with pytest.raises(typer.BadParameter, match="in use"):
            http_address(f"127.0.0.1:{port}", encrypted=False)
    assert http_address(f"127.0.0.1:{port}", encrypted=False) == f"127.0.0.1:{port}"


def test_none_is_none() -> None:
    assert http_address("none", encrypted=False) == ""


@pytest.mark.parametrize("wanted", ["8000", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(wanted: str) -> None:
    with pytest.raises(typer.BadParameter, match="HOST:PORT"):
        http_address(wanted, encrypted=False)


def test_a_network_is_for_tls_only() -> None:
    with pytest.raises(typer.BadParameter, match="not encrypted"):
        http_address("0.0.0.0:0", encrypted=False)
    assert http_address("0.0.0.0:0", encrypted=True).startswith("0.0.0.0:")


def test_people_get_a_line_to_try() -> None:
    _, curl = http_lines("127.0.0.1:8000", None)
    assert curl.startswith("  curl http://127.0.0.1:8000/v1/chat/completions ")

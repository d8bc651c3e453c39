"""Where a local cluster serves HTTP, and what people are told of it: ``--http`` of ``starmesh up``.

Imports nothing that takes time: ``--help`` reads this.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from starmesh.cli.local_security import LocalSecurity

DEFAULT_HTTP: Final = "127.0.0.1:8000"
NO_HTTP: Final = "none"

Http = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT|none",
        help=f"Serve OpenAI's HTTP API and the live page there. (default: {DEFAULT_HTTP}, or a free port if that is "
        "taken)",
    ),
]


def http_address(wanted: str | None, *, encrypted: bool) -> str:
    """HOST:PORT with a port that is free now, since a router that is started again must find its own; empty for none.
    Raises typer.BadParameter for an address that is none, is taken, or is open to a network unencrypted."""
    if wanted == NO_HTTP:
        return ""
    if wanted is not None:
        return _checked(wanted, encrypted=encrypted)
    host = DEFAULT_HTTP.rpartition(":")[0]
    for address in (DEFAULT_HTTP, f"{host}:0"):
        try:
            return _bound(address)
        except OSError:
            continue  # somebody serves there
    return ""


def http_lines(address: str, security: LocalSecurity | None) -> list[str]:
    """What to do with it."""
    if security is None:
        url, options = f"http://{address}", ""
    else:
        url = f"https://{address}"
        options = f'--cacert {security.tls.ca} -H "authorization: Bearer $(cat {security.api_key_file})" '
    body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    return [
        f"HTTP as OpenAI's at {url}/v1, and what the cluster does at {url}/ in a browser:",
        f"  curl {options}{url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
    ]


def _checked(wanted: str, *, encrypted: bool) -> str:
    from starmesh.telemetry.metrics import check_listen

    try:
        check_listen(wanted, allow_plaintext=encrypted)
        return _bound(wanted)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise typer.BadParameter(f"cannot serve HTTP at {wanted}: {reason}", param_hint="--http") from None


def _bound(address: str) -> str:
    """The address with the port that the system gave. Raises OSError when it is taken."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host.strip("[]"), int(port)))
        return f"{host}:{probe.getsockname()[1]}"

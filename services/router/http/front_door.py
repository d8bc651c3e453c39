"""Puts the app on its server, as the settings say."""

from __future__ import annotations

from services.router.http.app import create_app
from services.router.http.connection import BoundedConnection
from services.router.http.parts import HttpParts
from services.router.http.server import HttpServer
from starmesh.loopback import is_loopback
from starmesh.rpc.credentials import Credentials
from starmesh.telemetry.metrics import check_listen


def front_door(parts: HttpParts, credentials: Credentials | None) -> HttpServer:
    """The server of ``settings.http_listen``, not started yet; TLS with ``credentials``. Raises ValueError for an
    address that is none."""
    listen = parts.settings.http_listen
    host, port = check_listen(listen, allow_plaintext=credentials is not None or parts.settings.allow_plaintext)

    class Connection(BoundedConnection):
        refused = staticmethod(parts.metrics.refused_call)

    return HttpServer(
        create_app(parts, loopback=is_loopback(listen)),
        host=host,
        port=port,
        tls=None if credentials is None else credentials.for_https(),
        connection=Connection,
    )

"""Only loopback names for a server on loopback: a guard against web pages that rebind a name of theirs to 127.0.0.1.

Such a page is of the same origin as the server, for the browser, and could read all that is answered here. Where there
are API keys it has none, and beyond loopback the operator says who may call: there is no guard then.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.router.http.errors import invalid, respond
from starmesh.loopback import is_loopback_host


class LoopbackNames:
    """Middleware that refuses requests for any other host."""

    def __init__(self, app: ASGIApp, *, refused: Callable[[str], None]) -> None:
        """``refused`` counts, by status."""
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback_host(_without_port(Headers(scope=scope).get("host", ""))):
            refused = invalid(
                None,
                "this server listens on loopback without API keys and answers only to localhost, 127.0.0.1 and [::1]; "
                "a proxy in front of it must send one of these as Host, or set up --api-keys",
                "host_not_allowed",
                status=403,
            )
            self._refused(str(refused.status))
            await respond(refused)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    """The name or address in a Host header."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]

"""One HTTP connection, within bounds that uvicorn does not set: how many there are, and how long a request may take to
say what it wants.

Owns also that what is no HTTP is answered in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.router.http.errors import ErrorBody, ErrorDetail

MAX_CONNECTIONS: Final = 16_384
"""Twice the requests that a router has by default: others may wait for their client's next one."""
MAX_HEAD_BYTES: Final = 32 * 1024
"""Of a request's line and headers."""
HEAD_S: Final = 20.0
"""Seconds that they may take to arrive; also from the moment of connecting."""
KEEP_ALIVE_S: Final = 30
"""Seconds that a connection stays open for the client's next request."""
_HEAD_END: Final = re.compile(rb"\n\r?\n")


class BoundedConnection(H11Protocol):
    """HTTP/1.1 on one socket."""

    max_connections = MAX_CONNECTIONS
    head_s = HEAD_S
    refused: Callable[[str], None] | None = None
    """Counts, by status, what is refused here: an attribute of a class made for one server, as uvicorn makes the
    connections."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            message = "this router has all the connections that it can; try again later"
            self._refuse(503, b"Service Unavailable", message, "unavailable", (b"retry-after", b"1"))
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        # h11 bounds a head that comes in pieces; this is for one that comes at once.
        at_once = self.conn.their_state is h11.IDLE and len(data) > MAX_HEAD_BYTES
        if at_once and _HEAD_END.search(data, 0, MAX_HEAD_BYTES) is None:
            self.send_400_response("")
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long headers."""
        self._refuse(400, b"Bad Request", "this is not a valid HTTP request, or its headers are too long", "bad_http")

    def _watch_head(self) -> None:
        """Run the timer while a request's head is awaited, from its first byte on, and not from byte to byte."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, reason: bytes, message: str, code: str, *more_headers: tuple[bytes, bytes]) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # Within an answer, or after one: there is no place for another.
            self.transport.abort()
            return
        if self.refused is not None:
            self.refused(str(status))
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = ErrorBody(error=ErrorDetail(message=message, type=kind, code=code)).model_dump_json().encode()
        headers = [
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *more_headers,
        ]
        response = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

"""The HTTP server within the router's event loop: uvicorn, bound to a socket of ours, and deaf to signals.

Owns listening and stopping. What a socket may do to us is bounded here and in ``connection``; the routes are the app's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from services.router.http.connection import KEEP_ALIVE_S, MAX_HEAD_BYTES, BoundedConnection

UNREAD_S: Final = 60
"""Seconds that the system keeps a connection on which nothing of what is to be sent moves: a client that does not read,
or is gone without a word."""
_BACKLOG: Final = 2048
# As soon as a client that is gone without a word while nothing is to be sent is missed: UNREAD_S again.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class HttpServer:
    """One listening server. ``start`` once, ``stop`` in the end."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        unread_s: float = UNREAD_S,
        connection: type[BoundedConnection] = BoundedConnection,
    ) -> None:
        """``port`` 0 takes any free one. Without ``tls`` it is plain HTTP; the caller says whether it may be."""
        self.address = ""
        """HOST:PORT, from ``start`` on."""
        self._host = host
        self._port = port
        self._unread_s = unread_s
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=0,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        # Its lines repeat ours, or say that a client has sent nonsense or been cut off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def start(self) -> str:
        """Bind and serve. Returns the address, HOST:PORT. Raises OSError when the port is taken."""
        listening = self._bind()
        host, port = listening.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]), name="HTTP server")
        await self._server.serving.wait()
        return self.address

    async def stop(self, grace_s: float) -> None:
        """Close the port, give answers in flight ``grace_s`` to be sent, then cut them."""
        if self._task is None:
            return
        self._server.should_exit = True
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment] # it may be a fraction
        await self._task
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._task = None

    def _bind(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except socket.gaierror as error:
            raise OSError(f"cannot listen on {self._host}: {error.strerror}") from None
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit these.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            options = {**_KEEPALIVE, "TCP_USER_TIMEOUT": int(self._unread_s * 1000)}
            for name, value in options.items():
                if hasattr(socket, name):  # Linux has all of them
                    listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise OSError(f"cannot listen on {self._host}:{self._port}: {error.strerror}") from None
        listening.setblocking(False)
        return listening


class _Server(uvicorn.Server):
    """uvicorn's, started by us: signals are the process's, and somebody waits for the start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

"""The client for asyncio programs: options in, streams out.

Owns the connections' life and what happens in the background: telling routers of requests that nobody wants any more.
Owns no stream (``stream``).
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack, cast

import grpc
import grpc.aio

from starmesh.client.errors import ClientError
from starmesh.client.options import Message, Options, Prompt, new_request
from starmesh.client.retrying import RetryPolicy
from starmesh.client.routers import RouterLink, Routers
from starmesh.client.stream import CANCEL_TIMEOUT_S, AnswerStream
from starmesh.rpc.credentials import TlsError
from starmesh.v1 import inference_pb2

DEFAULT_TIMEOUT_S: Final = 600.0
DEFAULT_RESUME_WINDOW_S: Final = 30.0
_DEFAULT_POLICY: Final = RetryPolicy()


class Client:
    """Asks one or more routers of a mesh. Use it as an async context manager, or ``close`` it; from one event loop."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        api_key: str = "",
        tls_ca: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        resume_window_s: float = DEFAULT_RESUME_WINDOW_S,
        retries: RetryPolicy = _DEFAULT_POLICY,
    ) -> None:
        """``addresses`` are routers' HOST:PORT, with commas between them or as a sequence. ``tls_ca`` is a PEM file of
        the CAs that sign their certificates; without one connections are plaintext. ``timeout_s`` bounds an answer with
        all retries, unless its request says otherwise. ``resume_window_s``, 0 to 300 s, is how long a router keeps a
        request whose stream broke; with 0 a broken stream is begun anew behind the tokens that are here.

        Raises ValueError without an address. Connections are made at the first request."""
        split = addresses.split(",") if isinstance(addresses, str) else addresses
        self._addresses = [address.strip() for address in split if address.strip()]
        if not self._addresses:
            raise ValueError("name at least one router, as HOST:PORT")
        self._api_key = api_key
        self._tls_ca = Path(tls_ca) if tls_ca is not None else None
        self._timeout_s = timeout_s
        self._resume_window_s = resume_window_s
        self._policy = retries
        self._routers: Routers | None = None
        self._streams: weakref.WeakSet[AnswerStream] = weakref.WeakSet()
        self._cancels: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Client of {', '.join(self._addresses)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AnswerStream:
        """Continue a text, or tokens. The request is sent when the stream is first read. Raises ClientError for a CA
        file that cannot be used, and for a key that would cross a network unencrypted."""
        return self._stream(prompt, None, options)

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AnswerStream:
        """Answer a conversation, oldest message first, through the model's chat template."""
        return self._stream(None, messages, options)

    async def text(self, prompt: Prompt | Sequence[Message], **options: Unpack[Options]) -> str:
        """The whole answer's text: to a conversation if ``prompt`` holds messages. Raises ClientError."""
        if not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], int):
            stream = self.chat(cast("Sequence[Message]", prompt), **options)
        else:
            stream = self.generate(cast("Prompt", prompt), **options)
        async with stream:
            return (await stream.whole()).text

    async def close(self) -> None:
        """Cancel all requests and close the connections. Streams that are being read fail. A request that is made
        afterwards opens them anew."""
        routers, self._routers = self._routers, None
        if routers is None:
            return
        routers.closed = True
        for stream in list(self._streams):
            stream.drop()
        if self._cancels:
            await asyncio.wait(self._cancels)
        await routers.close()

    def _stream(self, prompt: Prompt | None, messages: Sequence[Message] | None, options: Options) -> AnswerStream:
        if self._routers is None:
            try:
                self._routers = Routers(self._addresses, tls_ca=self._tls_ca, api_key=self._api_key)
            except TlsError as error:
                raise ClientError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
        stream = AnswerStream(
            self._routers,
            new_request(prompt, messages, options, resume_window_s=self._resume_window_s),
            timeout_s=options.get("timeout_s", self._timeout_s),
            policy=self._policy,
            forget=self._forget,
        )
        self._streams.add(stream)
        return stream

    def _forget(self, link: RouterLink, request_id: str) -> None:
        """Have a request cancelled, in the background: whoever lets go of a stream does not wait."""
        task = asyncio.create_task(_cancel(link, request_id), name=f"cancel {request_id}")
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)


async def _cancel(link: RouterLink, request_id: str) -> None:
    # A router out of reach ends the request itself when its resume window is over.
    with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
        await link.stub.Cancel(inference_pb2.CancelRequest(request_id=request_id), timeout=CANCEL_TIMEOUT_S)

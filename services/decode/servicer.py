"""DecodeService: one stream for all sequences of a router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc.aio

from services.decode.link import RouterLink
from services.decode.worker import DecodeWorker
from starmesh.rpc import convert
from starmesh.v1 import decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves routers."""

    def __init__(self, worker: DecodeWorker, *, max_timeout_s: float) -> None:
        """A sequence without a timeout of its own gets ``max_timeout_s``."""
        self._worker = worker
        self._max_timeout_s = max_timeout_s

    async def Decode(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[decode_pb2.DecodeRequest],
        context: grpc.aio.ServicerContext[decode_pb2.DecodeRequest, decode_pb2.DecodeResponse],
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        link = RouterLink()
        # A router that goes away while a write waits for it is noticed here first.
        context.add_done_callback(lambda _: self._worker.disconnect(link))  # type: ignore[arg-type] # no protocol
        # The router sees at once that the stream is up, not with its first token.
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read(request_iterator, link))
        taker: asyncio.Task[decode_pb2.DecodeResponse] | None = None
        try:
            while True:
                taker = asyncio.create_task(link.take())
                await asyncio.wait([reader, taker], return_when=asyncio.FIRST_COMPLETED)
                if not taker.done():
                    reader.result()  # raises what the reader met; a half-close ends the stream
                    return
                yield taker.result()
        finally:
            self._worker.disconnect(link)
            for task in (reader, taker):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task

    async def _read(self, requests: AsyncIterator[decode_pb2.DecodeRequest], link: RouterLink) -> None:
        async for request in requests:
            action = request.WhichOneof("action")
            if action == "start":
                start = request.start
                timeout_s = convert.duration_s(start.timeout)
                self._worker.start(
                    link,
                    convert.spec(start.sequence),
                    convert.ticket(start.ticket),
                    timeout_s=min(timeout_s or self._max_timeout_s, self._max_timeout_s),
                    traceparent=start.traceparent,
                )
            elif action == "cancel":
                self._worker.cancel(link, request.cancel.request_id, request.cancel.epoch)

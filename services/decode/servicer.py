"""DecodeService: one stream for all sequences of a router, and the calls that move sequences."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from services.decode.link import RouterLink
from services.decode.migration_servicer import MigrationServicer
from services.decode.worker import DecodeWorker
from starmesh.rpc import convert
from starmesh.v1 import decode_pb2

log = logging.getLogger(__name__)


class DecodeServicer(MigrationServicer):
    """Serves routers, and other instances."""

    def __init__(self, worker: DecodeWorker, *, max_timeout_s: float) -> None:
        """A sequence without a timeout of its own gets ``max_timeout_s``."""
        super().__init__(worker.migrator, worker.instance, max_timeout_s=max_timeout_s)
        self._worker = worker

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
                self._worker.start(
                    link,
                    convert.spec(start.sequence),
                    convert.ticket(start.ticket),
                    timeout_s=self._bounded_s(start.timeout),
                    traceparent=start.traceparent,
                    hidden_state=start.hidden_state,
                    hidden_layout=convert.hidden_layout(start.hidden_layout),
                    estimate=convert.estimate(start.estimate) if start.HasField("estimate") else None,
                )
            elif action == "attach":
                attach = request.attach
                timeout_s = self._bounded_s(attach.timeout)
                self._worker.attach(link, attach.request_id, attach.epoch, attach.offset, timeout_s=timeout_s)
            elif action == "cancel":
                self._worker.cancel(link, request.cancel.request_id, request.cancel.epoch)

    def _bounded_s(self, timeout: Duration) -> float:
        return min(convert.duration_s(timeout) or self._max_timeout_s, self._max_timeout_s)

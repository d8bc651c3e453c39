"""InferenceService: the public API on the wire. Owns nothing of a request's course."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from services.router.access import Caller
from services.router.flight import Flight
from services.router.many import ManyRequests
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel
from services.router.pieces import piece_pb
from services.router.router import Router
from services.router.validation import ModelFacts, check_request_id
from starmesh.rpc.api_keys import ApiKeys
from starmesh.rpc.status import StatusError
from starmesh.telemetry.setup import context_of_call
from starmesh.v1 import inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves clients."""

    def __init__(
        self,
        router: Router,
        model: ServedModel,
        *,
        facts: Callable[[], ModelFacts],
        metrics: RouterMetrics,
        max_stream_requests: int,
        keys: ApiKeys | None = None,
    ) -> None:
        self._keys = keys
        self._router = router
        self._model = model
        self._facts = facts
        self._metrics = metrics
        self._max_stream_requests = max_stream_requests

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        ready = asyncio.Event()
        caller = self._caller(context)
        flight = self._router.open(
            request,
            timeout_s=context.time_remaining(),
            on_ready=lambda _: ready.set(),
            parent=context_of_call(context.invocation_metadata()),
            key_id=caller.key_id,
            admit=caller.admit,
        )
        async with aclosing(self._messages(flight, ready, context)) as messages:
            async for message in messages:
                yield message

    async def Resume(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.ResumeRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        check_request_id(request.request_id)
        ready = asyncio.Event()
        flight = await self._router.resume(
            request.request_id,
            offset=request.offset,
            on_ready=lambda _: ready.set(),
            key_id=self._caller(context).key_id,
        )
        async with aclosing(self._messages(flight, ready, context)) as messages:
            async for message in messages:
                yield message

    async def _messages(
        self, flight: Flight, ready: asyncio.Event, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """What one stream of a client gets of a request, to its end, or until another stream of it follows."""
        router, reader = self._router, flight.reader
        # A client that goes away while a write waits for it is noticed here first.
        context.add_done_callback(lambda _: router.close(flight, reader))  # type: ignore[arg-type] # stub lacks it
        try:
            while True:
                await ready.wait()
                ready.clear()
                flight.check_reader(reader)
                piece = flight.take()
                if piece is not None:
                    yield piece_pb(flight, piece)
                    if piece.finish_reason is not None:
                        return
                if flight.error is not None:
                    # What came during the write was before the error.
                    flight.check_reader(reader)
                    if (last := flight.take()) is not None:
                        yield piece_pb(flight, last)
                    raise flight.error.bare()
        finally:
            router.close(flight, reader)

    async def GenerateMany(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[inference_pb2.GenerateManyRequest], context: Context
    ) -> AsyncIterator[inference_pb2.GenerateManyResponse]:
        requests = ManyRequests(
            self._router,
            self._caller(context),
            max_requests=self._max_stream_requests,
            timeout_s=context.time_remaining(),
            parent=context_of_call(context.invocation_metadata()),
        )
        context.add_done_callback(lambda _: requests.close())  # type: ignore[arg-type] # as above
        async with requests:
            async for response in requests.run(request_iterator):
                yield response

    def _caller(self, context: Context) -> Caller:
        return Caller(self._keys, context.invocation_metadata(), self._metrics)

    async def Cancel(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        check_request_id(request.request_id)
        if not self._router.cancel(request.request_id, key_id=self._caller(context).key_id):
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id} is in flight here")
        return inference_pb2.CancelResponse()

    async def GetModel(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        facts = self._facts()
        return inference_pb2.GetModelResponse(
            model=facts.name,
            revision=self._model.revision,
            context_tokens=facts.context_tokens,
            vocabulary_tokens=facts.vocabulary_tokens,
            has_chat_template=facts.has_chat_template,
            eos_token_ids=sorted(facts.eos_token_ids),
        )

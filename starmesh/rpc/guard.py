"""What interceptors that let calls in or refuse them are made of: a handler that only refuses, and one that holds
something for as long as its call runs. Owns no decision."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import grpc
import grpc.aio

from starmesh.rpc.status import StatusError

Context = grpc.aio.ServicerContext[Any, Any]


def refuse(error: StatusError) -> Any:
    """A handler for calls of any kind that raises ``error`` without reading, let alone parsing, a message."""

    async def refuse_call(requests: Any, context: Context) -> NoReturn:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse_call)


def hold(handler: Any, enter: Callable[[Context], AbstractContextManager[object]]) -> Any:
    """``handler`` within ``enter(context)``, for a stream until its end. What ``enter`` raises ends the call."""

    async def answer_once(request: Any, context: Context) -> Any:
        with enter(context):
            return await (handler.stream_unary if handler.request_streaming else handler.unary_unary)(request, context)

    async def answer_stream(request: Any, context: Context) -> AsyncIterator[Any]:
        with enter(context):
            answered = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(request, context)
            if inspect.isawaitable(answered):
                # Writes to the context instead of yielding, as grpc's own health service does in Watch.
                await answered
                return
            async for response in answered:
                yield response

    if handler.response_streaming:
        kind = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        behaviour: Any = answer_stream
    else:
        kind = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = answer_once
    return kind(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )

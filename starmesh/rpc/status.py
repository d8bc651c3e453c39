"""Errors as gRPC status codes with google.rpc details: raised in a handler, aborted by an interceptor, read by clients.

Owns the mapping both ways. Owns no policy on what is an error.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from starmesh.rpc.malformed import Malformed, tolerant_deserializer
from starmesh.v1 import sequence_pb2

log = logging.getLogger(__name__)

# What ends a handler and is no failure of it: an abort was sent, or the caller had gone before it could be.
_ENDED = (grpc.aio.AbortError, grpc.aio.InternalError)
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DOMAIN = "starmesh"  # of ErrorInfo's reasons
_DETAIL_TYPES: tuple[type[Message], ...] = (
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ErrorInfo,
    error_details_pb2.PreconditionFailure,
)


class StatusError(Exception):
    """A failure with the gRPC status that the caller is to see. ``message`` says what to do, and holds no secrets."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = details

    def bare(self) -> StatusError:
        """The same without a traceback: that of an error that was raised holds all that the frames on its way held, a
        client's prompt too, for as long as the error is kept."""
        return StatusError(self.code, self.message, *self.details)

    def packed_details(self) -> list[AnyMessage]:
        """The details as Any messages."""
        packed = []
        for detail in self.details:
            any_message = AnyMessage()
            any_message.Pack(detail)
            packed.append(any_message)
        return packed

    def to_rpc_status(self) -> Any:
        """The status for ``context.abort_with_status``."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=self.packed_details())
        return rpc_status.to_status(status)

    def to_sequence_status(self) -> sequence_pb2.SequenceStatus:
        """The same on a stream that carries many sequences."""
        return sequence_pb2.SequenceStatus(code=self.code.value[0], message=self.message, details=self.packed_details())

    @property
    def retry_delay_s(self) -> float | None:
        """The delay of RetryInfo, None without one."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToTimedelta().total_seconds())
        return None

    @property
    def fields(self) -> list[str]:
        """The fields that BadRequest names."""
        return [
            violation.field
            for detail in self.details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        ]


def bad_field(
    field: str, description: str, *, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT, reason: str = ""
) -> StatusError:
    """A failure for which one field of the request is to blame; BadRequest names it. ``reason``, in capitals, is for
    programs that tell this failure from others of the field: ErrorInfo has it."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    details: list[Message] = [error_details_pb2.BadRequest(field_violations=[violation])]
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN))
    return StatusError(code, f"{field}: {description}", *details)


def retry_later(code: grpc.StatusCode, message: str, delay_s: float) -> StatusError:
    """A failure that may pass: ``code`` with RetryInfo."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(int(delay_s * 1e9))
    return StatusError(code, message, info)


def _unpack(any_messages: Any) -> list[Message]:
    details: list[Message] = []
    for any_message in any_messages:
        for detail_type in _DETAIL_TYPES:
            if any_message.Is(detail_type.DESCRIPTOR):
                detail = detail_type()
                any_message.Unpack(detail)
                details.append(detail)
    return details


def from_rpc_error(error: grpc.aio.AioRpcError) -> StatusError:
    """What a failed call said, with its details."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        # The trailing metadata is not ours (a proxy, or a server that died while it wrote).
        status = None
    details = _unpack(status.details) if status is not None else []
    return StatusError(error.code(), error.details() or error.code().name, *details)


def from_sequence_status(status: sequence_pb2.SequenceStatus) -> StatusError:
    """What a multiplexed stream said of one sequence."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return StatusError(code, status.message, *_unpack(status.details))


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turns StatusError into its status, a malformed request into INVALID_ARGUMENT naming the field, and anything
    else into INTERNAL with a reference that the log line carries too: no traceback and no data leave the process."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        deserialize = tolerant_deserializer(handler.request_deserializer)
        if handler.request_streaming and handler.response_streaming:
            make, behaviour = (
                grpc.stream_stream_rpc_method_handler,
                _guard_stream(method, handler.stream_stream, True),
            )
        elif handler.response_streaming:
            make, behaviour = (
                grpc.unary_stream_rpc_method_handler,
                _guard_stream(method, handler.unary_stream, False),
            )
        elif handler.request_streaming:
            make, behaviour = (
                grpc.stream_unary_rpc_method_handler,
                _guard_unary(method, handler.stream_unary, True),
            )
        else:
            make, behaviour = (
                grpc.unary_unary_rpc_method_handler,
                _guard_unary(method, handler.unary_unary, False),
            )
        return make(behaviour, request_deserializer=deserialize, response_serializer=handler.response_serializer)


def _as_status(method: str, error: BaseException) -> StatusError:
    if isinstance(error, StatusError):
        return error
    if isinstance(error, Malformed):
        return bad_field(error.field, error.description)
    if isinstance(error, NotImplementedError):
        # As generated servicers say of a method that nobody has written: grpc's health service has one.
        return StatusError(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    reference = secrets.token_hex(4)
    log.error("%s failed (reference %s)", method, reference, exc_info=error)
    return StatusError(grpc.StatusCode.INTERNAL, f"internal error; the server's log has it under {reference}")


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            raise request
        yield request


def _guard_unary(method: str, behaviour: Any, streams_in: bool) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, Malformed):
                raise request
            return await behaviour(_checked(request) if streams_in else request, context)
        except _ENDED:
            raise
        except Exception as error:
            await context.abort_with_status(_as_status(method, error).to_rpc_status())

    return guarded


def _guard_stream(method: str, behaviour: Any, streams_in: bool) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            if isinstance(request, Malformed):
                raise request
            answered = behaviour(_checked(request) if streams_in else request, context)
            if inspect.isawaitable(answered):
                # Writes to the context instead of yielding, as grpc's own health service does in Watch.
                await answered
                return
            async for response in answered:
                yield response
        except _ENDED:
            raise
        except Exception as error:
            await context.abort_with_status(_as_status(method, error).to_rpc_status())

    return guarded

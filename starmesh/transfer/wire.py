"""What the transfer protocol says on the wire about layouts and failures, for both of its ends.

Owns the conversion of ``KvLayout`` and the mapping between gRPC statuses and this package's errors. Knows nothing of
leases or of how bytes move.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from starmesh.transfer import LayoutMismatch, LeaseLost, TransferError
from starmesh.types import KvLayout, TransferBackend
from starmesh.v1 import sequence_pb2

LAYOUT_MISMATCH = "KV_LAYOUT_MISMATCH"
"""The ErrorInfo reason of a layout mismatch; its metadata has ``field``, ``holder`` and ``puller``."""

ERROR_DOMAIN = "starmesh"

BACKEND_TO_PB = {
    TransferBackend.STREAM: sequence_pb2.TRANSFER_BACKEND_STREAM,
    TransferBackend.NIXL: sequence_pb2.TRANSFER_BACKEND_NIXL,
}
BACKEND_FROM_PB = {number: backend for backend, number in BACKEND_TO_PB.items()}


def layout_to_pb(layout: KvLayout) -> sequence_pb2.KvLayout:
    """The layout as a message."""
    return sequence_pb2.KvLayout(**{field.name: getattr(layout, field.name) for field in fields(KvLayout)})


def layout_from_pb(pb: sequence_pb2.KvLayout) -> KvLayout:
    """The layout that a message describes, unchecked: an unknown dtype differs from every layout that exists."""
    return KvLayout(**{field.name: getattr(pb, field.name) for field in fields(KvLayout)})


def check_layouts(ours: KvLayout, theirs: KvLayout) -> None:
    """Raise LayoutMismatch for the first field in which two layouts differ."""
    for field in fields(KvLayout):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here != there:
            raise LayoutMismatch(field.name, here, there)


async def abort(
    context: grpc.aio.ServicerContext[object, object], code: grpc.StatusCode, text: str, *details: message.Message
) -> NoReturn:
    """End a call with a status and google.rpc details."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=text, details=packed)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort returned")


async def abort_layout_mismatch(context: grpc.aio.ServicerContext[object, object], error: LayoutMismatch) -> NoReturn:
    """End a call with FAILED_PRECONDITION, naming the field to people and to programs."""
    await abort(
        context,
        grpc.StatusCode.FAILED_PRECONDITION,
        f"{error}; run both instances with the same model, dtype and block size",
        error_details_pb2.PreconditionFailure(
            violations=[
                error_details_pb2.PreconditionFailure.Violation(
                    type="KV_LAYOUT", subject=error.field, description=str(error)
                )
            ]
        ),
        error_details_pb2.ErrorInfo(
            reason=LAYOUT_MISMATCH,
            domain=ERROR_DOMAIN,
            metadata={"field": error.field, "holder": str(error.ours), "puller": str(error.theirs)},
        ),
    )


def transfer_error(error: grpc.aio.AioRpcError, doing: str) -> TransferError:
    """What a failed call means to a puller that was ``doing`` something."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return LeaseLost(f"{doing}: {error.details()}")
    mismatch = _layout_mismatch(error)
    if mismatch is not None:
        return mismatch
    return TransferError(f"{doing}: {error.code().name}: {error.details()}")


def _layout_mismatch(error: grpc.aio.AioRpcError) -> LayoutMismatch | None:
    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
        return None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the rich status contradicts the plain one
        return None
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.reason == LAYOUT_MISMATCH:
            return LayoutMismatch(info.metadata["field"], info.metadata["puller"], info.metadata["holder"])
    return None

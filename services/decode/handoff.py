"""The handoff: blocks are reserved, the prefill instance's KV is pulled into them and its lease ended."""

from __future__ import annotations

import grpc
from opentelemetry.trace import Span

from starmesh.engine.scheduler import CapacityError, DuplicateRequest
from starmesh.instance.instance import Instance
from starmesh.rpc.status import StatusError, retry_later
from starmesh.telemetry import names
from starmesh.transfer import LayoutMismatch, TransferError
from starmesh.types import KvTicket, SequenceSpec

# Blocks come free when a sequence ends, which on a busy instance is a matter of steps.
RETRY_DELAY_S = 0.25


async def hand_off(instance: Instance, spec: SequenceSpec, ticket: KvTicket, span: Span) -> None:
    """Have ``spec``'s KV here, in blocks reserved under its epoch. Raises StatusError for what its router should know;
    the blocks are the caller's to free, also when this is cancelled."""
    try:
        block_ids = await instance.engine.call(lambda core: core.reserve(spec.request_id, spec.epoch, spec.tokens))
    except DuplicateRequest as error:
        raise StatusError(grpc.StatusCode.ALREADY_EXISTS, str(error)) from None
    except CapacityError as error:
        raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    if block_ids is None:
        raise retry_later(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"no free KV blocks for {spec.tokens} tokens; use another instance",
            RETRY_DELAY_S,
        )
    try:
        result = await instance.pull(ticket, block_ids[: len(ticket.block_ids)])
    except LayoutMismatch as error:
        raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    except TransferError as error:
        raise StatusError(grpc.StatusCode.ABORTED, f"pulling KV from {ticket.instance_id}: {error}") from None
    span.set_attribute(names.TRANSFER_BACKEND, result.backend.value)
    span.set_attribute(names.TRANSFER_BYTES, result.bytes)
    span.set_attribute(names.TRANSFER_BLOCKS, len(ticket.block_ids))

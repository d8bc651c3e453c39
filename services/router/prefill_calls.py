"""Calls to prefill instances.

Owns the channels and the calls in progress, so that those to an instance that vanished can be given up. Owns no
choice of instance.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any

import grpc
import grpc.aio

from services.router.flight import InstanceLost
from starmesh.rpc.channels import ChannelPool
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import from_rpc_error
from starmesh.telemetry.setup import current_traceparent
from starmesh.types import InstanceInfo
from starmesh.v1 import prefill_pb2, prefill_pb2_grpc, sequence_pb2, transfer_pb2, transfer_pb2_grpc

_RELEASE_TIMEOUT_S = 2.0

# What an instance that lives says of a request. Anything else says that it died, is dying, or cannot be reached.
_REFUSALS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


class PrefillCalls:
    """Prefills at any instance."""

    def __init__(self, credentials: Credentials | None) -> None:
        # Not traced: OpenTelemetry's client interceptor waits for the status apart from the call, so that cancelling
        # what waits for the response would leave the prefill running. The trace travels as metadata.
        self._channels = ChannelPool(credentials)
        self._calls: dict[str, set[Any]] = defaultdict(set)
        self._releases: set[asyncio.Task[None]] = set()

    async def prefill(
        self, instance: InstanceInfo, request: prefill_pb2.PrefillRequest, *, timeout_s: float
    ) -> prefill_pb2.PrefillResponse:
        """Run a prefill. Raises StatusError when the instance refuses and InstanceLost when it is gone; cancelling
        cancels it there too."""
        stub = prefill_pb2_grpc.PrefillServiceStub(self._channels.get(instance.address))
        traceparent = current_traceparent()
        metadata = (("traceparent", traceparent),) if traceparent else None
        call = stub.Prefill(request, timeout=timeout_s, metadata=metadata)
        calls = self._calls[instance.instance_id]
        calls.add(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            status = from_rpc_error(error)
            draining = status.code is grpc.StatusCode.UNAVAILABLE and status.retry_delay_s is not None
            if status.code in _REFUSALS or draining:
                raise status from None
            raise InstanceLost(instance.instance_id, f"{status.code.name}: {status.message}") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                if not call.cancel():
                    # It had just ended: the blocks that it leased are for nobody.
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        self.release((await call).ticket)
                raise
            raise InstanceLost(instance.instance_id, "its lease in the ledger ended") from None
        finally:
            calls.discard(call)
            if not calls and self._calls.get(instance.instance_id) is calls:
                del self._calls[instance.instance_id]

    def release(self, ticket: sequence_pb2.KvTicket) -> None:
        """End a lease that nobody will use, in the background; one that cannot be ended now expires."""
        task = asyncio.create_task(self._release(ticket))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, ticket: sequence_pb2.KvTicket) -> None:
        stub = transfer_pb2_grpc.TransferServiceStub(self._channels.get(ticket.address))
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError):
            request = transfer_pb2.ReleaseLeaseRequest(lease_id=ticket.lease_id)
            await stub.ReleaseLease(request, timeout=_RELEASE_TIMEOUT_S)

    def lose(self, missing: set[str]) -> None:
        """Give up the calls to these instances."""
        for instance_id in missing & self._calls.keys():
            for call in self._calls.pop(instance_id):
                call.cancel()

    async def retain(self, instances: list[InstanceInfo]) -> None:
        """Close the channels to all others that have no call in progress."""
        if not self._calls.keys() - {instance.instance_id for instance in instances} and not self._releases:
            await self._channels.retain({instance.address for instance in instances})

    async def close(self) -> None:
        """Wait for what runs in the background, and close all channels."""
        await asyncio.gather(*self._releases)
        await self._channels.close()

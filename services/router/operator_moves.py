"""A move that an operator asks for: who has the request, may it go there, and what its source says of it.

Owns no migration: the source drives it, to its end, whether or not anyone listens here. Owns no look at the ledger
(``ledger_watch``, ``owners``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio

from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import StatusError, bad_field, from_rpc_error, retry_later
from starmesh.types import ClusterView, InstanceInfo, InstanceState, Ownership, Role
from starmesh.v1 import decode_pb2, decode_pb2_grpc

# Far longer than all stages of a migration may take together with a few copy rounds of a large sequence.
_FOLLOW_TIMEOUT_S = 300.0
_RETRY_DELAY_S = 1.0
_SEE = "`starmesh status --sequences` shows what runs where"


@dataclass(frozen=True, slots=True)
class Move:
    """A request, the instance that has it under ``epoch``, and the one that is to have it."""

    request_id: str
    epoch: int
    source: InstanceInfo
    target: InstanceInfo

    def order(self, *, traceparent: str) -> decode_pb2.MigrateRequest:
        """What the source is told. ``traceparent`` is the trace of the command, empty without one."""
        return decode_pb2.MigrateRequest(
            request_id=self.request_id,
            epoch=self.epoch,
            target_instance_id=self.target.instance_id,
            target_address=self.target.address,
            reason=decode_pb2.MIGRATION_REASON_OPERATOR,
            traceparent=traceparent,
        )


def plan_move(view: ClusterView, owner: Ownership | None, request_id: str, target_instance_id: str) -> Move:
    """Find the request and check its way. ``owner`` is the ledger's entry of it, None where there is none or the
    ledger does not answer; then, and where a load tells of a newer epoch, the loads that instances report decide.

    Raises StatusError: NOT_FOUND for a request that runs nowhere and for an unknown instance, INVALID_ARGUMENT for a
    target of another role, FAILED_PRECONDITION for one that has the request or takes no new work.
    """
    infos = {instance.info.instance_id: instance.info for instance in view.instances}
    target = infos.get(target_instance_id)
    field = "target_instance_id"
    if target is None:
        unknown = f"the ledger has no instance {target_instance_id}; {_SEE}"
        raise bad_field(field, unknown, code=grpc.StatusCode.NOT_FOUND)
    if target.role is not Role.DECODE:
        raise bad_field(field, f"{target_instance_id} is a {target.role.value} instance; name a decode instance")
    if target.state is not InstanceState.READY:
        busy = f"{target_instance_id} is {target.state.value}; name an instance that takes new work"
        raise bad_field(field, busy, code=grpc.StatusCode.FAILED_PRECONDITION)
    owners = [] if owner is None else [owner]
    for instance in view.of_role(Role.DECODE):
        sequences = instance.load.sequences if instance.load is not None else ()
        epochs = (sequence.epoch for sequence in sequences if sequence.request_id == request_id)
        owners.extend(Ownership(instance.info.instance_id, epoch) for epoch in epochs)
    known = [owner for owner in owners if owner.instance_id in infos]
    if not known:
        raise bad_field("request_id", f"no instance has request {request_id}; {_SEE}", code=grpc.StatusCode.NOT_FOUND)
    newest = max(known, key=lambda owner: owner.epoch)
    if newest.instance_id == target_instance_id:
        here = f"{target_instance_id} has the request already; name another instance"
        raise bad_field(field, here, code=grpc.StatusCode.FAILED_PRECONDITION)
    return Move(request_id, newest.epoch, infos[newest.instance_id], target)


async def follow_move(
    move: Move, order: decode_pb2.MigrateRequest, credentials: Credentials | None, *, timeout_s: float | None
) -> AsyncIterator[decode_pb2.MigrateResponse]:
    """Give the source its ``order`` and tell what it tells, to the end, for at most ``timeout_s``. Ending this does not
    end the migration. Raises StatusError; its message says what to do next."""
    limit_s = _FOLLOW_TIMEOUT_S if timeout_s is None else min(timeout_s, _FOLLOW_TIMEOUT_S)
    begun = False
    try:
        async with open_channel(move.source.address, credentials) as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            async for progress in stub.Migrate(order, timeout=limit_s):
                begun = True
                yield progress
    except grpc.aio.AioRpcError as error:
        raise _what_to_do(move, from_rpc_error(error), begun=begun) from None


def _what_to_do(move: Move, status: StatusError, *, begun: bool) -> StatusError:
    """The source's status as the operator's."""
    request_id, source_id = move.request_id, move.source.instance_id
    match status.code:
        case grpc.StatusCode.NOT_FOUND:
            message = f"request {request_id} does not run at {source_id}: it waits, has ended or has moved; {_SEE}"
            return bad_field("request_id", message, code=status.code)
        case grpc.StatusCode.RESOURCE_EXHAUSTED | grpc.StatusCode.UNAVAILABLE if status.retry_delay_s is not None:
            # With a delay it is the instance's own word, not that of a connection that broke.
            message = f"{source_id} does not move {request_id} now: {status.message}; try again"
            return retry_later(status.code, message, status.retry_delay_s)
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.RESOURCE_EXHAUSTED:
            return StatusError(status.code, f"{source_id} does not move {request_id} now: {status.message}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return StatusError(status.code, f"the move of {request_id} has not ended yet and goes on; ask again")
        case grpc.StatusCode.UNAVAILABLE if not begun:
            return retry_later(status.code, f"{source_id} does not answer; try again", _RETRY_DELAY_S)
        case _:
            message = f"{source_id} does not tell what became of the move ({status.code.name}); {_SEE}"
            return retry_later(grpc.StatusCode.UNAVAILABLE, message, _RETRY_DELAY_S)

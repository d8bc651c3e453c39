"""The source's calls to the target of one migration, with deadlines, and what their answers amount to.

A call that fails says as much as one that is not answered: nothing. Only the target's word that it has done what it was
asked for, or has given the migration up, counts.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from enum import Enum, auto
from typing import Final, TypeVar

import grpc.aio

from starmesh.migration.source_effects import Commit, Copy
from starmesh.migration.terms import Cause, Limits, Refusal, Terms
from starmesh.rpc import convert, convert_migration
from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.types import KvLayout, KvTicket, RemainingEstimate
from starmesh.v1 import decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)

T = TypeVar("T")

ABORT_TIMEOUT_S: Final = 2.0
"""Deadline of the one call that nobody waits for: the target's own timers see to it when it is lost."""


LEAST_TIMEOUT_S: Final = 0.001
"""A timeout of 0 would mean none."""


class Verdict(Enum):
    """What the target says."""

    DONE = auto()
    DECLINED = auto()
    NO_ANSWER = auto()


_VERDICTS: Final = {
    decode_pb2.MIGRATION_VERDICT_DONE: Verdict.DONE,
    decode_pb2.MIGRATION_VERDICT_DECLINED: Verdict.DECLINED,
}


class TargetCalls:
    """The calls of one migration, on a connection of its own: a commit must not wait behind the blocks of another."""

    def __init__(self, address: str, terms: Terms, limits: Limits, credentials: Credentials | None = None) -> None:
        self._channel = open_channel(address, credentials)
        self._stub: decode_pb2_grpc.DecodeServiceAsyncStub = decode_pb2_grpc.DecodeServiceStub(self._channel)
        self._terms = terms
        self._limits = limits

    async def reserve(
        self,
        blocks: int,
        *,
        max_tokens: int,
        layout: KvLayout,
        source_address: str,
        request_traceparent: str,
        traceparent: str,
    ) -> int | Refusal | None:
        """Ask for ``blocks``; how many were set aside, or why none. ``request_traceparent`` is the request's trace
        context, which moves along, ``traceparent`` that of this migration's span."""
        terms = self._terms
        request = decode_pb2.ReserveMigrationRequest(
            reservation_id=terms.reservation_id,
            request_id=terms.request_id,
            epoch=terms.epoch,
            source_instance_id=terms.source_id,
            source_address=source_address,
            layout=convert.layout_pb(layout),
            blocks=blocks,
            reason=convert_migration.reason_pb(terms.reason),
            traceparent=request_traceparent,
            max_tokens=max_tokens,
        )
        metadata = (("traceparent", traceparent),) if traceparent else ()
        answer = await self._answer(
            self._stub.ReserveMigration(request, timeout=self._limits.reserve_s, metadata=metadata)
        )
        if answer is None:
            return None
        if answer.refusal != decode_pb2.MIGRATION_REFUSAL_UNSPECIFIED:
            return convert_migration.refusal(answer.refusal)
        return answer.blocks

    async def copy(self, round_: Copy, ticket: KvTicket) -> tuple[Verdict, int]:
        """Have a copy round's blocks pulled; the verdict, and the bytes pulled."""
        request = decode_pb2.CopyMigrationRequest(
            reservation_id=self._terms.reservation_id,
            round=round_.round,
            first_block=round_.first_block,
            ticket=convert.ticket_pb(ticket),
        )
        answer = await self._answer(self._stub.CopyMigration(request, timeout=self._limits.round_s))
        return _verdict(answer)

    async def commit(
        self, commit: Commit, ticket: KvTicket, *, remaining_s: float, estimate: RemainingEstimate | None
    ) -> tuple[Verdict, int]:
        """Have the tail pulled and the sequence claimed; as ``copy``. ``remaining_s`` bounds the sequence, and
        ``estimate`` is the last one of its remaining tokens."""
        request = decode_pb2.CommitMigrationRequest(
            reservation_id=self._terms.reservation_id,
            sequence=convert.spec_pb(commit.spec),
            first_block=commit.first_block,
            ticket=convert.ticket_pb(ticket),
            timeout=convert.duration_pb(max(remaining_s, LEAST_TIMEOUT_S)),
            estimate=None if estimate is None else convert.estimate_pb(estimate),
        )
        answer = await self._answer(self._stub.CommitMigration(request, timeout=self._limits.commit_s))
        return _verdict(answer)

    async def close(self, abort: Cause | None) -> None:
        """Disconnect; with ``abort``, having said once that nobody waits for this migration."""
        if abort is not None:
            request = decode_pb2.AbortMigrationRequest(
                reservation_id=self._terms.reservation_id, cause=convert_migration.cause_pb(abort)
            )
            await self._answer(self._stub.AbortMigration(request, timeout=ABORT_TIMEOUT_S))
        await self._channel.close()

    async def _answer(self, call: Awaitable[T]) -> T | None:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            log.info(
                "moving %s to %s: %s: %s",
                self._terms.request_id,
                self._terms.target_id,
                error.code().name,
                error.details(),
            )
            return None


def _verdict(
    answer: decode_pb2.CopyMigrationResponse | decode_pb2.CommitMigrationResponse | None,
) -> tuple[Verdict, int]:
    if answer is None:
        return Verdict.NO_ANSWER, 0
    return _VERDICTS.get(answer.verdict, Verdict.NO_ANSWER), answer.transfer_bytes

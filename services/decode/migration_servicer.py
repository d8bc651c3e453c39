"""The calls of DecodeService that move sequences: Migrate for whoever decides on moves, the rest between instances."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio

from services.decode import migration_intake as intake
from services.decode.migrator import Migrator
from starmesh.instance.instance import Instance
from starmesh.migration.terms import Cause, Refusal
from starmesh.rpc import convert, convert_migration
from starmesh.v1 import decode_pb2, decode_pb2_grpc


class MigrationServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Half of DecodeService; ``DecodeServicer`` adds the other."""

    def __init__(self, migrator: Migrator, instance: Instance, *, max_timeout_s: float) -> None:
        self._migrator = migrator
        self._instance = instance
        self._max_timeout_s = max_timeout_s

    async def Migrate(  # noqa: N802 - gRPC's name
        self,
        request: decode_pb2.MigrateRequest,
        context: grpc.aio.ServicerContext[decode_pb2.MigrateRequest, decode_pb2.MigrateResponse],
    ) -> AsyncIterator[decode_pb2.MigrateResponse]:
        migration = self._migrator.migrate(intake.move_asked(request))
        async with aclosing(migration.progress.follow()) as steps:
            async for progress in steps:
                yield progress.to_pb()

    async def ReserveMigration(  # noqa: N802
        self,
        request: decode_pb2.ReserveMigrationRequest,
        context: grpc.aio.ServicerContext[decode_pb2.ReserveMigrationRequest, decode_pb2.ReserveMigrationResponse],
    ) -> decode_pb2.ReserveMigrationResponse:
        parent = str(dict(context.invocation_metadata() or ()).get("traceparent", ""))
        asked = intake.room_asked(request, target_id=self._instance.instance_id, parent=parent)
        answer = await self._migrator.incoming.reserve(asked)
        if isinstance(answer, Refusal):
            return decode_pb2.ReserveMigrationResponse(refusal=convert_migration.refusal_pb(answer))
        kept_s = self._migrator.incoming.kept_s
        return decode_pb2.ReserveMigrationResponse(blocks=answer, lease_duration=convert.duration_pb(kept_s))

    async def CopyMigration(  # noqa: N802
        self,
        request: decode_pb2.CopyMigrationRequest,
        context: grpc.aio.ServicerContext[decode_pb2.CopyMigrationRequest, decode_pb2.CopyMigrationResponse],
    ) -> decode_pb2.CopyMigrationResponse:
        migration = self._migrator.incoming.get(request.reservation_id)
        asked = intake.copy_asked(request, migration.terms, self._instance.layout)
        done = await migration.copied(asked)
        return decode_pb2.CopyMigrationResponse(verdict=_verdict(done), transfer_bytes=migration.pulled_bytes)

    async def CommitMigration(  # noqa: N802
        self,
        request: decode_pb2.CommitMigrationRequest,
        context: grpc.aio.ServicerContext[decode_pb2.CommitMigrationRequest, decode_pb2.CommitMigrationResponse],
    ) -> decode_pb2.CommitMigrationResponse:
        migration = self._migrator.incoming.get(request.reservation_id)
        asked = intake.commit_asked(request, migration.terms, self._instance.layout)
        timeout_s = convert.duration_s(request.timeout) or self._max_timeout_s
        done = await migration.committed(
            asked,
            remaining_s=min(timeout_s, self._max_timeout_s),
            estimate=convert.estimate(request.estimate) if request.HasField("estimate") else None,
        )
        return decode_pb2.CommitMigrationResponse(verdict=_verdict(done), transfer_bytes=migration.pulled_bytes)

    async def AbortMigration(  # noqa: N802
        self,
        request: decode_pb2.AbortMigrationRequest,
        context: grpc.aio.ServicerContext[decode_pb2.AbortMigrationRequest, decode_pb2.AbortMigrationResponse],
    ) -> decode_pb2.AbortMigrationResponse:
        # A cause of a newer peer, too, means that nobody waits.
        cause = convert_migration.cause(request.cause) or Cause.CANCELLED
        self._migrator.incoming.abort(request.reservation_id, cause)
        return decode_pb2.AbortMigrationResponse()


def _verdict(done: bool) -> decode_pb2.MigrationVerdict.ValueType:
    return decode_pb2.MIGRATION_VERDICT_DONE if done else decode_pb2.MIGRATION_VERDICT_DECLINED

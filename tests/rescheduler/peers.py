"""Decode instances that answer Migrate by a script: real servers on real sockets, and reports made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc

from starmesh.ledger import Ledger
from starmesh.rpc.server import RpcServer
from starmesh.rpc.status import StatusError
from starmesh.types import InstanceInfo, InstanceLoad, Role, SequenceLoad
from starmesh.v1 import decode_pb2, decode_pb2_grpc
from tests.policy.views import LAYOUT

LONG_S = 3600.0

Answer = Callable[[decode_pb2.MigrateRequest], AsyncIterator[decode_pb2.MigrateResponse]]


def progress(stage: decode_pb2.MigrationStage.ValueType, **fields: Any) -> decode_pb2.MigrateResponse:
    return decode_pb2.MigrateResponse(reservation_id="reservation", stage=stage, **fields)


def saying(*responses: decode_pb2.MigrateResponse | StatusError) -> Answer:
    """Tells these, and ends; or fails with the last."""

    async def answer(_: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        for response in responses:
            if isinstance(response, StatusError):
                raise response
            yield response

    return answer


def hanging() -> Answer:
    """Begins, and is heard of no more."""

    async def answer(_: decode_pb2.MigrateRequest) -> AsyncIterator[decode_pb2.MigrateResponse]:
        yield progress(decode_pb2.MIGRATION_STAGE_COPYING)
        await asyncio.Event().wait()

    return answer


MOVED = saying(
    progress(decode_pb2.MIGRATION_STAGE_RESERVING),
    progress(decode_pb2.MIGRATION_STAGE_COPYING, rounds=1),
    progress(decode_pb2.MIGRATION_STAGE_MOVED, rounds=2, transfer_bytes=10_000),
)


class Peer(decode_pb2_grpc.DecodeServiceServicer):
    """A decode instance. ``answers`` are for the next commands, then ``answer``; ``asked`` is what came."""

    def __init__(self, ledger: Ledger, instance_id: str) -> None:
        self.asked: list[decode_pb2.MigrateRequest] = []
        self.answer: Answer = MOVED
        self.answers: list[Answer] = []
        self.instance_id = instance_id
        self.address = ""
        self.newest_term = 0
        self._ledger = ledger
        self._server = RpcServer(listen="127.0.0.1:0")
        name = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
        self._server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, self, name)

    async def __aenter__(self) -> Self:
        self.address = await self._server.start()
        info = InstanceInfo(self.instance_id, "one", Role.DECODE, self.address, layout=LAYOUT)
        await self._ledger.register(info, ttl_s=LONG_S)
        await self.report()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    async def report(self, *sequences: SequenceLoad, **fields: int) -> None:
        """Say that these run here."""
        blocks = sum(-(-known.resident_tokens // LAYOUT.block_tokens) for known in sequences)
        load = InstanceLoad(
            total_blocks=1000,
            free_blocks=1000 - blocks,
            running_sequences=len(sequences),
            resident_tokens=sum(known.resident_tokens for known in sequences),
            sequences=sequences,
            **fields,  # type: ignore[arg-type]
        )
        assert await self._ledger.report(self.instance_id, "one", load, ttl_s=LONG_S)

    async def leave(self) -> None:
        """Lose the registration."""
        await self._ledger.deregister(self.instance_id, "one")

    async def Migrate(  # noqa: N802
        self, request: decode_pb2.MigrateRequest, context: Any
    ) -> AsyncIterator[decode_pb2.MigrateResponse]:
        self.asked.append(request)
        if request.leader_term < self.newest_term:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, "an old leader's term")
        self.newest_term = request.leader_term
        answer = self.answers.pop(0) if self.answers else self.answer
        async for response in answer(request):
            yield response

"""ClusterService: shows the ledger's view and steers instances. Owns no state of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import Span, SpanKind

from services.router.cluster_frames import ClusterFrames, instance_messages
from services.router.cluster_predictor import promote_version, read_predictor
from services.router.ledger_watch import LedgerWatch
from services.router.operator_moves import Move, follow_move, plan_move
from services.router.owners import Owners
from services.router.router import Router
from services.router.seen_moves import SeenMoves
from services.router.validation import check_request_id, duration_in
from starmesh.rpc import convert_migration
from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.telemetry import names
from starmesh.telemetry.setup import (
    address_attributes,
    context_of_call,
    link_to,
    note_failure,
    span,
    traceparent_of,
    tracer,
)
from starmesh.types import InstanceInfo, InstanceState, MigrationReason, Role
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_MIN_INTERVAL_S = 0.1
_MAX_INTERVAL_S = 60.0
_DEFAULT_INTERVAL_S = 1.0
_DRAIN_TIMEOUT_S = 5.0
_RETRY_DELAY_S = 1.0


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves operators."""

    def __init__(
        self,
        router: Router,
        watch: LedgerWatch,
        owners: Owners,
        frames: ClusterFrames,
        moves: SeenMoves,
        *,
        credentials: Credentials | None,
        dispatch_policy: str,
    ) -> None:
        """``credentials`` are for calls to instances."""
        self._router = router
        self._credentials = credentials
        self._watch = watch
        self._owners = owners
        self._frames = frames
        self._moves = moves
        self._dispatch_policy = dispatch_policy

    async def ListInstances(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.ListInstancesRequest, context: Context
    ) -> cluster_pb2.ListInstancesResponse:
        view = await self._watch.refresh()
        return cluster_pb2.ListInstancesResponse(
            instances=instance_messages(view),
            dispatch_policy=self._dispatch_policy,
            ledger_available=self._watch.available,
        )

    async def WatchCluster(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.WatchClusterRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.WatchClusterResponse]:
        interval_s = _DEFAULT_INTERVAL_S
        if request.HasField("interval"):
            interval_s = duration_in(request.interval, "interval", _MIN_INTERVAL_S, _MAX_INTERVAL_S)
        stopping = self._router.stopping
        if request.max_sequences < 0:
            raise bad_field("max_sequences", "is negative; use 0 for all")
        while not stopping.is_set():
            yield await self._frames.frame(max_sequences=request.max_sequences)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stopping.wait()

    async def Drain(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.DrainResponse:
        check_request_id(request.instance_id, "instance_id")
        await self._watch.refresh()
        found = self._watch.find(request.instance_id)
        if found is None:
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"the ledger has no instance {request.instance_id}")
        if found.role not in (Role.PREFILL, Role.DECODE):
            raise bad_field("instance_id", f"is a {found.role.value}; only prefill and decode instances drain")
        remaining_s = context.time_remaining()
        timeout_s = _DRAIN_TIMEOUT_S if remaining_s is None else min(_DRAIN_TIMEOUT_S, remaining_s)
        if found.state is not InstanceState.READY:
            # Asked again, to see how far it is, twice a second by `starmesh drain`.
            return await self._drain(found, timeout_s=timeout_s)
        attributes = {names.DRAINED_INSTANCE: found.instance_id, **address_attributes(found.address)}
        parent = context_of_call(context.invocation_metadata())
        with span(names.SPAN_DRAIN, parent, kind=SpanKind.SERVER, attributes=attributes) as current:
            drained = await self._drain(found, timeout_s=timeout_s)
            current.set_attribute(names.SEQUENCES, drained.remaining_sequences)
            return drained

    async def _drain(self, instance: InstanceInfo, *, timeout_s: float) -> cluster_pb2.DrainResponse:
        try:
            async with open_channel(instance.address, self._credentials) as channel:
                stub = cluster_pb2_grpc.InstanceServiceStub(channel)
                drained = await stub.DrainInstance(cluster_pb2.DrainInstanceRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise retry_later(
                grpc.StatusCode.UNAVAILABLE,
                f"{instance.instance_id} does not answer ({error.code().name}); try again",
                _RETRY_DELAY_S,
            ) from None
        return cluster_pb2.DrainResponse(state=drained.state, remaining_sequences=drained.remaining_sequences)

    async def MigrateSequence(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.MigrateSequenceRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.MigrateSequenceResponse]:
        check_request_id(request.request_id)
        check_request_id(request.target_instance_id, "target_instance_id")
        view = await self._watch.refresh()
        owner = await self._owners.find(request.request_id)
        move = plan_move(view, owner, request.request_id, request.target_instance_id)
        self._moves.ordered(request.request_id, move.source.instance_id, request.target_instance_id)
        source_id = move.source.instance_id
        command = _begin_command(move, context)
        # A caller that goes ends this call with its own; the migration goes on.
        try:
            linked = False
            order = move.order(traceparent=traceparent_of(command))
            async for progress in follow_move(move, order, self._credentials, timeout_s=context.time_remaining()):
                if not linked:
                    link_to(command, progress.traceparent)
                    linked = True
                # The last one stays.
                command.set_attribute(names.MIGRATION_OUTCOME, convert_migration.stage_words(progress.stage))
                yield cluster_pb2.MigrateSequenceResponse(source_instance_id=source_id, progress=progress)
        except StatusError as error:
            note_failure(command, error.code.name)
            raise
        finally:
            command.end()

    async def GetClusterPredictor(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.GetClusterPredictorRequest, context: Context
    ) -> cluster_pb2.GetClusterPredictorResponse:
        await self._watch.refresh()
        predictor = self._watch.find_predictor()
        return await read_predictor(predictor, self._credentials, timeout_s=context.time_remaining())

    async def PromoteClusterPredictor(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.PromoteClusterPredictorRequest, context: Context
    ) -> cluster_pb2.PromoteClusterPredictorResponse:
        await self._watch.refresh()
        predictor = self._watch.find_predictor()
        return await promote_version(predictor, self._credentials, request.version, timeout_s=context.time_remaining())


def _begin_command(move: Move, context: Context) -> Span:
    """Not made the current one: what is current would be ended in another context when a caller leaves during a
    write."""
    return tracer().start_span(
        names.SPAN_COMMAND,
        context_of_call(context.invocation_metadata()),
        kind=SpanKind.SERVER,
        attributes={
            names.REQUEST_ID: move.request_id,
            names.EPOCH: move.epoch,
            names.SOURCE_INSTANCE: move.source.instance_id,
            names.TARGET_INSTANCE: move.target.instance_id,
            names.MIGRATION_REASON: MigrationReason.OPERATOR.value,
            **address_attributes(move.source.address),
        },
    )

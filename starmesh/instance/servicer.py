"""InstanceService: lets operators and the router see and drain an instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from starmesh.rpc import convert
from starmesh.types import InstanceView
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc

if TYPE_CHECKING:
    from starmesh.instance.instance import Instance


class InstanceServicer(cluster_pb2_grpc.InstanceServiceServicer):
    """Serves the router's operators' calls."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    async def DrainInstance(  # noqa: N802 - gRPC's name
        self,
        request: cluster_pb2.DrainInstanceRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.DrainInstanceRequest, cluster_pb2.DrainInstanceResponse],
    ) -> cluster_pb2.DrainInstanceResponse:
        left = await self._instance.drain()
        return cluster_pb2.DrainInstanceResponse(state=convert.state_pb(self._instance.state), remaining_sequences=left)

    async def GetInstance(  # noqa: N802 - gRPC's name
        self,
        request: cluster_pb2.GetInstanceRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.GetInstanceRequest, cluster_pb2.GetInstanceResponse],
    ) -> cluster_pb2.GetInstanceResponse:
        await self._instance.engine.call(lambda core: core.check_integrity())
        load = await self._instance.load()
        view = InstanceView(self._instance.membership.info, load)
        return cluster_pb2.GetInstanceResponse(
            instance=convert.instance_pb(view, now_s=0.0),
            used_blocks=load.total_blocks - load.free_blocks,
            leases=self._instance.leases,
        )

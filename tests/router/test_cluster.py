"""ClusterService and health."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import cluster_pb2
from tests.router.conftest import Mesh, until


async def test_instances_are_listed_by_role_and_id(mesh: Mesh) -> None:
    await mesh.start(prefills=2, decodes=2, dispatch_policy="round_robin")
    answer = await mesh.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=10)
    ids = [instance.instance_id for instance in answer.instances]
    assert ids[:4] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert answer.instances[4].role == cluster_pb2.ROLE_ROUTER
    assert (answer.dispatch_policy, answer.ledger_available) == ("round_robin", True)
    mesh.ledger.down = True
    answer = await mesh.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=10)
    assert [instance.instance_id for instance in answer.instances] == [
        *ids[:4],
        answer.instances[4].instance_id,
    ]
    assert not answer.ledger_available


async def test_the_cluster_can_be_watched(mesh: Mesh) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 3
    running = mesh.generate()
    await until(lambda: mesh.decodes[0].sequences)
    request = cluster_pb2.WatchClusterRequest(interval=Duration(nanos=100_000_000))
    call = mesh.cluster.WatchCluster(request, timeout=20)
    views = []
    async for view in call:
        views.append(view)
        if len(views) == 3:
            break
    assert all(view.active_requests == 1 and view.ledger_available for view in views)
    assert [view.observe_time.ToNanoseconds() for view in views] == sorted(
        view.observe_time.ToNanoseconds() for view in views
    )
    call.cancel()
    running.cancel()


@pytest.mark.parametrize("nanos", [50_000_000, -1])
async def test_the_interval_has_bounds(mesh: Mesh, nanos: int) -> None:
    await mesh.start()
    request = cluster_pb2.WatchClusterRequest(interval=Duration(nanos=nanos))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in mesh.cluster.WatchCluster(request, timeout=20):
            pass
    assert from_rpc_error(caught.value).fields == ["interval"]


async def test_an_instance_can_be_drained(mesh: Mesh) -> None:
    await mesh.start(decodes=2)
    drained = await mesh.cluster.Drain(cluster_pb2.DrainRequest(instance_id="decode-1"), timeout=10)
    assert drained.state == cluster_pb2.INSTANCE_STATE_DRAINING
    answer = await mesh.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=10)
    states = {instance.instance_id: instance.state for instance in answer.instances}
    assert states["decode-1"] == cluster_pb2.INSTANCE_STATE_DRAINING
    assert states["decode-0"] == cluster_pb2.INSTANCE_STATE_READY


async def test_what_cannot_be_drained(mesh: Mesh) -> None:
    await mesh.start()

    async def code_of(instance_id: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.cluster.Drain(cluster_pb2.DrainRequest(instance_id=instance_id), timeout=10)
        code: grpc.StatusCode = caught.value.code()
        return code

    assert await code_of("nobody") is grpc.StatusCode.NOT_FOUND
    assert await code_of("") is grpc.StatusCode.INVALID_ARGUMENT
    router_id = mesh.process.watch.view.instances[-1].info.instance_id
    assert router_id.startswith("router-")
    assert await code_of(router_id) is grpc.StatusCode.INVALID_ARGUMENT
    await mesh.decodes[0].server.stop(0)
    assert await code_of("decode-0") is grpc.StatusCode.UNAVAILABLE


async def test_health_is_serving_once_requests_can_be_taken(mesh: Mesh) -> None:
    await mesh.start(decodes=0)
    health = health_pb2_grpc.HealthStub(mesh.channel)

    async def status() -> int:
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return int(answer.status)

    assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
    await mesh.add_decode()
    async with asyncio.timeout(20):
        await mesh.process.watch.ready.wait()
        while await status() != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)

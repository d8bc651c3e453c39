"""The operator's calls about the predictor, through the router."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from starmesh.rpc.status import StatusError, from_rpc_error
from starmesh.v1 import cluster_pb2
from tests.router.conftest import Mesh

GET = cluster_pb2.GetClusterPredictorRequest()
TWO = cluster_pb2.PromoteClusterPredictorRequest(version="two")


async def test_the_predictor_tells_and_obeys(mesh: Mesh) -> None:
    await mesh.start()
    predictor = await mesh.add_predictor()
    found = await mesh.cluster.GetClusterPredictor(GET, timeout=10)
    assert (found.instance_id, found.status.version) == ("predictor-0", "one")
    promoted = await mesh.cluster.PromoteClusterPredictor(TWO, timeout=10)
    assert (promoted.instance_id, promoted.status.version, predictor.promoted) == ("predictor-0", "two", ["two"])


async def errors(mesh: Mesh) -> list[StatusError]:
    """What both calls say."""
    said = []
    for call in (
        mesh.cluster.GetClusterPredictor(GET, timeout=10),
        mesh.cluster.PromoteClusterPredictor(TWO, timeout=10),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        said.append(from_rpc_error(caught.value))
    return said


async def test_without_a_predictor(mesh: Mesh) -> None:
    await mesh.start()
    said = await errors(mesh)
    assert [error.code for error in said] == [grpc.StatusCode.NOT_FOUND] * 2
    assert "services.predictor" in said[0].message


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION])
async def test_what_the_predictor_says_is_passed_on(mesh: Mesh, code: grpc.StatusCode) -> None:
    await mesh.start()
    predictor = await mesh.add_predictor()
    predictor.script += [StatusError(code, "its own words")] * 2
    assert [(error.code, error.message) for error in await errors(mesh)] == [(code, "its own words")] * 2


async def test_a_predictor_that_does_not_answer(mesh: Mesh) -> None:
    await mesh.start()
    predictor = await mesh.add_predictor()
    await predictor.server.stop(0)
    said = await errors(mesh)
    assert [error.code for error in said] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert all(error.retry_delay_s for error in said)

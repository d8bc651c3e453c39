"""The operator's way to the predictor: it is asked where the ledger says that it is.

Owns what a caller hears of a predictor that is not there or does not answer. Owns no look at the ledger
(``ledger_watch``) and no state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import StatusError, from_rpc_error, retry_later
from starmesh.types import InstanceInfo
from starmesh.v1 import cluster_pb2, predictor_pb2, predictor_pb2_grpc

# A version is read from disk and tried before it answers.
_TIMEOUT_S = 10.0
_RETRY_DELAY_S = 1.0
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

T = TypeVar("T")


async def read_predictor(
    predictor: InstanceInfo | None, credentials: Credentials | None, *, timeout_s: float | None
) -> cluster_pb2.GetClusterPredictorResponse:
    """How the predictor does. Raises StatusError: NOT_FOUND without one, UNAVAILABLE when it does not answer, and what
    it says itself."""
    found = _present(predictor)
    request = predictor_pb2.GetPredictorRequest()
    answer = await _ask(
        found, credentials, lambda stub, limit_s: stub.GetPredictor(request, timeout=limit_s), timeout_s
    )
    return cluster_pb2.GetClusterPredictorResponse(instance_id=found.instance_id, status=answer.status)


async def promote_version(
    predictor: InstanceInfo | None, credentials: Credentials | None, version: str, *, timeout_s: float | None
) -> cluster_pb2.PromoteClusterPredictorResponse:
    """Have another version answer. Raises StatusError as ``read_predictor``."""
    found = _present(predictor)
    request = predictor_pb2.PromotePredictorRequest(version=version)
    answer = await _ask(
        found, credentials, lambda stub, limit_s: stub.PromotePredictor(request, timeout=limit_s), timeout_s
    )
    return cluster_pb2.PromoteClusterPredictorResponse(instance_id=found.instance_id, status=answer.status)


def _present(predictor: InstanceInfo | None) -> InstanceInfo:
    if predictor is None:
        raise StatusError(
            grpc.StatusCode.NOT_FOUND, "no predictor is up in this cluster; start `python -m services.predictor`"
        )
    return predictor


async def _ask(
    predictor: InstanceInfo,
    credentials: Credentials | None,
    call: Callable[[predictor_pb2_grpc.PredictorServiceAsyncStub, float], Awaitable[T]],
    timeout_s: float | None,
) -> T:
    limit_s = _TIMEOUT_S if timeout_s is None else min(_TIMEOUT_S, timeout_s)
    try:
        async with open_channel(predictor.address, credentials) as channel:
            return await call(predictor_pb2_grpc.PredictorServiceStub(channel), limit_s)
    except grpc.aio.AioRpcError as error:
        if error.code() in _NO_ANSWER:
            raise retry_later(
                grpc.StatusCode.UNAVAILABLE,
                f"{predictor.instance_id} does not answer ({error.code().name}); try again",
                _RETRY_DELAY_S,
            ) from None
        raise from_rpc_error(error) from None

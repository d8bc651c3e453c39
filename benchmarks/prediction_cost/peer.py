"""A predictor that does no good: ``python -m benchmarks.prediction_cost.peer --says slow|garbage``, with the flags of a
service.

``slow`` answers as it should, but after 5 s. ``garbage`` answers at once, by turns: estimates of sequences that nobody
asked for, estimates that cannot be, and an error with a long text. ``GetPredictor`` counts the calls.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import grpc
from pydantic import Field

from starmesh.instance.bare import open_bare
from starmesh.process import ServiceSettings, run_service
from starmesh.rpc.server import RpcServer
from starmesh.types import Role
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc, sequence_pb2

DELAY_S = 5.0
STRAY_ESTIMATES = 100_000
LONG_TEXT = "x" * 4096


class PeerSettings(ServiceSettings):
    """A service's."""

    says: Literal["slow", "garbage"] = Field(description="how it answers")


class Peer(predictor_pb2_grpc.PredictorServiceServicer):  # no version can be promoted here
    """Answers every call in its way."""

    def __init__(self, says: str) -> None:
        self._says = says
        self._calls = 0

    async def Predict(  # noqa: N802 - gRPC's name
        self,
        request: predictor_pb2.PredictRequest,
        context: grpc.aio.ServicerContext[predictor_pb2.PredictRequest, predictor_pb2.PredictResponse],
    ) -> predictor_pb2.PredictResponse:
        self._calls += 1
        if self._says == "slow":
            await asyncio.sleep(DELAY_S)
            return _answer(request, ahead=0, remaining=100, upper=200)
        match self._calls % 3:
            case 0:
                await context.abort(grpc.StatusCode.INTERNAL, LONG_TEXT)
            case 1:
                return _answer(request, ahead=1000, remaining=-5, upper=-10)
        stray = predictor_pb2.SampleEstimate(request_id="nobody", estimate=_estimate(1, 2, 3))
        return predictor_pb2.PredictResponse(estimates=[stray] * STRAY_ESTIMATES, version="garbage")

    async def GetPredictor(  # noqa: N802 - gRPC's name
        self,
        request: predictor_pb2.GetPredictorRequest,
        context: grpc.aio.ServicerContext[predictor_pb2.GetPredictorRequest, predictor_pb2.GetPredictorResponse],
    ) -> predictor_pb2.GetPredictorResponse:
        return predictor_pb2.GetPredictorResponse(status=predictor_pb2.PredictorStatus(predictions=self._calls))


def _answer(
    request: predictor_pb2.PredictRequest, *, ahead: int, remaining: int, upper: int
) -> predictor_pb2.PredictResponse:
    estimates = [
        predictor_pb2.SampleEstimate(
            request_id=sample.request_id, estimate=_estimate(sample.output_tokens + ahead, remaining, upper)
        )
        for sample in request.samples
    ]
    return predictor_pb2.PredictResponse(estimates=estimates, version="peer")


def _estimate(output_tokens: int, remaining: int, upper: int) -> sequence_pb2.RemainingEstimate:
    return sequence_pb2.RemainingEstimate(
        output_tokens=output_tokens, remaining_tokens=remaining, remaining_tokens_upper=upper
    )


async def serve(settings: PeerSettings, stop: asyncio.Event) -> None:
    """Serve until ``stop``."""

    def add_services(server: RpcServer) -> None:
        server.add(
            predictor_pb2_grpc.add_PredictorServiceServicer_to_server,
            Peer(settings.says),  # type: ignore[abstract]
            predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name,
        )

    async with open_bare(settings, Role.PREDICTOR, add_services=add_services):
        await stop.wait()


if __name__ == "__main__":
    run_service("predictor", PeerSettings, serve)

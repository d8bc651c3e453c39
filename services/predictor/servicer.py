"""PredictorService: maps the wire to the service, and bounds what calls may hold in memory."""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio

from services.predictor.intake import ends_of, samples_of
from services.predictor.predictor import MAX_WAIT_S, PredictorService, Status
from services.predictor.registry import MAX_NAME_LENGTH
from starmesh.rpc import convert
from starmesh.rpc.status import bad_field, retry_later
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc

MAX_CALLS: Final = 4096
MAX_CALL_BYTES: Final = 256 << 20
"""Of all calls that wait. Their messages live as long as they do, also when most of their samples were dropped."""
RETRY_DELAY_S: Final = 1.0
_WAY_BACK: Final = 0.05
"""The part of a call's time that is left for its answer's way back: some estimates are better than none."""


class PredictorServicer(predictor_pb2_grpc.PredictorServiceServicer):
    """Serves decode instances, routers and, through those, operators."""

    def __init__(self, service: PredictorService, *, max_calls: int = MAX_CALLS, max_call_bytes: int = MAX_CALL_BYTES):
        self._service = service
        self._max_calls = max_calls
        self._max_call_bytes = max_call_bytes
        self._calls = 0
        self._call_bytes = 0

    async def Predict(  # noqa: N802 - gRPC's name
        self,
        request: predictor_pb2.PredictRequest,
        context: grpc.aio.ServicerContext[predictor_pb2.PredictRequest, predictor_pb2.PredictResponse],
    ) -> predictor_pb2.PredictResponse:
        size = request.ByteSize()
        if self._calls >= self._max_calls or (self._calls and self._call_bytes + size > self._max_call_bytes):
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._calls} calls with {self._call_bytes} bytes wait here; send newer samples later",
                RETRY_DELAY_S,
            )
        self._calls += 1
        self._call_bytes += size
        try:
            samples, ends = samples_of(request), ends_of(request)
            left_s = context.time_remaining()
            timeout_s = MAX_WAIT_S if left_s is None else left_s * (1.0 - _WAY_BACK)
            prediction = await self._service.predict(samples, ends, timeout_s=timeout_s)
        finally:
            self._calls -= 1
            self._call_bytes -= size
        return predictor_pb2.PredictResponse(
            estimates=[
                predictor_pb2.SampleEstimate(
                    request_id=request.samples[row].request_id, estimate=convert.estimate_pb(estimate)
                )
                for row, estimate in prediction.estimates.items()
            ],
            version=prediction.version,
            traceparent=prediction.traceparent,
        )

    async def GetPredictor(  # noqa: N802 - gRPC's name
        self,
        request: predictor_pb2.GetPredictorRequest,
        context: grpc.aio.ServicerContext[predictor_pb2.GetPredictorRequest, predictor_pb2.GetPredictorResponse],
    ) -> predictor_pb2.GetPredictorResponse:
        return predictor_pb2.GetPredictorResponse(status=_status_pb(await self._service.status()))

    async def PromotePredictor(  # noqa: N802 - gRPC's name
        self,
        request: predictor_pb2.PromotePredictorRequest,
        context: grpc.aio.ServicerContext[
            predictor_pb2.PromotePredictorRequest, predictor_pb2.PromotePredictorResponse
        ],
    ) -> predictor_pb2.PromotePredictorResponse:
        if not 1 <= len(request.version) <= MAX_NAME_LENGTH:
            raise bad_field("version", f"must be 1 to {MAX_NAME_LENGTH} characters")
        await self._service.promote(request.version)
        return predictor_pb2.PromotePredictorResponse(status=_status_pb(await self._service.status()))


def _status_pb(status: Status) -> predictor_pb2.PredictorStatus:
    predictor = status.version.predictor
    return predictor_pb2.PredictorStatus(
        version=status.version.name,
        kind=predictor.kind,
        layout=convert.hidden_layout_pb(predictor.layout) if predictor.layout is not None else None,
        parameters=predictor.parameters,
        versions=status.versions,
        predictions=status.predictions,
        dropped_samples=status.dropped_samples,
        latency=convert.duration_pb(status.latency_s),
        ended_sequences=status.ended_sequences,
        qualities=[
            predictor_pb2.PredictionQuality(
                progress_from=quality.progress_from,
                progress_to=quality.progress_to,
                estimates=quality.estimates,
                mae_tokens=quality.mae_tokens,
                coverage=quality.coverage,
            )
            for quality in status.qualities
        ],
        collected_samples=status.collected_samples,
        collected_bytes=status.collected_bytes,
    )

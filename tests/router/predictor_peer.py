"""A predictor that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starmesh.ledger import Ledger
from starmesh.rpc import convert
from starmesh.types import RemainingEstimate, Role
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc
from tests.router.peers import Peer


class PredictorPeer(Peer, predictor_pb2_grpc.PredictorServiceServicer):
    """Says of each sample what ``says`` does."""

    def __init__(self, ledger: Ledger, instance_id: str = "predictor-0", **options: Any) -> None:
        super().__init__(ledger, Role.PREDICTOR, instance_id, **options)
        self.gate = asyncio.Event()
        """While clear, predictions hang."""
        self.gate.set()
        self.asked: list[predictor_pb2.PredictRequest] = []
        self.says: Callable[[predictor_pb2.PredictionSample], RemainingEstimate | None] = lambda sample: (
            RemainingEstimate(sample.output_tokens, 5, 9)
        )
        """None drops a sample."""
        self.promoted: list[str] = []

    def _register_service(self) -> None:
        service = predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name
        self.server.add(predictor_pb2_grpc.add_PredictorServiceServicer_to_server, self, service)

    async def Predict(  # noqa: N802
        self, request: predictor_pb2.PredictRequest, context: Any
    ) -> predictor_pb2.PredictResponse:
        self.asked.append(request)
        if self.script:
            raise self.script.popleft()
        await self.gate.wait()
        answer = predictor_pb2.PredictResponse(version="one")
        for sample in request.samples:
            said = self.says(sample)
            if said is not None:
                answer.estimates.add(request_id=sample.request_id, estimate=convert.estimate_pb(said))
        return answer

    async def GetPredictor(  # noqa: N802
        self, request: predictor_pb2.GetPredictorRequest, context: Any
    ) -> predictor_pb2.GetPredictorResponse:
        if self.script:
            raise self.script.popleft()
        return predictor_pb2.GetPredictorResponse(status=self._status("one"))

    async def PromotePredictor(  # noqa: N802
        self, request: predictor_pb2.PromotePredictorRequest, context: Any
    ) -> predictor_pb2.PromotePredictorResponse:
        if self.script:
            raise self.script.popleft()
        self.promoted.append(request.version)
        return predictor_pb2.PromotePredictorResponse(status=self._status(request.version))

    def _status(self, version: str) -> predictor_pb2.PredictorStatus:
        return predictor_pb2.PredictorStatus(version=version, versions=["one", "two"])

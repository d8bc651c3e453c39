"""The service in this process behind a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from opentelemetry.metrics import NoOpMeterProvider

from services.predictor.collector import open_collector
from services.predictor.metrics import PredictorMetrics
from services.predictor.predictor import PredictorService
from services.predictor.registry import PredictorFiles, Registry
from services.predictor.servicer import PredictorServicer
from starmesh.prediction.batch import Predictor
from starmesh.prediction.conditional_median import ConditionalMedian
from starmesh.rpc.channels import open_channel
from starmesh.rpc.server import RpcServer
from starmesh.rpc.status import StatusError, from_rpc_error
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc
from tests.predictor.predictors import WAIT_S, Files

SERVICE = predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name


@dataclass(frozen=True)
class Running:
    """A service, and a client of it."""

    service: PredictorService
    registry: Registry
    metrics: PredictorMetrics
    address: str
    stub: predictor_pb2_grpc.PredictorServiceAsyncStub

    async def predict(self, request: predictor_pb2.PredictRequest) -> predictor_pb2.PredictResponse:
        return await self.stub.Predict(request, timeout=WAIT_S)

    async def promote(self, version: str) -> predictor_pb2.PredictorStatus:
        message = predictor_pb2.PromotePredictorRequest(version=version)
        return (await self.stub.PromotePredictor(message, timeout=WAIT_S)).status

    async def status(self) -> predictor_pb2.PredictorStatus:
        return (await self.stub.GetPredictor(predictor_pb2.GetPredictorRequest(), timeout=WAIT_S)).status

    async def queued(self, samples: int) -> None:
        """Wait until so many samples wait for a forward."""
        await until(lambda: len(self.service._batcher) == samples)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


async def failure(call: Awaitable[object]) -> StatusError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@asynccontextmanager
async def serving(
    predictor: Predictor | None = None,
    *,
    files: Files | PredictorFiles | None = None,
    directory: Path | None = None,
    named: str = "",
    recalibrate: bool = False,
    queue: int = 4096,
    collect: Path | None = None,
    collect_max_bytes: int = 1 << 30,
    max_calls: int = 4096,
) -> AsyncIterator[Running]:
    """``predictor`` answers from the start, as version "given"."""
    files = files or Files()
    if predictor is not None:
        given = Path("given.safetensors")
        assert isinstance(files, Files)
        files.given[given.stem] = predictor
        named = str(given)
    registry = Registry(
        files.files() if isinstance(files, Files) else files,
        directory=directory,
        named=named,
        recalibrate=recalibrate,
        median=ConditionalMedian(),
    )
    await registry.start()
    metrics = PredictorMetrics(NoOpMeterProvider().get_meter("test"))
    collector = await open_collector(collect, max_bytes=collect_max_bytes) if collect is not None else None
    service = PredictorService(registry, metrics, queue_samples=queue, collector=collector)
    server = RpcServer(listen="127.0.0.1:0")
    server.add(
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server,
        PredictorServicer(service, max_calls=max_calls),
        SERVICE,
    )
    address = await server.start()
    channel = open_channel(address)
    stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
    try:
        yield Running(service, registry, metrics, address, stub)
    finally:
        await channel.close()
        await server.stop(0.0)
        await service.close()

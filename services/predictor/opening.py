"""The parts of the service as the settings want them, in the order that they start and stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from opentelemetry.metrics import Meter

from services.predictor.collector import open_collector
from services.predictor.config import PredictorSettings
from services.predictor.emulated import emulated_predictors
from services.predictor.metrics import PredictorMetrics
from services.predictor.predictor import PredictorService
from services.predictor.registry import PredictorFiles, Registry
from starmesh.prediction.batch import Predictor
from starmesh.prediction.conditional_median import ConditionalMedian


@asynccontextmanager
async def open_predictor(
    settings: PredictorSettings, files: PredictorFiles, meter: Meter
) -> AsyncIterator[PredictorService]:
    """The service within the context. Raises ValueError for a predictor that cannot be loaded, ShardError for a
    directory of other samples, and OSError."""
    others: Mapping[str, Predictor] = {}
    if settings.emulation is not None:
        others = emulated_predictors(settings.emulation, cap_tokens=settings.longest_output_tokens)
    registry = Registry(
        files,
        directory=settings.predictor_dir,
        named=settings.predictor,
        recalibrate=settings.recalibrate,
        median=ConditionalMedian(),
        others=others,
    )
    await registry.start()
    async with AsyncExitStack() as stack:
        collector = None
        if settings.collect is not None:
            collector = await open_collector(settings.collect, max_bytes=settings.collect_max_mib << 20)
        service = PredictorService(registry, PredictorMetrics(meter), queue_samples=settings.queue, collector=collector)
        stack.push_async_callback(service.close)
        yield service

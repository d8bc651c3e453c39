"""``python -m services.predictor``"""

import asyncio

from services.predictor.config import PredictorSettings
from services.predictor.opening import open_predictor
from services.predictor.registry import PredictorFiles
from services.predictor.servicer import PredictorServicer
from starmesh.instance.bare import open_bare
from starmesh.prediction.predictor_file import load_predictor, shipped_predictor, shipped_predictors
from starmesh.process import run_service
from starmesh.rpc.server import RpcServer
from starmesh.types import Role
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc

FILES = PredictorFiles(load_predictor, shipped_predictor, shipped_predictors)


async def serve(settings: PredictorSettings, stop: asyncio.Event) -> None:
    """Serve until ``stop``; then store what was collected."""
    async with (
        settings.open_metrics(Role.PREDICTOR.value) as metrics,
        open_predictor(settings, FILES, metrics.meter) as service,
    ):

        def add_services(server: RpcServer) -> None:
            server.add(
                predictor_pb2_grpc.add_PredictorServiceServicer_to_server,
                PredictorServicer(service),
                predictor_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name,
            )

        async with open_bare(settings, Role.PREDICTOR, add_services=add_services, metrics=metrics):
            await stop.wait()


if __name__ == "__main__":
    run_service("predictor", PredictorSettings, serve)
